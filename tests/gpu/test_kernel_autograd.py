"""The fused losses as citizens of autograd, autocast and torch.compile."""

import warnings
from pathlib import Path
from typing import Any

import kddata_kernels as kernels
import pytest
import torch
from kddata_kernels import ops
from kddata_kernels.linear import kd_linear
from kernel_reference import Case, assert_gradient, assert_loss, expected, inputs
from torch import Tensor

CASE = Case(shape=(6, 100, 7), temperature=2.0, alpha=0.3, smoothing=0.1, mixup=True, weights=True)


def positional(logits: Tensor, kept: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """The operator's arguments up to `mean`."""
    return (
        logits,
        *kept,
        options["targets_b_N"],
        options["lam_N"],
        options["weights_N"],
        options["temperature"],
        options["alpha"],
        options["tail"],
        options["label_smoothing"],
        -100,
        options["reduction"] == "mean",
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.37, -3.0, 0.0])
def test_a_factor_on_the_loss(factor: float, dtype: torch.dtype, recompute: bool, device: str) -> None:
    """It never multiplies a value that was rounded: one unit in the last place holds for every factor."""
    logits, kept, options = inputs(Case(**{**vars(CASE), "dtype": dtype}), device)
    logits.requires_grad_()
    (kernels.kd_loss(logits, *kept, **options, recompute=recompute) * factor).backward()
    assert logits.grad is not None
    assert_gradient(logits.grad, expected(logits, *kept, **options, grad_out=factor).grad_NC)


def test_a_factor_for_each_row(device: str) -> None:
    """Rows whose factor is 1 are left as the forward pass made them; their neighbours are not."""
    logits, kept, options = inputs(Case(**{**vars(CASE), "reduction": "none"}), device)
    logits.requires_grad_()
    factors = torch.tensor([1.0, 2.0, 1.0, -0.5, 0.0, 1.0], device=device)
    loss = kernels.kd_loss(logits, *kept, **options)
    loss.backward(factors)
    assert logits.grad is not None
    assert_gradient(logits.grad, expected(logits, *kept, **options, grad_out=factors).grad_NC)


def test_two_losses_on_one_set_of_logits(device: str) -> None:
    logits, kept, options = inputs(CASE, device)
    logits.requires_grad_()
    other = {**options, "tail": "renorm", "alpha": 0.9}
    (kernels.kd_loss(logits, *kept, **options) + 0.5 * kernels.kd_loss(logits, *kept, **other)).backward()
    want = expected(logits, *kept, **options).grad_NC + expected(logits, *kept, **other, grad_out=0.5).grad_NC
    assert logits.grad is not None
    assert_gradient(logits.grad, want, scale=2 * float(want.abs().max()))


def test_a_kept_graph_serves_again(device: str) -> None:
    """What a first backward handed out stays as it was, whatever factor the next one has."""
    logits, kept, options = inputs(CASE, device)
    logits.requires_grad_()
    loss = kernels.kd_loss(logits, *kept, **options)
    (thrice,) = torch.autograd.grad(loss, logits, torch.tensor(3.0, device=device), retain_graph=True)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (half,) = torch.autograd.grad(loss, logits, torch.tensor(0.5, device=device))
    for grad, factor in ((thrice, 3.0), (once, 1.0), (half, 0.5)):
        assert_gradient(grad, expected(logits, *kept, **options, grad_out=factor).grad_NC)


def test_double_backward_raises(device: str) -> None:
    logits, kept, options = inputs(CASE, device)
    logits.requires_grad_()
    for recompute in (False, True):
        loss = kernels.kd_loss(logits, *kept, **options, recompute=recompute)
        with pytest.raises(RuntimeError, match=r"no second derivative; got backward with create_graph=True\. Next: "):
            torch.autograd.grad(loss, logits, create_graph=True)


def test_logits_changed_before_backward_are_noticed(device: str) -> None:
    logits, kept, options = inputs(CASE, device)
    hidden = logits.requires_grad_() * 1.0
    loss = kernels.kd_loss(hidden, *kept, **options)
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_statistics_carry_no_gradient_and_no_gradient_is_made_unasked(device: str) -> None:
    logits, kept, options = inputs(CASE, device)
    _, stats = kernels.kd_loss(logits.requires_grad_(), *kept, **options, stats=True)
    assert not any(x.requires_grad for x in stats)
    with torch.no_grad():
        assert not kernels.kd_loss(logits, *kept, **options).requires_grad
    made = ops.kd_rows(*positional(logits.detach(), kept, options), False, False)
    assert [tuple(x.shape) for x in made] == [(6,), (0, 0), (3, 0), (0,)]


def test_a_padded_gradient_has_the_rows_of_its_logits(device: str) -> None:
    logits, kept, options = inputs(Case(**{**vars(CASE), "padding": 4}), device)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(kernels.kd_loss(logits, *kept, **options), logits)
    assert grad.stride() == logits.stride() == (104, 1)
    row = logits.detach()[:1].expand(6, -1).requires_grad_()  # stride 0: a gradient cannot have that
    (grad,) = torch.autograd.grad(kernels.kd_loss(row, *kept, **options), row)
    assert grad.stride() == (100, 1)
    assert_gradient(grad, expected(row, *kept, **options).grad_NC)


def test_autocast(device: str) -> None:
    """bf16 logits from a linear layer: the loss is float32 and the same as outside."""
    _, kept, options = inputs(CASE, device)
    torch.manual_seed(0)
    layer, features = torch.nn.Linear(16, 100, device=device), torch.randn(6, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        logits = layer(features)
        loss = kernels.kd_loss(logits, *kept, **options)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert_loss(loss, expected(logits, *kept, **options), "mean")
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_under_ddp(device: str, tmp_path: Path) -> None:
    """DDP's hooks see the gradients that a plain backward makes."""
    _, kept, options = inputs(CASE, device)
    torch.manual_seed(0)
    layer, features = torch.nn.Linear(16, 100, device=device), torch.randn(6, 16, device=device)
    kernels.kd_loss(layer(features), *kept, **options).backward()
    assert layer.weight.grad is not None
    plain, layer.weight.grad, layer.bias.grad = layer.weight.grad, None, None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(layer)
        for _ in range(2):  # the second step needs the first one's hooks to have run
            layer.zero_grad()
            kernels.kd_loss(model(features), *kept, **options).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(layer.weight.grad, plain)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break(backend: str, device: str) -> None:
    logits, kept, options = inputs(CASE, device)

    def loss_of(x: Tensor) -> Tensor:
        return kernels.kd_loss(x * 1.0, *kept, **options) * 0.37

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    logits.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = compiled(logits)
        loss.backward()
    want = expected(logits, *kept, **options, grad_out=0.37)
    assert logits.grad is not None
    assert_gradient(logits.grad, want.grad_NC)
    torch.testing.assert_close(loss.detach().double().cpu(), 0.37 * want.loss_N.sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("want_grad", [False, True])
def test_opcheck(want_grad: bool, device: str) -> None:
    logits, kept, options = inputs(CASE, device)
    arguments = positional(logits.requires_grad_(), kept, options)
    torch.library.opcheck(ops.kd_rows, (*arguments, want_grad, True))
    detached = (logits.detach(), *arguments[1:])
    torch.library.opcheck(ops.kd_rows_grad, (torch.rand(6, device=device), *detached))
    grad = torch.rand_like(detached[0])
    torch.library.opcheck(ops.kd_rows_regrad, (grad, torch.rand(6, device=device), *detached))


def test_opcheck_linear(device: str) -> None:
    _, kept, options = inputs(CASE, device)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, device=device, requires_grad=True) for s in ((6, 5), (100, 5), (100,)))
    rest = positional(x, kept, options)[1:]
    torch.library.opcheck(kd_linear, (x, weight, bias, *rest, 4, [True, True, True]))


@pytest.mark.needs_cuda
def test_no_host_sync(device: str) -> None:
    logits, kept, options = inputs(Case(**{**vars(CASE), "shape": (64, 1000, 10)}), device)
    logits.requires_grad_()
    features = torch.randn(64, 32, device=device, requires_grad=True)
    weight = torch.randn(1000, 32, device=device, requires_grad=True)

    def step() -> None:
        loss, _ = kernels.kd_loss(logits, *kept, **options, stats=True)
        (0.5 * loss).backward()
        kernels.kd_linear_loss(features, weight, None, *kept, **options, chunk_rows=32).backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs_cuda
def test_cuda_graph(device: str) -> None:
    logits, kept, options = inputs(Case(**{**vars(CASE), "shape": (64, 1000, 10)}), device)
    args = (*positional(logits, kept, options), True, False)
    ops.kd_rows(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad, _, _ = ops.kd_rows(*args)
    logits.copy_(logits.roll(1, 0))
    graph.replay()
    want = expected(logits, *kept, **options)
    assert_loss(loss, want, "none")
    assert_gradient(grad, want.grad_NC)


@pytest.mark.needs_cuda
def test_offsets_beyond_int32(device: str) -> None:
    """8192 x 262144 = 2^31 logits: the last row lies beyond what int32 can address."""
    n, c = 8193, 262144
    logits = torch.zeros(n, c, dtype=torch.bfloat16, device=device)
    logits[-1] = torch.randn(c, device=device)
    ids = torch.arange(8, device=device).expand(n, 8).contiguous()
    log_p, log_tail = torch.full((n, 8), -4.0, device=device), torch.full((n,), -1.0, device=device)
    _, grad, _, _ = ops.kd_rows(
        logits, ids, log_p, log_tail, None, None, None, None, 1.0, 1.0, "bucket", 0.0, -100, False, True, False
    )
    want = expected(logits[-1:], ids[-1:], log_p[-1:], log_tail[-1:], reduction="sum")
    assert_gradient(grad[-1:], want.grad_NC)
