"""Images on S3 behind a server that refuses, hangs up or cuts answers: the right bytes, or one clear error."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import torch

from kddata.errors import SourceError
from kddata.images import files
from kddata.replay import loader
from kddata.store import LabelStore
from kddata.testing import make_store
from kddata.testing.http_faults import Spoiled, behind


@contextmanager
def hurried(plan: Callable[[int], Spoiled | None]) -> Iterator[list[Spoiled]]:
    """As `behind`, with pauses and limits of tries that a test can wait for."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PAUSE_S", 0.01)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own pauses are long, and those of botocore
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        with behind(plan, slow_s=1) as spoiled:
            yield spoiled


@pytest.fixture
def work(s3_bucket: str, tmp_path: Path) -> tuple[LabelStore, str]:
    """A store on this machine, and where its images lie on S3."""
    store = make_store(tmp_path, num_images=12)
    place = f"{s3_bucket}/{uuid.uuid4().hex}"
    for path in sorted((tmp_path / "images").iterdir()):
        fsspec.filesystem("s3").pipe_file(f"{place}/{path.name}", path.read_bytes())
    return store, place


def pixels(store: LabelStore, images: str | None) -> torch.Tensor:
    return torch.cat([batch.pixels_u8_B3SS for batch in loader(store, batch_size=4, size_px=16, images=images)])


def test_spoiled_answers_are_asked_for_again(work: tuple[LabelStore, str]) -> None:
    store, place = work
    kinds: tuple[Spoiled, ...] = ("500", "cut", "lost")

    def plan(number: int) -> Spoiled | None:
        return kinds[number // 4 % len(kinds)] if number % 4 == 3 else None

    with hurried(plan) as spoiled:
        found = pixels(store, place)
    assert torch.equal(found, pixels(store, None))
    assert set(spoiled) == set(kinds)


@pytest.mark.parametrize("kind", ["500", "cut", "lost"])
def test_a_server_that_never_answers_well_ends_in_one_clear_error(work: tuple[LabelStore, str], kind: Spoiled) -> None:
    store, place = work
    names = {shard.name for shard in store.images}
    url = f"{place}/{min(names)}"
    with hurried(lambda _: kind) as spoiled, pytest.raises(SourceError, match=r"images can be read; got .*network"):
        files.read_range(url, 0, 100)
    assert len(spoiled) >= files.TRIES
