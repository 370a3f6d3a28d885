"""One local Ray for each module, networks that are slow or wrong on purpose, and a way to kill a worker of ours."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NETWORKS = '''
"""Networks for tests, importable by every process."""
import os
import time
from pathlib import Path
import torch
from torch import nn
from kddata.testing import FakeNetwork


class Slow(FakeNetwork):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)


FakeNetwork = FakeNetwork


class Deadly(FakeNetwork):
    """Ends its process at a view that is white all over."""

    def forward(self, x):
        if bool((x == 1).flatten(1).all(1).any()):
            os._exit(1)
        return super().forward(x)


class HangsOnce(FakeNetwork):
    """Hangs at the first call with pixels that any process makes, which leaves a file beside this module."""

    def forward(self, x):
        if x.amax() > 0:
            try:
                (Path(__file__).parent / "hung").open("x").close()
            except FileExistsError:
                pass
            else:
                time.sleep(3600)
        return super().forward(x)


class NotANumber(FakeNetwork):
    def forward(self, x):
        return super().forward(x) + torch.where(x.amax() > 0, torch.nan, 0.0)


def linear(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))


class Fatal(nn.Module):
    """Ends its process in the middle of a step, the fifth that it learns in; a file beside this module says so."""

    def __init__(self):
        super().__init__()
        self.learned = 0

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.learned += 1
            if self.learned == 5 and not (died := Path(__file__).parent / "died").exists():
                died.touch()
                os._exit(1)
        return x


def dies_once(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), Fatal(), nn.Linear(48, num_classes))


class SlowLinear(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.network = linear(num_classes)

    def forward(self, x):
        time.sleep(0.2)
        return self.network(x)


def too_wide(num_classes):
    return linear(num_classes + 1)
'''


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the module `networks_of_tests`, on the import path here and in processes that are started."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "networks_of_tests.py").write_text(NETWORKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def local_ray(networks: Path) -> Iterator[None]:
    """A Ray of two CPUs on this machine, shared by the tests of a module."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def kill_worker() -> Callable[[str], int]:
    """Kills one process below this one whose title has these words, and returns its id once it is gone."""

    def kill(title: str) -> int:
        found = [pid for pid in descendants(os.getpid()) if title in command(pid)]
        assert found, f"no process {title!r} below this one"
        os.kill(found[0], signal.SIGKILL)
        while title in command(found[0]):
            time.sleep(0.01)
        return found[0]

    return kill


def descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, border = [], [root]
    while border:
        border = [pid for pid, parent in parents.items() if parent in border]
        found += border
    return sorted(found)


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
