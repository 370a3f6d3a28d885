"""LabelStore: a folder of label shards that is begun, filled unit by unit, committed once, and then only read.

Any process may die at any point; whoever begins the same store again goes on where receipts end. A label shard
without a receipt counts for nothing and is written again. Trade-off: a committed generation never changes, so reading
it needs no lock and no listing: its manifest says all. An extension adds files and the next manifest; the older ones
stay, each named with its hash by the next, and readers open the newest. Each manifest has a copy, manifest-N.copy.json,
from which it can be mended.

Layout, in the order of writing: store.json, index/*.arrow, images.json, then for each unit labels/N.arrow (or .tar) and
receipts/N.json, then manifest-000001.json; receipts are removed after it. An extension in the same way: index/*.arrow
of new image shards, extension-000002.json, new units, manifest-000002.json. Where a manifest would list more than 512
units or image shards, images-000001.arrow and units-000001.arrow, written just before it, do so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kddata.cards import StoreSpec
from kddata.errors import (
    ConfigError,
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreMismatchError,
    StoreMissingError,
)
from kddata.store import arrow, columns, formats, manifest, naming
from kddata.store.entries import mapped, numbers, texts
from kddata.store.folding import fold
from kddata.store.lock import LOCK
from kddata.store.manifest import IndexedShard, Receipt
from kddata.store.naming import HEADER, IMAGES, MANIFEST
from kddata.store.rows import LabelRows
from kddata.store.sealing import seal, unseal
from kddata.store.storage import TEMPORARY, Storage, open_storage, read_checked, read_or_none, require_create_once
from kddata.store.tally import Tally
from kddata.store.tar import ImageBytes
from kddata.store.units import Unit
from kddata.store.verify import Problem, find_problems

_UNIT_FIELDS = [field.name for field in dataclasses.fields(Unit)]


class LabelStore:
    """A label store. Made by `begin` or `open`; cheap to pickle.

    Attributes:
        storage: where its files lie.
        spec: what its labels mean.
        location, kind: where its images lay when it was begun, and in which form.
        views_per_image: V, over all units.
        first_view: index of the first of these views: 0, unless it is labelled apart to be merged.
        manifest: the content of the newest manifest; None until committed, also while a store is being extended.
    """

    def __init__(
        self,
        storage: Storage,
        head: dict[str, Any],
        committed: dict[str, Any] | None,
        base: dict[str, Any] | None = None,
    ) -> None:
        location = head["images"]["location"]
        self.storage = storage
        self.spec = StoreSpec.from_json(head["spec"])
        self.location: str | tuple[str, ...] = location if isinstance(location, str) else tuple(location)
        self.kind: str = head["images"]["kind"]
        self.views_per_image: int = head["views_per_image"]
        self.first_view: int = head["first_view"]
        self.manifest = committed
        self._head = head
        self._base = base  # the manifest that is being extended
        self._images: Sequence[IndexedShard] | None = None
        self._units: Sequence[Unit] | None = None
        self._index: tuple[int, pa.Table] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return LabelStore, (
            self.storage,
            self._head,
            self.manifest,
            self._base,
        )  # all else is read again

    @property
    def url(self) -> str:
        """Where the store lies."""
        return self.storage.url

    @classmethod
    def begin(
        cls,
        url: str,
        *,
        spec: StoreSpec,
        location: str | tuple[str, ...],
        kind: str,
        views_per_image: int,
        first_view: int = 0,
        libraries: dict[str, str] | None = None,
    ) -> LabelStore:
        """A store to fill: a new one, or one that was begun equally, finished or not.

        Args:
            libraries: versions of those that made its pixels, where its rows come from another store.

        Raises StoreMismatchError, naming the field, for a store that was begun with other values, or a folder that
        holds something else. Nothing is overwritten.
        """
        if views_per_image < 1:
            raise ConfigError("views.per_image is at least 1", actual=views_per_image)
        if spec.plan.policy == "center" and (views_per_image, first_view) != (1, 0):
            raise ConfigError("policy center has one view an image", actual=views_per_image, fix="per_image: 1")
        if first_view < 0:
            raise ConfigError("views.first is at least 0", actual=first_view)
        storage = open_storage(url)
        head = manifest.header(
            spec,
            location=location,
            kind=kind,
            views_per_image=views_per_image,
            first_view=first_view,
            made_with=libraries,
        )
        stored = read_or_none(storage, HEADER)
        if stored is None:
            others = [
                name for name in storage.sizes() if not (TEMPORARY.search(name) or LOCK.match(name) or name == HEADER)
            ]
            if others:
                raise StoreMismatchError(
                    "a new store begins in an empty folder", actual=f"{others[:3]}", where=storage.url
                )
            require_create_once(storage)
            if storage.create(HEADER, seal(head)):
                return cls(storage, head, None)
            stored = storage.read(HEADER)
        committed = manifest.find(storage)  # it counts where there is one, as an extension changes what store.json said
        copied = committed is None and read_or_none(storage, naming.twin(MANIFEST)) is not None
        if copied and next(storage.listing("receipts"), None) is None:
            manifest.load(storage)  # raises: to label everything again would be a dear way to restore one file
        found = committed or unseal(stored, where=f"{storage.url}/{HEADER}")
        manifest.require_same(found, head, where=storage.url)
        manifest.warn_of_libraries(found["libraries"], where=storage.url)
        return cls(storage, found, committed)

    @classmethod
    def extend(
        cls,
        url: str,
        *,
        spec: StoreSpec,
        location: str | tuple[str, ...],
        kind: str,
        views_per_image: int,
        first_view: int = 0,
        names: Sequence[str],
        libraries: dict[str, str] | None = None,
    ) -> LabelStore:
        """A committed store to add views or image shards to, filled like a new one; one already extended so, committed.

        Its `units` are the new ones. Files that are there stay as they are.

        Args:
            names: of all image shards in order, the former ones first.

        Raises StoreMismatchError, naming the field, for what an extension cannot change, for fewer views or other
        image shards than there are, and for another extension than the one under way.
        """
        storage = open_storage(url)
        base = manifest.load(storage)
        head = manifest.header(
            spec,
            location=location,
            kind=kind,
            views_per_image=views_per_image,
            first_view=first_view,
            made_with=libraries,
        )
        may_change = {
            "images": {**base["images"], "location": head["images"]["location"]},
            "views_per_image": max(views_per_image, base["views_per_image"]),
        }
        manifest.require_same({**base, **may_change}, head, where=storage.url)
        known = texts(base["image_shards"], "name")
        if list(names[: len(known)]) != known:
            raise StoreMismatchError(
                "an extension names the image shards of its store first, in their order, and new ones after them",
                actual=f"stored {known[:3]}..., asked {list(names[:3])}...",
                where=storage.url,
            )
        if (views_per_image, len(names)) == (base["views_per_image"], len(known)):
            return cls(storage, base, base)
        store = cls(storage, head, None, base)
        if store._sealed_list() is not None:
            store._require_list(names)
        manifest.warn_of_libraries(base["libraries"], where=storage.url)
        return store

    @classmethod
    def open(cls, url: str) -> LabelStore:
        """A committed store, to read. Reads the manifest alone.

        Raises StoreMissingError where there is none or labelling has not finished, StoreVersionError for a newer
        format, StoreDamagedError for a manifest that is not as it was written.
        """
        storage = open_storage(url)
        committed = manifest.load(storage)
        manifest.warn_of_libraries(committed["libraries"], where=storage.url)
        return cls(storage, committed, committed)

    # -- images ---------------------------------------------------------------------------------------------------

    def indexed_shards(self) -> set[int]:
        """Numbers of the image shards that have an index."""
        if self._known_images() is not None:
            return set(range(len(self.images)))
        if self._base is not None:  # what an extension that was given up left behind is no index
            return set(range(len(self._base["image_shards"])))
        return set(_numbers(name for name, _ in self.storage.listing("index")))

    def write_index(
        self,
        shard: int,
        *,
        name: str,
        size_bytes: int | None,
        ids: Sequence[str],
        labels: Sequence[int | None],
        offsets: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Writes the index of one image shard: where each image lies in it, in order.

        Of a committed store, again. Raises StoreMismatchError where that gives other bytes than the manifest's; nothing
        is replaced then.
        """
        wanted = None
        if self._known_images() is not None:
            if self.manifest is None or shard >= len(self.images):
                raise StoreError("images are indexed before the first unit", where=self.url)
            wanted = self.images[shard].sha256
        about = {"fingerprint": self.spec.fingerprint, "name": name, "shard": shard, "size_bytes": size_bytes}
        with self.storage.replacing(naming.index_name(shard)) as out:
            arrow.write_index(out, about, (ids, labels, offsets, lengths), self.spec.unit_images)
            _require_sha256(out.sha256, wanted, where=f"{self.url}/{naming.index_name(shard)}")

    def finish_index(self, names: Sequence[str] | None = None) -> None:
        """Seals the list of image shards: all of them are indexed. Does nothing if it is sealed already.

        Args:
            names: of the image shards, in order, where they are known.

        Raises StoreMismatchError for image shards that are not the ones that were indexed.
        """
        if self._known_images() is None:
            shards: list[IndexedShard] = []
            numbers = sorted(self.indexed_shards())
            if self._base is not None:
                assert names is not None, "an extension names its image shards"
                shards = [IndexedShard(**shard) for shard in self._base["image_shards"]]
                numbers = list(range(len(names)))
                self.storage.remove_folder("receipts")  # of units of an extension that was given up, or left behind
            if numbers != list(range(len(numbers))):
                raise StoreError("every image shard is indexed", actual=f"{numbers[:8]}", where=self.url)
            for number in numbers[len(shards) :]:
                data = self.storage.read(naming.index_name(number))
                table, about = arrow.read_index(data, where=f"{self.url}/{naming.index_name(number)}")
                shards.append(
                    IndexedShard(
                        name=about["name"],
                        size_bytes=about["size_bytes"],
                        num_images=table.num_rows,
                        sha256=hashlib.sha256(data).hexdigest(),
                    )
                )
            _require_names(shards, names, where=self.url)
            record = {"shards": [dataclasses.asdict(shard) for shard in shards]}
            self.storage.create(self._list_name, seal(record if self._base is None else {**self._head, **record}))
        self._require_list(names)

    @property
    def images(self) -> Sequence[IndexedShard]:
        """The image shards, in order of their numbers. Raises StoreMissingError before `finish_index`."""
        known = self._known_images()
        if known is None:
            raise StoreMissingError(
                "images are indexed before units are planned", where=self.url, fix="run the same label command again"
            )
        return known

    @property
    def shard_names(self) -> list[str]:
        """The names of the image shards, in order of their numbers. Raises like `images`."""
        if self.manifest is not None:
            return texts(self.manifest["image_shards"], "name")
        return [shard.name for shard in self.images]

    def read_index(self, unit: Unit) -> tuple[list[str], list[int | None], list[int], list[int]]:
        """(ids, labels, offsets, lengths) of the images of a unit, in order.

        Raises StoreDamagedError where the index is not as it was written.
        """
        table = self._index_table(unit.shard).slice(unit.start, unit.stop - unit.start)
        ids, labels, offsets, lengths = (column.to_pylist() for column in table.columns)
        return ids, labels, offsets, lengths

    def image_ids(self, shard: int) -> list[str]:
        """The ids of the images of an image shard, in order."""
        return self._index_table(shard)["image_id"].to_pylist()

    def image_labels(self, shard: int) -> np.ndarray:
        """The ground truth of the images of an image shard, in order, int64; -1 where there is none."""
        return self._index_table(shard)["label"].fill_null(-1).to_numpy().astype(np.int64)

    def find(self, image_id: str) -> list[Unit]:
        """The units that cover an image, by rising views; none where no index names it."""
        for shard in range(len(self.images)):
            row = pc.index(self._index_table(shard)["image_id"], image_id).as_py()
            if row >= 0:
                return [unit for unit in self.units() if unit.shard == shard and unit.start <= row < unit.stop]
        return []

    # -- labelling ------------------------------------------------------------------------------------------------

    def units(self) -> Sequence[Unit]:
        """All units, by number; of a store that is being extended, the new ones."""
        if self._units is None:
            if self.manifest is not None:
                self._units = mapped(self.manifest["units"], _unit)
            else:
                self._units = manifest.plan_units(
                    [shard.num_images for shard in self.images],
                    views=(self.first_view, self.first_view + self.views_per_image),
                    unit_images=self.spec.unit_images,
                    unit_views=self.spec.unit_views,
                    base=self._base,
                )
        return self._units

    def receipts(self) -> Iterator[Receipt]:
        """The receipts of finished units, by number; none after the commit, which folds them into the manifest."""
        units = self.units()
        return (self._receipt(units[int(i)].number) for i in np.flatnonzero(self.finished_units()))

    def finished_units(self) -> np.ndarray:
        """bool [U]: which of `units` are finished; none after the commit. Memory: a byte a unit.

        What was left behind by an extension that was given up is of no unit.
        """
        units = self.units()
        first = units[0].number if len(units) else 0
        finished = np.zeros(len(units), dtype=bool)
        for number in _numbers(name for name, _ in self.storage.listing("receipts")):
            if 0 <= number - first < len(units):
                finished[number - first] = True
        return finished

    def write_unit(
        self,
        unit: Unit,
        rows: Iterable[LabelRows],
        *,
        bad: Sequence[tuple[str, str]] = (),
        image_bytes: ImageBytes | None = None,
    ) -> Receipt:
        """Writes and acknowledges the label shard of a unit; memory is bounded by one part of `rows` and one batch.

        Args:
            rows: image after image in the order of the index, each with all views of the unit, rising.
            bad: (image id, reason) of the images left out. It is read after `rows` has ended, so that a generator
                may fill it.
            image_bytes: gives the images, where the store's format keeps them beside the labels.

        Returns the receipt; where the unit is finished already, the stored one, and `rows` is not read.
        Raises StoreError for rows that are not those of the unit. Nothing is published then.
        """
        if self.manifest is not None:
            raise StoreError(
                "a committed store does not change", where=self.url, fix="`kddata extend` adds views or images to it"
            )
        name = naming.receipt_name(unit.number)
        if read_or_none(self.storage, name) is not None:
            return self._receipt(unit.number)
        try:
            receipt = self._write_labels(unit, rows, bad, image_bytes)
        except _FinishedMeanwhileError:
            return self._receipt(unit.number)
        if not self.storage.create(name, manifest.receipt_bytes(receipt)):
            return self._receipt(unit.number)
        if self._is_committed_elsewhere():
            self.storage.remove(name)  # it came too late for the manifest, and is of a shard that is in it
        return receipt

    def restore_unit(
        self,
        unit: Unit,
        rows: Iterable[LabelRows],
        *,
        bad: Sequence[tuple[str, str]] = (),
        image_bytes: ImageBytes | None = None,
    ) -> Receipt:
        """Writes the label shard of a committed unit again; the arguments are those of `write_unit`.

        Raises StoreMismatchError where that gives other bytes than the manifest's. Nothing is replaced then.
        """
        wanted = self._committed["units"][unit.number]["sha256"]
        return self._write_labels(unit, rows, bad, image_bytes, wanted=wanted)

    def _write_labels(
        self,
        unit: Unit,
        rows: Iterable[LabelRows],
        bad: Sequence[tuple[str, str]],
        image_bytes: ImageBytes | None,
        *,
        wanted: str | None = None,
    ) -> Receipt:
        """Publishes the label shard of a unit, if it has the wanted SHA-256."""
        tally = Tally(unit, where=f"unit {unit.number} of {self.url}")
        batches = tally.watch(columns.rebatch(rows, columns.batch_rows(self.spec, unit.num_views)))
        name = naming.labels_name(unit.number, self.spec.format)
        with self.storage.replacing(name) as out:
            formats.write_labels(out, self.spec, unit, batches, on_stored=tally.count, image_bytes=image_bytes)
            tally.close(bad)
            _require_sha256(out.sha256, wanted, where=f"{self.url}/{name}")
            if wanted is None:
                self._require_unfinished(unit)
        return Receipt(
            unit=unit.number,
            fingerprint=self.spec.fingerprint,
            rows=tally.rows,
            bytes=out.num_bytes,
            sha256=out.sha256,
            images=tally.images,
            bad=tuple((str(image_id), str(reason)) for image_id, reason in bad),
            correct=tally.correct,
            labelled=tally.labelled,
            entropy_sum=tally.entropy_sum,
            tail_sum=tally.tail_sum,
        )

    def _require_unfinished(self, unit: Unit) -> None:
        """Raises where another has finished a unit, or the store, while this process slept: its shard stays then."""
        self._require_uncommitted()
        if read_or_none(self.storage, naming.receipt_name(unit.number)) is not None:
            raise _FinishedMeanwhileError

    def _require_uncommitted(self) -> None:
        if self._is_committed_elsewhere():
            raise StoreBusyError(
                "a store has one driver",
                actual="another driver has finished it meanwhile",
                where=self.url,
                fix="nothing is lost; the same command says that it is finished",
            )

    def _is_committed_elsewhere(self) -> bool:
        return read_or_none(self.storage, naming.manifest_name(self._generation)) is not None

    @property
    def _generation(self) -> int:
        """Of the manifest that this store is to be committed by."""
        return 1 if self._base is None else self._base["generation"] + 1

    def commit(self) -> dict[str, Any]:
        """Publishes the manifest, removes what it replaces, and returns it. Calling it again does nothing more.

        Raises StoreMissingError unless every unit is finished, and StoreDamagedError where a finished shard is gone.
        """
        if self.manifest is None:
            if not self._is_committed_elsewhere():
                manifest.publish(self.storage, self._fold())
            self.manifest = manifest.load(self.storage)
            self._units = self._images = self._base = None
        self.storage.remove(naming.extension_name(self.manifest["generation"]))
        self.storage.remove_folder("receipts")
        left = [name for name, _ in self.storage.listing() if TEMPORARY.search(name)]  # by writers that died
        for name in left:
            self.storage.remove(name)
        return self.manifest

    def leftovers(self) -> list[str]:
        """Files that a driver leaves behind when it dies after the commit; `commit` removes them.

        None while an extension is under way: they are its own.
        """
        generation = self._committed["generation"]
        if read_or_none(self.storage, naming.extension_name(generation + 1)) is not None:
            return []
        passing = (TEMPORARY, LOCK, re.compile("^receipts/"), re.compile(f"^{naming.extension_name(generation)}$"))
        return sorted(name for name, _ in self.storage.listing() if any(pattern.search(name) for pattern in passing))

    def _fold(self) -> dict[str, Any]:
        units, finished = self.units(), self.finished_units()
        if not finished.all():
            missing = np.flatnonzero(~finished)
            raise StoreMissingError(
                "a store is committed when every unit is finished",
                actual=f"{len(missing)} of {len(units)} are not, the first is {units[int(missing[0])].number}",
                where=self.url,
                fix="run the same label command again; finished units are kept",
            )
        records = (HEADER, IMAGES) if self._base is None else (naming.manifest_name(self._base["generation"]),)
        files = {name: hashlib.sha256(self.storage.read(name)).hexdigest() for name in records}
        return fold(
            self.storage,
            self._head,
            self.images,
            units,
            self._sound_receipts(units),
            files=files,
            base=self._base,
            before_publishing=self._require_uncommitted,
        )

    def _sound_receipts(self, units: Sequence[Unit]) -> Iterator[Receipt]:
        """The receipts of units, by number. Raises StoreDamagedError for a label shard of another size than its own."""
        first = units[0].number if len(units) else 0
        there = np.full(len(units), -1, dtype=np.int64)  # bytes of each label shard
        for name, num_bytes in self.storage.listing("labels"):
            for number in _numbers([name]):
                if 0 <= number - first < len(units) and name == naming.labels_name(number, self.spec.format):
                    there[number - first] = num_bytes
        for found, receipt in zip(there.tolist(), self.receipts(), strict=True):
            if found != receipt.bytes:
                raise StoreDamagedError(
                    f"a finished label shard has {receipt.bytes} bytes",
                    actual=found if found >= 0 else "no file",
                    where=f"{self.url}/{naming.labels_name(receipt.unit, self.spec.format)}",
                    fix=f"remove {naming.receipt_name(receipt.unit)} and run the same label command again",
                )
            yield receipt

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def rows_per_unit(self) -> np.ndarray:
        """How many rows each unit holds, int64 [U]."""
        return numbers(self._committed["units"], "rows")

    @property
    def views_per_unit(self) -> np.ndarray:
        """How many views of each of its images a unit holds, int64 [U]."""
        units = self._committed["units"]
        return numbers(units, "view_stop") - numbers(units, "view_start")

    @property
    def num_rows(self) -> int:
        """How many rows all units hold."""
        return self._committed["totals"]["rows"]

    def read(self, unit: int, *, verify: bool = True, outputs: Sequence[str] | None = None) -> LabelRows:
        """The rows of a unit, after checking that the file has the bytes that were written.

        Args:
            outputs: names of those that the rows are to have; None for all.

        Raises StoreDamagedError, naming the file, for a shard that is missing or has other bytes.
        """
        entry = self._committed["units"][unit]
        where = f"{self.url}/{entry['file']}"
        data = read_checked(self.storage, entry["file"], entry["sha256"] if verify else None)
        rows = formats.read_labels(data, self.spec, unit, where=where, outputs=outputs)
        if len(rows) != entry["rows"]:
            raise StoreDamagedError(f"this shard has {entry['rows']} rows", actual=len(rows), where=where)
        return rows

    def verify(self) -> list[Problem]:
        """What is not as it was written, over all files; see `kddata.store.verify`."""
        return find_problems(self.storage)

    def info(self) -> dict[str, Any]:
        """What the store is and holds, as plain values: for people, and for `--json`."""
        totals = self._committed["totals"]
        rows = max(1, totals["rows"])
        return {
            "url": self.url,
            "fingerprint": self.spec.fingerprint,
            "spec": self.spec.to_json(),
            "images": {"location": self.location, "kind": self.kind, "shards": len(self.images)},
            "first_view": self.first_view,
            "views_per_image": self.views_per_image,
            "generation": self._committed["generation"],
            "libraries": self._committed["libraries"],
            **{key: totals[key] for key in ("units", "rows", "bytes", "bad_images", "correct", "labelled")},
            "labelled_images": totals["images"],
            "bytes_per_view": totals["bytes"] / rows,
            "teacher_accuracy": totals["correct"] / totals["labelled"] if totals["labelled"] else None,
            "mean_entropy_nats": totals["entropy_sum"] / rows,
            "mean_tail_mass": totals["tail_sum"] / rows,
            "bad": self._committed["bad"],
        }

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _committed(self) -> dict[str, Any]:
        if self.manifest is None:
            raise StoreMissingError(
                "a store is read when its labelling has finished",
                where=self.url,
                fix="run the same label command again; finished units are kept",
            )
        return self.manifest

    def _known_images(self) -> Sequence[IndexedShard] | None:
        if self._images is None:
            if self.manifest is not None:
                shards = self.manifest["image_shards"]
            else:
                record = self._sealed_list()
                if record is None:
                    return None
                shards = record["shards"]
            self._images = mapped(shards, _indexed_shard)
        return self._images

    @property
    def _list_name(self) -> str:
        """The record of the image shards; an extension's also says what it was asked for."""
        return IMAGES if self._base is None else naming.extension_name(self._base["generation"] + 1)

    def _sealed_list(self) -> dict[str, Any] | None:
        data = read_or_none(self.storage, self._list_name)
        return None if data is None else unseal(data, where=f"{self.url}/{self._list_name}")

    def _require_list(self, names: Sequence[str] | None) -> None:
        """Raises StoreMismatchError unless the sealed image shards, and an extension under way, are these."""
        where = f"{self.url}/{self._list_name}"
        if self._base is not None:
            record = self._sealed_list()
            assert record is not None
            manifest.require_same(record, self._head, where=where)
        _require_names(self.images, names, where=where)

    def _index_table(self, shard: int) -> pa.Table:
        """The index of an image shard; the last one used is kept, as units are worked on in order."""
        if self._index is None or self._index[0] != shard:
            name = naming.index_name(shard)
            data = read_checked(self.storage, name, self.images[shard].sha256)
            self._index = shard, arrow.read_index(data, where=f"{self.url}/{name}")[0]
        return self._index[1]

    def _receipt(self, unit: int) -> Receipt:
        name = naming.receipt_name(unit)
        data = self.storage.read(name)
        return manifest.parse_receipt(data, unit=unit, fingerprint=self.spec.fingerprint, where=f"{self.url}/{name}")


def _unit(entry: dict[str, Any]) -> Unit:
    return Unit(**{name: entry[name] for name in _UNIT_FIELDS})


def _indexed_shard(entry: dict[str, Any]) -> IndexedShard:
    return IndexedShard(**entry)


class _FinishedMeanwhileError(Exception):
    """Another writer has finished a unit first."""


def _require_sha256(found: str, wanted: str | None, *, where: str) -> None:
    if wanted not in (None, found):
        raise StoreMismatchError(
            "a file of a store is replaced by the same bytes alone",
            actual=f"SHA-256 {found[:12]}... for {str(wanted)[:12]}...",
            where=where,
            fix="use the images, the machine kind and the library versions that the store was made with (nothing was "
            "changed); a compact store that came from an exact one was rounded twice: convert that one again",
        )


def _require_names(shards: Sequence[IndexedShard], names: Sequence[str] | None, *, where: str) -> None:
    stored = [shard.name for shard in shards]
    if names is None or stored == list(names):
        return
    differing = next((i for i, pair in enumerate(zip(stored, names, strict=False)) if pair[0] != pair[1]), None)
    actual = f"stored {len(stored)} shards, asked {len(names)}"
    if differing is not None:
        actual += f"; number {differing}: stored {stored[differing]!r}, asked {names[differing]!r}"
    raise StoreMismatchError(
        "a store keeps the image shards it was begun with", actual=actual, where=where, fix="name another store"
    )


def _numbers(names: Iterable[str]) -> Iterator[int]:
    """Of files named by a number, such as labels/000012.arrow; temporary files have none."""
    return (int(match[1]) for name in names if (match := re.search(r"/(\d+)\.(?:arrow|json|tar)$", name)))
