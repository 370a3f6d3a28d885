"""Convert: a finished store again in another format of shard files, or with its values rounded by codec compact.

Generation after generation is written as labelling wrote it, unit by unit, so that with one codec nothing is lost:
arrow to tar and back gives the same files, byte for byte. Trade-off: rows are decoded and encoded again, which changes
nothing in them, and one unit is held in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kddata.cards import Codec, Format, StoreSpec
from kddata.errors import ConfigError
from kddata.images import ImageSource, image_again
from kddata.labelling import missing_units
from kddata.reader import open_images
from kddata.store import LabelStore, Receipt, Unit, driving, manifest, naming, open_storage
from kddata.store.entries import texts


def convert(
    store: LabelStore,
    out: str,
    *,
    format: Format | None = None,
    codec: Codec | None = None,
    images: str | Sequence[str] | None = None,
    on_receipt: Callable[[Receipt], None] = lambda receipt: None,
) -> LabelStore:
    """The finished store at `out` with the rows of a store, which stays as it is. Stopped, the same call goes on.

    Args:
        format, codec: of the new store; None for what the store has.
        images: where the images lie now, if they moved; they are read for format tar+images alone.
        on_receipt: called with the receipt of each unit that is written now, for progress.

    Raises ConfigError for codec exact of a compact store, whose values are rounded already (those of sampled labels are
    not), and for labels that codec compact cannot hold; StoreMismatchError, naming the field, where something else lies
    at `out`; StoreDamagedError for a damaged shard of the store.
    """
    spec = dataclasses.replace(store.spec, format=format or store.spec.format, codec=codec or store.spec.codec)
    if (store.spec.codec, spec.codec, spec.keep) == ("compact", "exact", "top"):
        raise ConfigError(
            "codec exact holds values as the teacher gave them",
            actual="a compact store, whose values are rounded",
            where=store.url,
            fix="keep codec compact, or label again with codec exact",
        )
    if spec == store.spec:
        raise ConfigError(
            "a conversion changes the format or the codec",
            actual=f"{spec.format} and {spec.codec} again",
            where=store.url,
            fix="name another format or codec; a store is copied by copying its folder",
        )
    source = open_images(store, images) if spec.format == "tar+images" else None
    generations = _generations(store)
    finished = manifest.find(open_storage(out))
    done = 0 if finished is None else finished["generation"]
    if done >= len(generations):
        converted = LabelStore.begin(out, spec=spec, **_asked(generations[-1]))  # raises for another store
        if not converted.leftovers():
            return converted
    with driving(out) as driver:
        for content in generations[min(done, len(generations) - 1) :]:  # a finished last one is tidied up
            converted = _begin(out, spec, content, done)
            if converted.manifest is None:
                _index(store, converted, content)
                for unit in missing_units(converted):
                    on_receipt(_write(store, converted, unit, source))
                    driver.check()
            converted.commit()
    return converted


def _generations(store: LabelStore) -> list[dict[str, Any]]:
    """The manifests of a store, oldest first."""
    assert store.manifest is not None, "a store that was opened is finished"
    names = [naming.manifest_name(1 + i) for i in range(store.manifest["generation"] - 1)]
    return [
        *(manifest.parse(store.storage, store.storage.read(name), name=name) for name in names),
        store.manifest,
    ]


def _asked(content: dict[str, Any]) -> dict[str, Any]:
    """What a generation was begun with, as arguments of `LabelStore.begin`; the library versions tell of its pixels."""
    location = content["images"]["location"]
    return {
        "location": location if isinstance(location, str) else tuple(location),
        "kind": content["images"]["kind"],
        "views_per_image": content["views_per_image"],
        "first_view": content["first_view"],
        "libraries": content["libraries"],
    }


def _begin(out: str, spec: StoreSpec, content: dict[str, Any], done: int) -> LabelStore:
    if content["generation"] in (1, done):
        return LabelStore.begin(out, spec=spec, **_asked(content))
    return LabelStore.extend(out, spec=spec, names=_names(content), **_asked(content))


def _names(content: dict[str, Any]) -> list[str]:
    return texts(content["image_shards"], "name")


def _index(store: LabelStore, converted: LabelStore, content: dict[str, Any]) -> None:
    indexed = converted.indexed_shards()
    for number, shard in enumerate(content["image_shards"]):
        if number not in indexed:
            whole = Unit(number=0, shard=number, piece=0, start=0, stop=shard["num_images"], view_start=0, view_stop=0)
            ids, labels, offsets, lengths = store.read_index(whole)
            converted.write_index(
                number,
                name=shard["name"],
                size_bytes=shard["size_bytes"],
                ids=ids,
                labels=labels,
                offsets=offsets,
                lengths=lengths,
            )
    converted.finish_index(_names(content))


def _write(store: LabelStore, converted: LabelStore, unit: Unit, source: ImageSource | None) -> Receipt:
    assert store.units()[unit.number] == unit, "both stores plan the same units"
    rows = store.read(unit.number)
    reasons, labelled = dict(store.info()["bad"]), set(rows.image_id)
    bad = [(image_id, reasons[image_id]) for image_id in store.read_index(unit)[0] if image_id not in labelled]
    image_bytes = None if source is None else image_again(source, store.images[unit.shard].name)
    return converted.write_unit(unit, [rows], bad=bad, image_bytes=image_bytes)
