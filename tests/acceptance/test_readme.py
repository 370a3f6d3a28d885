"""The README's Python examples are run as they stand, in order, in a clean directory."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kddata.teacher import build_network
from kddata.testing import make_images

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_images("shards", num_images=16)
    torch.manual_seed(0)
    network = build_network("torchvision:squeezenet1_1", num_classes=1000)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, "teacher.safetensors")
    assert len(BLOCKS) == 4
    loss: object = None
    for block in BLOCKS:
        names: dict[str, object] = {}
        exec(compile(block, str(README), "exec"), names)
        if "student" in names:
            loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert torch.isfinite(loss)


def test_examples_are_short() -> None:
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip() and "import" not in line]) <= 10
