import pytest
import torch

from kddata.errors import SourceError
from kddata.images import open_source
from kddata.teacher import build_network
from kddata.testing import make_images
from kddata.training import OptimizerArgs
from kddata.training.supervised import LabelledViews, fit
from kddata.views import ViewPlan

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def _views(images, **changes):
    arguments = {"plan": ViewPlan(area=(0.8, 1.0)), "size_px": 16, "batch_size": 8, "seed": 0} | changes
    return LabelledViews(open_source(images), **arguments)


def test_each_image_comes_once_an_epoch_with_its_label(tmp_path):
    views = _views(make_images(tmp_path, num_images=24, num_classes=24), plan=ViewPlan(area=(1, 1), aspect=(1, 1)))
    assert views.steps_per_epoch == 3
    for epoch in range(2):
        targets = torch.cat([views[3 * epoch + step][1] for step in range(3)])
        assert sorted(targets.tolist()) == list(range(24))
    assert not torch.equal(views[0][1], views[3][1])  # another epoch, another order


def test_a_step_is_a_pure_function_of_its_number_and_the_seed(tmp_path):
    images = make_images(tmp_path, num_images=24)
    views, other = _views(images), _views(images)
    other[5], other[0]
    assert torch.equal(views[4][0], other[4][0])
    assert not torch.equal(views[4][0], _views(images, seed=1)[4][0])


def test_images_without_labels_are_refused(tmp_path):
    with pytest.raises(SourceError, match="takes labelled images; got image-00000"):
        _views(make_images(tmp_path, labelled=False))


def test_a_network_learns_and_learns_the_same_again(tmp_path):
    images = make_images(tmp_path, num_images=64, num_classes=4, min_px=24, max_px=32)
    optimizer = OptimizerArgs(lr=0.05, epochs=8, warmup_epochs=0.5)
    networks, losses = [], []
    for _ in range(2):
        network = build_network("python:kddata.nets:quick_resnet", num_classes=4)
        losses.clear()
        fit(
            network,
            _views(images),
            mean=MEAN,
            std=STD,
            optimizer=optimizer,
            report=lambda step, num_steps, loss: losses.append((step, num_steps, loss)),
        )
        networks.append(network)
    assert [(step, num_steps) for step, num_steps, _ in losses] == [(step, 64) for step in range(1, 65)]
    assert sum(loss for _, _, loss in losses[-8:]) < 0.7 * sum(loss for _, _, loss in losses[:8])
    assert not networks[0].training
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, other)
