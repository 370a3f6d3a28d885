"""Capturing tensors inside a network: the right ones, with gradients, and never stale or overwritten values."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from kddata.errors import ConfigError, TeacherError
from kddata.features import Capture, attention_map, fsp_matrix, parse

NAMES = ("embedding", "features:layer2", "attention:layer3", "fsp:layer1:layer2")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5).eval()


def test_names_have_a_kind_and_its_nodes() -> None:
    assert parse("embedding") == ("embedding", ())
    assert parse("fsp:a.0:b") == ("fsp", ("a.0", "b"))
    for name in ("", "embedding:x", "features", "features:", "fsp:a", "logits:fc"):
        with pytest.raises(ConfigError, match="embedding, features:NODE"):
            parse(name)


def test_captured_tensors_are_those_of_the_network(network: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    capture = Capture(network, NAMES)
    logits = network(x)
    found = capture.take()
    capture.close()
    stem = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    first = network.layer1(stem)
    second = network.layer2(first)
    third = network.layer3(second)
    torch.testing.assert_close(network.fc(found["embedding"]), logits, rtol=0, atol=0)
    torch.testing.assert_close(found["features:layer2"], second, rtol=0, atol=0)
    torch.testing.assert_close(found["attention:layer3"], third.square().mean(1))
    pooled = nn.functional.adaptive_avg_pool2d(first, second.shape[2:])
    fsp = torch.einsum("bchw,bdhw->bcd", pooled, second) / second[0, 0].numel()
    torch.testing.assert_close(found["fsp:layer1:layer2"], fsp)
    assert list(found) == list(NAMES)


def test_gradients_flow_through_captured_tensors(network: nn.Module) -> None:
    capture = Capture(network, ("attention:layer2",))
    network(torch.randn(1, 3, 64, 64))
    capture.take()["attention:layer2"].sum().backward()
    capture.close()
    assert network.layer1[0].conv1.weight.grad.abs().sum() > 0
    assert network.layer4[0].conv1.weight.grad is None


def test_each_take_is_of_its_own_forward_pass(network: nn.Module) -> None:
    capture = Capture(network, ("embedding",))
    network(torch.zeros(1, 3, 64, 64))
    capture.take()
    with pytest.raises(TeacherError, match="reached in every forward pass"):
        capture.take()
    capture.close()
    network(torch.zeros(1, 3, 64, 64))
    with pytest.raises(TeacherError, match="reached"):
        capture.take()


def test_a_node_that_is_not_there_is_named_with_the_nearest(network: nn.Module) -> None:
    with pytest.raises(ConfigError, match="perhaps layer2 was meant"):
        Capture(network, ("features:layr2",))
    with pytest.raises(ConfigError, match="no linear layer"):
        Capture(nn.Conv2d(3, 3, 1), ("embedding",))


def test_a_node_that_is_overwritten_is_found_in_training_and_kept_without_gradients() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 4, 4)
    capture = Capture(body, ("features:0",))
    body(x)
    with pytest.raises(TeacherError, match="in place"):
        capture.take()
    with torch.inference_mode():
        body(x)
        assert bool((capture.take()["features:0"] < 0).any()), "as it was before the ReLU"


def test_maps_are_asked_of_maps_alone() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    capture = Capture(body, ("attention:1",))
    body(torch.zeros(1, 3, 2, 2))
    with pytest.raises(TeacherError, match="feature maps"):
        capture.take()


def test_maps_are_computed_in_float32_at_least() -> None:
    half = torch.full((1, 2, 1, 1), 300.0, dtype=torch.float16)
    assert attention_map(half).item() == 90_000
    assert fsp_matrix(half, half).dtype == torch.float32


@pytest.mark.parametrize("name", ["features:features.3", "attention:features.3", "fsp:features.1:features.3"])
def test_maps_with_the_channels_last_are_refused(name):
    """Taken for [B, C, H, W] they would give maps of the right kind and no meaning."""
    network = torchvision.models.swin_t(num_classes=5).eval()
    capture = Capture(network, [name])
    with torch.inference_mode():
        network(torch.zeros(1, 3, 64, 64))
    with pytest.raises(TeacherError, match=r"with the channels last \(in "):
        capture.take()


def test_an_embedding_of_such_a_network_is_what_its_last_layer_is_given():
    network = torchvision.models.swin_t(num_classes=5).eval()
    capture = Capture(network, ["embedding"])
    with torch.inference_mode():
        network(torch.zeros(1, 3, 64, 64))
    assert capture.take()["embedding"].shape == (1, 768)
