"""Converted stores: lossless between formats, rounded only where asked, resumed like labelling."""

import dataclasses
import uuid

import pytest

from kddata import errors
from kddata.care import convert
from kddata.reader import open_images
from kddata.store import LabelStore, naming
from kddata.testing import begin_small_store, made_up_rows, make_store, small_spec, small_store
from kddata.views import ViewPlan


def _url():
    return f"memory://convert/{uuid.uuid4().hex}"


def _contents(store):
    return {name: store.storage.read(name) for name in store.storage.sizes()}


def _extended(spec):
    """A store of two generations: more views, then one more image shard."""
    store = small_store(_url(), spec=spec, images=(6, 3), views_per_image=2)
    names = ["00000.tar", "00001.tar", "00002.tar"]
    again = LabelStore.extend(store.url, spec=spec, location="made up", kind="tar", views_per_image=3, names=names)
    again.write_index(2, name=names[2], size_bytes=None, ids=["new"], labels=[1], offsets=[0], lengths=[9])
    again.finish_index(names)
    for unit in again.units():
        again.write_unit(unit, [made_up_rows(again, unit)])
    again.commit()
    return again


SPECS = [
    dataclasses.replace(small_spec(), codec=codec, plan=plan)
    for codec in ("exact", "compact")
    for plan in (ViewPlan(), ViewPlan(policy="color", mix="mixup"))
]


@pytest.mark.parametrize("make", [lambda spec: small_store(_url(), spec=spec), _extended], ids=["one", "extended"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.codec}-{spec.plan.mix}")
def test_arrow_to_tar_and_back_gives_every_file_byte_for_byte(spec, make):
    store = make(spec)
    there = convert(store, _url(), format="tar")
    assert there.spec == dataclasses.replace(spec, format="tar")
    assert there.verify() == []
    assert {name.rpartition(".")[2] for name in there.storage.sizes("labels")} == {"tar"}
    back = convert(LabelStore.open(there.url), _url(), format="arrow")
    assert _contents(back) == _contents(store)


def test_images_go_beside_the_labels_and_away_again(tmp_path):
    store = make_store(tmp_path, num_images=5, format="arrow")
    beside = convert(store, str(tmp_path / "beside"), format="tar+images")
    source = open_images(store)
    for unit in store.units():
        rows, shard = store.read(unit.number), beside.storage.read(naming.labels_name(unit.number, "tar"))
        for _, data in source.stream(store.images[unit.shard].name, source.scan(store.images[unit.shard].name)[1]):
            assert data in shard or unit.start > 0 or len(rows) < len(store.image_ids(unit.shard))
    assert _contents(convert(beside, str(tmp_path / "back"), format="arrow")) == _contents(store)
    labelled_so = make_store(tmp_path / "directly", num_images=5, format="tar+images")
    names = labelled_so.storage.sizes("labels")
    assert [beside.storage.read(name)[1024:] for name in names] == [
        labelled_so.storage.read(name)[1024:] for name in names
    ], "labelling into a format gives what a conversion gives"


def test_bad_images_and_library_versions_stay_known():
    store = begin_small_store(_url())
    broken = "0/bild-\u00e9-1"
    for unit in store.units():
        bad = [(broken, "truncated")] if broken in store.read_index(unit)[0] else []
        store.write_unit(unit, [made_up_rows(store, unit, leave_out=(broken,))], bad=bad)
    store.commit()
    old = {**store.manifest["libraries"], "torchvision": "0.1"}
    store.manifest["libraries"] = old
    converted = convert(store, _url(), format="tar")
    assert converted.manifest["bad"] == [[broken, "truncated"]]
    assert converted.manifest["totals"]["images"] == store.manifest["totals"]["images"]
    assert converted.manifest["libraries"] == old, "pixels are as those versions made them"


def test_a_stopped_conversion_goes_on_and_a_finished_one_does_nothing():
    store = _extended(small_spec())
    whole = _contents(convert(store, _url(), format="tar"))
    for stop in range(1, 12):
        out, seen = _url(), []

        def die(receipt, stop=stop, seen=seen):
            seen.append(receipt.unit)
            if len(seen) == stop:
                raise KeyboardInterrupt

        try:
            convert(store, out, format="tar", on_receipt=die)
        except KeyboardInterrupt:
            convert(store, out, format="tar", on_receipt=lambda receipt, seen=seen: seen.append(receipt.unit))
        assert sorted(seen) == list(range(len(store.units()))), "each unit is written once"
        assert _contents(LabelStore.open(out)) == whole
        convert(store, out, format="tar", on_receipt=lambda receipt: pytest.fail("a finished conversion wrote"))


def test_exact_becomes_compact_and_never_the_other_way():
    exact = small_store(_url())
    labelled_so = small_store(_url(), spec=dataclasses.replace(small_spec(), codec="compact"))
    compact = convert(exact, _url(), codec="compact")
    for unit in exact.units():
        one, other = compact.read(unit.number).labels, labelled_so.read(unit.number).labels
        assert one.ids_BK.tolist() == other.ids_BK.tolist()
        assert float((one.log_p_BK - other.log_p_BK).abs().max()) < 0.8, "a float16 may round to the next step"
    with pytest.raises(errors.ConfigError, match=r"as the teacher gave them; got a compact store.*label again"):
        convert(compact, _url(), codec="exact")
    with pytest.raises(errors.ConfigError, match=r"changes the format or the codec; got arrow and exact again"):
        convert(exact, _url())


def test_what_lies_there_already_is_left_alone():
    store, other = small_store(_url()), small_store(_url(), views_per_image=2)
    before = _contents(other)
    with pytest.raises(errors.StoreMismatchError, match="format: stored 'arrow', asked 'tar'"):
        convert(store, other.url, format="tar")
    assert _contents(other) == before


def test_a_damaged_store_is_not_converted():
    store = small_store(_url())
    with store.storage.replacing("labels/000002.arrow") as out:
        out.write(store.storage.read("labels/000001.arrow"))
    target = _url()
    with pytest.raises(errors.StoreDamagedError, match=r"000002\.arrow"):
        convert(store, target, format="tar")
    with pytest.raises(errors.StoreMissingError):
        LabelStore.open(target)
