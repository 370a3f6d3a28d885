"""A store on S3 behind a server that refuses, dawdles, hangs up, or ignores what it is asked."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kddata import rng
from kddata.errors import StoreError
from kddata.store import LabelStore, open_storage, s3
from kddata.testing import chaos, small_store
from kddata.testing.http_faults import Spoiled, behind


@contextmanager
def hurried(plan: Callable[[int], Spoiled | None]) -> Iterator[list[Spoiled]]:
    """As `behind`, with pauses and limits of tries that a test can wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "PAUSE_S", 0.01)
        patch.setattr(s3, "READ_TIMEOUT_S", 1)
        with behind(plan, slow_s=3) as spoiled:
            yield spoiled


def always(kind: Spoiled) -> Callable[[int], Spoiled]:
    """A plan by which every request is spoiled in one way."""
    return lambda _: kind


@pytest.fixture
def url(s3_bucket: str) -> str:
    return f"{s3_bucket}/{uuid.uuid4().hex}"


def test_spoiled_answers_are_asked_for_again(url: str) -> None:
    kinds: tuple[Spoiled, ...] = ("500", "cut", "lost", "500", "lost", "cut", "slow")

    def plan(number: int) -> Spoiled | None:
        return kinds[number // 9 % len(kinds)] if number % 9 == 8 else None

    wanted = chaos.contents(small_store(f"memory://{url[5:]}").url)
    with hurried(plan) as spoiled:
        store = small_store(url)
        opened = LabelStore.open(url)
        assert opened.verify() == []
        assert [len(opened.read(unit)) for unit in range(len(store.units()))] == store.rows_per_unit.tolist()
    assert set(spoiled) == set(kinds)
    assert len(spoiled) >= 10
    assert chaos.contents(url) == wanted


def test_every_tenth_answer_spoiled_by_chance(url: str) -> None:
    def plan(number: int) -> Spoiled | None:
        chance = rng.unit_interval(0, "spoiled", number)
        return "500" if chance < 0.07 else "lost" if chance < 0.12 else "cut" if chance < 0.15 else None

    wanted = chaos.contents(small_store(f"memory://{url[5:]}").url)
    with hurried(plan) as spoiled:
        small_store(url)
    assert len(spoiled) >= 8
    assert chaos.contents(url) == wanted


def test_a_server_that_never_answers_well_ends_in_one_clear_error(url: str) -> None:
    store = small_store(url)
    kinds: tuple[Spoiled, ...] = ("500", "lost", "cut")
    for kind in kinds:
        with hurried(always(kind)), pytest.raises(StoreError, match=r"within 6 tries; got .*check the net"):
            store.read(0)
    with hurried(always("500")):
        for call in (store.storage.sizes, lambda: list(store.storage.chunks("store.json")), store.verify):
            with pytest.raises(StoreError, match="within 6 tries"):
                call()


def test_a_server_that_ignores_conditions_is_refused_and_left_empty(url: str) -> None:
    with (
        hurried(always("unconditional")),
        pytest.raises(StoreError, match=r"put-if-absent.*ignores If-None-Match") as caught,
    ):
        small_store(url)
    assert "copy the finished store" in str(caught.value)
    assert url in str(caught.value)
    assert open_storage(url).sizes() == {}


def test_wrong_credentials_are_said_at_once(url: str) -> None:
    with pytest.raises(StoreError, match=r"lets this process in; got .*check the credentials"):
        open_storage(url)._patiently("x", _denied)  # type: ignore[attr-defined]


def _denied(_: int) -> None:
    raise PermissionError("Forbidden")
