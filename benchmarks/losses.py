"""How long each loss takes, forward and backward, beside the plain form that its reference computes.

    python benchmarks/losses.py            batch 128, 100 classes, maps of a small ResNet: about a minute on one core
    python benchmarks/losses.py --tiny     the same code in a few seconds, where times mean little

Plain forms are the published formulas written with torch's own functions on dense teachers, triplets and pairs by
broadcasting, as references have them. Each pair is held to one value and one gradient before it is timed; then both
take turns. Results go to benchmarks/results/losses.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from results import environment, write_results
from torch import Tensor

from kddata import losses
from kddata.labels import SoftLabels

T = 4.0
Loss = Callable[[Tensor], Tensor]


def plain_kd(x: Tensor, teacher: Tensor) -> Tensor:
    return T * T * F.kl_div((x / T).log_softmax(1), (teacher / T).softmax(1), reduction="batchmean")


def plain_dkd(x: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    on = F.one_hot(y, x.shape[1]).bool()
    q, p = (x / T).softmax(1), (teacher / T).softmax(1)
    two_q, two_p = (torch.stack([v[on], v.masked_fill(on, 0).sum(1)], 1) for v in (q, p))
    target = F.kl_div(two_q.log(), two_p, reduction="batchmean")
    others_q, others_p = ((v / T).masked_fill(on, -1000.0) for v in (x, teacher))
    others = F.kl_div(others_q.log_softmax(1), others_p.softmax(1), reduction="batchmean")
    return T * T * (target + 8 * others)


def plain_dist(x: Tensor, teacher: Tensor) -> Tensor:
    def correlation(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()

    q, p = (x / T).softmax(1), (teacher / T).softmax(1)
    return T * T * ((1 - correlation(q, p)) + (1 - correlation(q.T, p.T)))


def plain_lskd(x: Tensor, teacher: Tensor) -> Tensor:
    x, teacher = ((v - v.mean(1, keepdim=True)) / (1e-7 + v.std(1, keepdim=True)) for v in (x, teacher))
    return plain_kd(x, teacher)


def plain_nkd(x: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    on = F.one_hot(y, x.shape[1]).bool()
    p, log_q = teacher.softmax(1), x.log_softmax(1)
    others_p, others_q = (v[~on].view(len(v), -1) for v in (teacher, x))
    others = -(others_p.softmax(1) * others_q.log_softmax(1)).sum(1).mean()
    return -(p[on] * log_q[on]).mean() + 1.5 * others


def plain_ttm(x: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(x.log_softmax(1), (teacher / T).softmax(1), reduction="batchmean")


def plain_rows_ttm(x: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(x.log_softmax(1), (teacher / T).softmax(1), reduction="none").sum(1)


def plain_mlkd(x: Tensor, teacher: Tensor) -> Tensor:
    total = x.new_zeros(())
    for t in (2.0, 3.0, 4.0, 5.0, 6.0):
        q, p = (x / t).softmax(1), (teacher / t).softmax(1)
        total = total + t * t * F.kl_div(q.log(), p, reduction="batchmean")
        total = total + (p @ p.T - q @ q.T).pow(2).sum() / len(x) + (p.T @ p - q.T @ q).pow(2).sum() / x.shape[1]
    return total


def plain_pkt(s: Tensor, t: Tensor) -> Tensor:
    def chances(v: Tensor) -> Tensor:
        v = v / (v.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
        near = (v @ v.T + 1) / 2
        return near / near.sum(1, keepdim=True)

    p, q = chances(t), chances(s)
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def plain_ft(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(v.pow(2).mean(1).flatten(1)) for v in (s, t))
    return (s - t).abs().mean()


def plain_ab(s: Tensor, t: Tensor) -> Tensor:
    off = (s + 1).pow(2) * ((s > -1) & (t <= 0)).float()
    on = (s - 1).pow(2) * ((s <= 1) & (t > 0)).float()
    return 0.003 * (off + on).sum() / len(s)


def plain_ofd(s: Tensor, t: Tensor, margin: Tensor) -> Tensor:
    target = torch.max(t, margin)
    return (F.mse_loss(s, target, reduction="none") * ((s > target) | (t > 0)).float()).sum() / len(s)


def plain_wsld(x: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    of_student, of_teacher = (F.cross_entropy(v.detach(), y, reduction="none") for v in (x, teacher))
    focus = 1 - torch.exp(-of_student / (of_teacher + 1e-7))
    soft = -((teacher / T).softmax(1) * (x / T).log_softmax(1)).sum(1)
    return 2.25 * T * T * (focus * soft).mean()


def plain_ofa(x: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    on = F.one_hot(y, x.shape[1])
    weight = (teacher.softmax(1) + on).pow(1.5)
    return -((weight - on) * x.softmax(1).log()).sum(1).mean()


def plain_aekt(x: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    on = F.one_hot(y, x.shape[1]).bool()
    q, p = (x / T).softmax(1), (teacher / T).softmax(1)
    two_q, two_p = (torch.stack([v[on], v.masked_fill(on, 0).sum(1)], 1) for v in (q, p))
    ratio = (two_p[:, 0] / two_q[:, 0].detach()).clamp(0, 2)
    target = F.kl_div(two_q.log(), two_p, reduction="none").sum(1)
    others_q, others_p = ((v / T).masked_fill(on, -1000.0) for v in (x, teacher))
    others = F.kl_div(others_q.log_softmax(1), others_p.softmax(1), reduction="none").sum(1)
    return T * T * (ratio * target + others).mean()


def plain_cc(s: Tensor, t: Tensor) -> Tensor:
    delta = (s - t).abs()
    return (delta[:-1] * delta[1:]).sum(1).mean()


def plain_vid(s: Tensor, t: Tensor, log_scale: Tensor) -> Tensor:
    variance = (torch.log(1 + torch.exp(log_scale)) + 1e-5).view(1, -1, 1, 1)
    return (0.5 * ((s - t) ** 2 / variance + torch.log(variance))).mean()


def plain_srrl(s: Tensor, t: Tensor, classifier: Tensor) -> Tensor:
    return F.mse_loss(s, t) + 5 * F.mse_loss(s @ classifier, t @ classifier)


def plain_reviewkd(s: Tensor, t: Tensor) -> Tensor:
    loss, weight, total = F.mse_loss(s, t), 1.0, 1.0
    for side in (4, 2, 1):
        if side < s.shape[2]:
            weight /= 2
            loss = loss + weight * F.mse_loss(
                F.adaptive_avg_pool2d(s, (side, side)), F.adaptive_avg_pool2d(t, (side, side))
            )
            total += weight
    return loss / total


def plain_crd(scores: Tensor, num_rows: int) -> Tensor:
    negatives = scores.shape[1] - 1
    noise = torch.full_like(scores[:, :1], negatives / num_rows)
    positive = torch.log(scores[:, :1] / (scores[:, :1] + noise + 1e-7))
    others = torch.log(noise / (scores[:, 1:] + noise + 1e-7))
    return -(positive.sum() + others.view(-1, 1).sum()) / len(scores)


def plain_one(branches: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    ensemble = (branches * gate.unsqueeze(2)).sum(1)
    loss, p = F.cross_entropy(ensemble, y), (ensemble.detach() / 3).softmax(1)
    for i in range(branches.shape[1]):
        own = branches[:, i]
        loss = loss + F.cross_entropy(own, y) + 9 * F.kl_div((own / 3).log_softmax(1), p, reduction="batchmean")
    return loss


def plain_at(maps: list[Tensor], teachers: list[Tensor]) -> Tensor:
    looks = [[F.normalize(v.pow(2).mean(1).flatten(1)) for v in pair] for pair in zip(maps, teachers, strict=True)]
    return torch.stack([(s - t).pow(2).mean() for s, t in looks]).sum()


def plain_sp(s: Tensor, t: Tensor) -> Tensor:
    g_s, g_t = (F.normalize(v @ v.T) for v in (s, t))
    return (g_s - g_t).pow(2).sum() / len(s) ** 2


def plain_rkd(s: Tensor, t: Tensor) -> Tensor:
    def distances(v: Tensor) -> Tensor:
        d = (v[None] - v[:, None]).pow(2).sum(2).clamp_min(1e-12).sqrt() * (1 - torch.eye(len(v)))
        return d / d[d > 0].mean()

    def angles(v: Tensor) -> Tensor:
        e = F.normalize(v[None] - v[:, None], dim=2)
        return torch.einsum("ijd,ikd->ijk", e, e)

    return 25 * F.smooth_l1_loss(distances(s), distances(t)) + 50 * F.smooth_l1_loss(angles(s), angles(t))


def plain_nst(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(v.flatten(2), dim=2) for v in (s, t))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] * b[:, :, None]).sum(3).pow(2).mean()

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def plain_fsp(s: list[Tensor], t: list[Tensor]) -> Tensor:
    def matrix(first: Tensor, second: Tensor) -> Tensor:
        second = F.interpolate(second, first.shape[2:]) if second.shape != first.shape else second
        return (first[:, :, None] * second[:, None]).mean((3, 4))

    return (matrix(*s) - matrix(*t)).pow(2).mean()


def pairs(rows: int, classes: int, width: int, side: int) -> dict[str, tuple[Loss, Loss, Tensor]]:
    """(ours, the plain form, what is differentiated) of each loss."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x, teacher, y = 3 * normal(rows, classes), 4 * normal(rows, classes), torch.arange(rows) % classes
    labels = SoftLabels.from_logits(teacher, k=classes)
    top = SoftLabels.from_logits(teacher, k=10, temperatures=(1.0, T))
    e_s, e_t = normal(rows, width), normal(rows, 4 * width).relu()
    m_s, m_t = normal(rows, 32, side, side), normal(rows, 32, side, side).relu()
    before = normal(rows, 32, side, side)  # a teacher's ReLU
    margin = losses.ofd_margin(before)
    wide, classifier, scale = normal(rows, width), normal(width, classes), normal(32)
    branches, gate = 3 * normal(rows, 3, classes), normal(rows, 3).softmax(1)
    return {
        "kd, k = C": (lambda v: losses.kd_loss(v, labels, temperature=T), lambda v: plain_kd(v, teacher), x),
        "kd, k = 10, uniform": (
            lambda v: losses.kd_loss(v, top, temperature=T, tail="uniform"),
            lambda v: plain_kd(v, T * top.dense("uniform", temperature=T).log()),
            x,
        ),
        "dkd": (lambda v: losses.dkd_loss(v, labels, y), lambda v: plain_dkd(v, teacher, y), x),
        "dist": (lambda v: losses.dist_loss(v, labels, temperature=T), lambda v: plain_dist(v, teacher), x),
        "lskd": (lambda v: losses.lskd_loss(v, labels, temperature=T), lambda v: plain_lskd(v, teacher), x),
        "nkd": (lambda v: losses.nkd_loss(v, labels, y), lambda v: plain_nkd(v, teacher, y), x),
        "ttm": (lambda v: losses.ttm_loss(v, labels, temperature=T), lambda v: plain_ttm(v, teacher), x),
        "mlkd": (lambda v: losses.mlkd_loss(v, labels), lambda v: plain_mlkd(v, teacher), x),
        "wttm": (
            lambda v: losses.wttm_loss(v, labels, temperature=T),
            lambda v: ((teacher.softmax(1) ** (1 / T)).sum(1) * plain_rows_ttm(v, teacher)).mean(),
            x,
        ),
        "wsld": (lambda v: losses.wsld_loss(v, labels, y), lambda v: plain_wsld(v, teacher, y), x),
        "ofa": (lambda v: losses.ofa_loss(v, labels, y), lambda v: plain_ofa(v, teacher, y), x),
        "aekt": (lambda v: losses.aekt_loss(v, labels, y), lambda v: plain_aekt(v, teacher, y), x),
        "ctkd, at one temperature": (
            lambda v: losses.ctkd_loss(v, labels, temperature=torch.tensor(T)),
            lambda v: plain_kd(v, teacher),
            x,
        ),
        "bss": (
            lambda v: losses.bss_loss(v, labels, temperature=3.0),
            lambda v: F.kl_div((v / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean"),
            x,
        ),
        "dml, two peers": (
            lambda v: losses.dml_loss(v, torch.stack([teacher, -teacher], 1)),
            lambda v: torch.stack(
                [F.kl_div(v.log_softmax(1), p.softmax(1), reduction="batchmean") for p in (teacher, -teacher)]
            ).mean(),
            x,
        ),
        "one": (lambda v: losses.one_loss(v, gate, y), lambda v: plain_one(v, gate, y), branches),
        "cc": (lambda v: losses.cc_loss(v, wide), lambda v: plain_cc(v, wide), e_s),
        "vid, without regressor": (
            lambda v: losses.vid_loss(v, m_t, scale),
            lambda v: plain_vid(v, m_t, scale),
            m_s,
        ),
        "srrl, without connector": (
            lambda v: losses.srrl_loss(v, wide, v @ classifier, wide @ classifier),
            lambda v: plain_srrl(v, wide, classifier),
            e_s,
        ),
        "reviewkd, without fusion": (
            lambda v: losses.reviewkd_loss([v], [m_t]),
            lambda v: plain_reviewkd(v, m_t),
            m_s,
        ),
        "crd, of scores": (
            lambda v: losses.contrastive_loss(v.exp(), 50_000),
            lambda v: plain_crd(v.exp(), 50_000),
            normal(rows, 1025),
        ),
        "at": (lambda v: losses.at_loss([v], [m_t]), lambda v: plain_at([v], [m_t]), m_s),
        "sp": (lambda v: losses.sp_loss([v], [e_t]), lambda v: plain_sp(v, e_t), e_s),
        "rkd": (lambda v: losses.rkd_loss(v, e_t), lambda v: plain_rkd(v, e_t), e_s),
        "pkt": (lambda v: losses.pkt_loss(v, e_t), lambda v: plain_pkt(v, e_t), e_s),
        "ft": (lambda v: losses.ft_loss(v, m_t), lambda v: plain_ft(v, m_t), m_s),
        "ab": (lambda v: losses.ab_loss([v], [before]), lambda v: plain_ab(v, before), m_s),
        "ofd": (lambda v: losses.ofd_loss(v, before, margin), lambda v: plain_ofd(v, before, margin), m_s),
        "nst": (lambda v: losses.nst_loss([v], [m_t]), lambda v: plain_nst(v, m_t), m_s),
        "fsp": (
            lambda v: losses.fsp_loss([losses.fsp_matrix(v, v)], [losses.fsp_matrix(m_t, m_t)]),
            lambda v: plain_fsp([v, v], [m_t, m_t]),
            m_s,
        ),
        "fitnets, without regressor": (lambda v: losses.fitnets_loss(v, m_t), lambda v: F.mse_loss(v, m_t), m_s),
    }


def once(loss: Loss, value: Tensor) -> tuple[Tensor, Tensor, float]:
    """(loss, gradient, seconds)."""
    x = value.clone().requires_grad_()
    begin = time.perf_counter()
    result = loss(x)
    (grad,) = torch.autograd.grad(result, x)
    return result.detach(), grad, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"rows": 8, "classes": 20, "width": 16, "side": 4} if args.tiny else {}
    sizes = sizes or {"rows": 128, "classes": 100, "width": 128, "side": 8}
    table = {}
    for name, (ours, plain, value) in pairs(**sizes).items():
        (a, grad_a, _), (b, grad_b, _) = once(ours, value), once(plain, value)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(grad_a, grad_b, rtol=1e-2, atol=1e-5)
        seconds = [(once(ours, value)[2], once(plain, value)[2]) for _ in range(args.rounds)]
        ms = [1e3 * statistics.median(column) for column in zip(*seconds, strict=True)]
        table[name] = {"ours_ms": ms[0], "plain_ms": ms[1], "ratio": ms[0] / ms[1]}
        print(f"{name:28} {ms[0]:9.3f} ms, plain {ms[1]:9.3f} ms: {ms[0] / ms[1]:6.2f} x")
    if not args.tiny:
        write_results("losses", {"environment": environment(), "sizes": sizes, "losses": table})


if __name__ == "__main__":
    main()
