"""Small convolutional networks for images of 28 to 64 px: for the demo, for tests, and as a pattern for one's own.

Job files name them `python:kddata.nets:small_resnet`. Nothing here loads weights or knows about distillation.
Trade-off: three plain families instead of a zoo; larger ones come from torchvision.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn


def small_resnet(num_classes: int, *, width: int = 16, depth: int = 1, stem_stride: int = 1) -> nn.Module:
    """Three stages of `depth` basic blocks of `width`, 2 `width` and 4 `width` channels, mean-pooled, one linear layer.

    With `stem_stride` 2 the first convolution halves the image: about a quarter of the work.

    Source: He et al., "Deep residual learning for image recognition" (CVPR 2016), section 4.2.
    """
    channels = [width, width, 2 * width, 4 * width]
    blocks = [
        _BasicBlock(before if i == 0 else after, after, stride=2 if i == 0 and before != after else 1)
        for before, after in itertools.pairwise(channels)
        for i in range(depth)
    ]
    return nn.Sequential(*_conv(3, width, stride=stem_stride), *blocks, *_head(4 * width, num_classes))


def large_resnet(num_classes: int) -> nn.Module:
    """A `small_resnet` four times as wide with two blocks a stage: a teacher for the small ones."""
    return small_resnet(num_classes, width=64, depth=2)


def quick_resnet(num_classes: int) -> nn.Module:
    """A `small_resnet` for CPUs: 5 MFLOP an image of 28 px, 78 thousand weights."""
    return small_resnet(num_classes, stem_stride=2)


def quick_resnet_wide(num_classes: int) -> nn.Module:
    """A `quick_resnet` twice as wide: its teacher."""
    return small_resnet(num_classes, width=32, stem_stride=2)


def small_cnn(num_classes: int, *, width: int = 16) -> nn.Module:
    """Three 3 x 3 convolutions, each followed by 2 x 2 max-pooling: no shortcuts, so unlike any residual teacher."""
    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [*_conv(before, after), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, *_head(4 * width, num_classes))


class _BasicBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), with a 1 x 1 shortcut where the shape changes."""

    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(before, after, stride=stride), *_conv(after, after)[:2])
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(before, after, size=1, stride=stride)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def _conv(before: int, after: int, *, size: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    ]


def _head(channels: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
