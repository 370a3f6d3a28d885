"""Job files: the shipped examples, overrides, what is refused and in which words, and the plain jobs they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from kddata.config import (
    EvaluateFile,
    LabelFile,
    SweepFile,
    TeachFile,
    TrainFile,
    label_job,
    load,
    sweep_trials,
    teaching_job,
    train_job,
)
from kddata.config.reading import Section
from kddata.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
EXAMPLES = [("label.yaml", LabelFile), ("train.yaml", TrainFile), ("teach.yaml", TeachFile), ("sweep.yaml", SweepFile)]
EXAMPLES += [("evaluate.yaml", EvaluateFile)]
LABEL: dict[str, Any] = {
    "images": "a/{00..03}.tar",
    "store": "out",
    "teacher": {"arch": "torchvision:resnet18", "weights": "w.safetensors", "num_classes": 10, "size_px": 32},
    "labels": {"k": 3},
}
TRAIN: dict[str, Any] = {
    "store": "out",
    "student": {"arch": "torchvision:resnet18", "num_classes": 10},
    "method": {"name": "kd", "temperature": 4},
    "data": {"batch_size": 8, "size_px": 32},
    "optimizer": {"lr": 0.1, "epochs": 2},
    "run": {"name": "s1"},
}


@pytest.fixture
def write(tmp_path: Path):
    def to_file(data: Any) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return path

    return to_file


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_job(path: Path) -> None:
    if path.name.startswith("label"):
        job = label_job(load(LabelFile, path))
        assert job.teacher.num_classes == 1000
    elif path.name.startswith("teach"):
        assert teaching_job(load(TeachFile, path)).network.num_classes == 100
    elif path.name.startswith("evaluate"):
        assert load(EvaluateFile, path).views == 10_000
    elif path.name.startswith("sweep"):
        assert len(sweep_trials(load(SweepFile, path))) == 12
    else:
        run = "tl-kd" if path.name == "transfer.yaml" else "shufflenet-kd"
        assert train_job(load(TrainFile, path)).run.endswith(f"/runs/{run}")


@pytest.mark.parametrize(("name", "kind"), EXAMPLES)
def test_the_full_examples_show_every_key(name: str, kind: type[BaseModel]) -> None:
    def check(model: type[BaseModel], data: dict[str, Any], where: str) -> None:
        assert set(data) == set(model.model_fields), where
        for key, value in data.items():
            if isinstance(value, dict) and key not in ("method", "grid"):
                (section,) = [
                    one
                    for one in (model.model_fields[key].annotation, *get_args(model.model_fields[key].annotation))
                    if isinstance(one, type) and issubclass(one, BaseModel)
                ]
                check(section, value, f"{where}.{key}")

    check(kind, yaml.safe_load((CONFIGS / name).read_text()), name)


@pytest.mark.parametrize(("name", "kind"), EXAMPLES)
def test_what_the_full_examples_call_a_default_is_one(write, name: str, kind: type[Section]) -> None:
    lines = (CONFIGS / name).read_text().splitlines()
    short = yaml.safe_load("\n".join(line for line in lines if "# default" not in line))
    assert len([line for line in lines if "# default" in line]) >= 4
    assert load(kind, write({key: value for key, value in short.items() if value})) == load(kind, CONFIGS / name)


def test_overrides_have_dotted_keys_and_yaml_values(write) -> None:
    overrides = [
        "labels.k=5",
        "labels.temperatures=[1, 4]",
        "views.area=[1e-1, 1]",
        "store=s3://b/x=y",
        "units.views=2",
    ]
    file = load(LabelFile, write(LABEL), overrides)
    assert (file.labels.k, file.labels.temperatures, file.views.area) == (5, (1.0, 4.0), (0.1, 1.0))
    assert (file.store, file.units.views) == ("s3://b/x=y", 2)
    assert load(LabelFile, write(LABEL), ["units.views=2", "units.views=null"]).units.views is None


def test_a_number_with_an_exponent_is_a_number(write) -> None:
    file = load(TrainFile, write(TRAIN), ["optimizer.weight_decay=1e-4", "optimizer.lr=5E-2"])
    assert (file.optimizer.weight_decay, file.optimizer.lr) == (1e-4, 0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["veiws.per_image=2"], "veiws: no such key; the nearest is views"),
        (["views.flip=0.5"], "views.flip: no such key; the nearest is views.flip_p"),
        (["num_classes=10"], "num_classes: no such key; the nearest is teacher.num_classes"),
        (["k=10"], "k: no such key; the nearest is labels.k"),
        (["zzz=1"], "zzz: no such key; known are images, store, teacher, views"),
        (["labels.codec=tiny"], "labels.codec: input should be 'exact'"),
        (["labels.k='10'"], "labels.k: input should be a valid integer; got '10'"),
        (["labels.k=true"], "labels.k: input should be a valid integer; got True"),
        (["labels.k=0"], "labels.k: input should be greater than or equal to 1; got 0"),
        (["labels.temperatures=[.inf]"], "labels.temperatures.0: input should be a finite number"),
        (["limits.bad_images=2"], "limits.bad_images: input should be less than or equal to 1; got 2"),
        (["teacher.mean=[0, 0]"], "teacher.mean.2: missing"),
        (["teacher=resnet"], "teacher: input should be a section of keys with values; got 'resnet'"),
        (["labels=null"], "labels: input should be a section of keys with values; got None"),
        (["labels.temperatures=4"], "labels.temperatures: input should be a list in brackets, as in [a, b]; got 4"),
        (
            ["images=3"],
            "1 fault:\n  images: input should be a valid string or a list in brackets, as in [a, b]; got 3\n",
        ),
        (
            ["views.policy=colour"],
            "views.policy: input should be 'none', 'center', 'color' or 'randaugment'; got 'colour'",
        ),
        (["views.mix=true"], "views.mix: input should be 'none', 'mixup' or 'cutmix'; got True"),
        (["views.mixup=1"], "views.mixup: no such key; the nearest is views.mix"),
        (["labels.k=[1"], "a job file and its overrides are YAML"),
        (["labels.k"], "an override is key=value"),
        (["store.x=1"], "an override goes into a mapping; got store: 'out'"),
        (["store.x=1"], "Next: replace the whole of store, as store=VALUE."),
        (["store.x.y=1"], "Next: replace the whole of store, as store=VALUE."),
        (["views.crop_area=[0.5, 1]"], "views.crop_area: no such key; the nearest is views.area"),
        (["unit.images=10"], "unit: no such key; the nearest is units"),
    ],
)
def test_a_wrong_label_file_is_refused_in_words(write, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(LabelFile, write(LABEL), overrides)
    assert message in str(caught.value)


def test_the_job_file_of_another_command_is_told_so(write) -> None:
    for kind, data, told in ((TrainFile, LABEL, True), (LabelFile, TRAIN, True), (LabelFile, {"imagez": "x"}, False)):
        with pytest.raises(ConfigError) as caught:
            load(kind, write(data))
        assert ("the job file of another command" in str(caught.value)) == told, str(caught.value)


def test_every_fault_is_listed_with_the_file(write) -> None:
    path = write({**LABEL, "labels": {}, "veiws": {}, "cluster": {"teachers": 0}})
    with pytest.raises(ConfigError) as caught:
        load(LabelFile, path)
    text = str(caught.value)
    assert "3 faults" in text
    assert all(part in text for part in ("labels.k: missing", "veiws", "cluster.teachers", str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "a job file is a mapping of keys to values; got list"),
        ("", "a job file is a mapping of keys to values; got NoneType"),
        ("a: 1\na: 2\n", "the key 'a' twice"),
        ("x: {k: 1, k: 2}\n", "the key 'k' twice"),
        ("a: [1\n", "a job file and its overrides are YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("? [a, b]\n: 1\n", "a job file and its overrides are YAML"),
        ("images: 2024-01-01\n", "store: missing"),
    ],
)
def test_text_that_is_no_job_file(write, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(LabelFile, write(text))
    assert message in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a job file can be read; got .*No such file.*nowhere\.yaml"):
        load(LabelFile, tmp_path / "nowhere.yaml")


def test_a_label_job_has_every_value_and_absolute_paths(write, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    overrides = ["images=[a.tar, s3://b/c.tar]", "views={per_image: 2, seed: 7, flip_p: 0}"]
    overrides += ["teacher.class_names=names.txt", "units={images: 5, views: 1}"]
    overrides += ["limits={bad_images: 0.5, pixels: 9}", "cluster.threads_per_teacher=2"]
    job = label_job(load(LabelFile, write(LABEL), overrides))
    assert job.images == (f"{tmp_path}/a.tar", "s3://b/c.tar")
    assert (job.store, job.teacher.weights) == (f"{tmp_path}/out", f"{tmp_path}/w.safetensors")
    assert job.teacher.class_names is not None
    assert job.teacher.class_names[9] == "class 9"
    assert (job.plan.seed, job.plan.flip_p, job.plan.center_px, job.views_per_image) == (7, 0.0, None, 2)
    assert (job.unit_images, job.unit_views, job.bad_images, job.max_pixels, job.threads) == (5, 1, 0.5, 9, 2)


def test_ops_and_mixes_reach_the_plan(write) -> None:
    job = label_job(load(LabelFile, write(LABEL), ["views={policy: randaugment, erase_p: 0.25, mix: cutmix}"]))
    assert (job.plan.policy, job.plan.erase_p, job.plan.mix) == ("randaugment", 0.25, "cutmix")
    with pytest.raises(ConfigError, match="the view of policy center is whole and unmixed; got erase_p 0, mix mixup"):
        label_job(load(LabelFile, write(LABEL), ["views={policy: center, mix: mixup}"]))


def test_a_folder_of_a_hugging_face_model_becomes_absolute(write, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "vit").mkdir()
    monkeypatch.chdir(tmp_path)
    for arch, wanted in (
        ("hf:vit", f"hf:{tmp_path}/vit"),
        ("hf:google/vit", "hf:google/vit"),
        ("timm:vit", "timm:vit"),
    ):
        job = label_job(load(LabelFile, write(LABEL), [f"teacher.arch={arch}", "teacher.dtype=bfloat16"]))
        assert (job.teacher.arch, job.teacher.dtype) == (wanted, "bfloat16")
        assert train_job(load(TrainFile, write(TRAIN), [f"student.arch={arch}"])).student.arch == wanted


def test_policy_center_takes_the_size_of_the_teacher(write) -> None:
    job = label_job(load(LabelFile, write(LABEL), ["views={policy: center, interpolation: bicubic}"]))
    assert (job.plan.center_px, job.plan.interpolation) == (32, "bicubic")


def test_a_class_list_that_is_not_there(write) -> None:
    with pytest.raises(ConfigError, match=r"a class list is a text file, one name a line; got .*No such file"):
        label_job(load(LabelFile, write(LABEL), ["teacher.class_names=nowhere.txt"]))


def test_a_train_job_has_every_value_and_absolute_paths(write, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["evaluate.images=val.tar", "images=moved", "run.storage=r/", "run.checkpoint_steps=5"]
    job = train_job(load(TrainFile, write(TRAIN), overrides))
    assert (job.store, job.images, job.run) == (f"{tmp_path}/out", f"{tmp_path}/moved", f"{tmp_path}/r/s1")
    assert job.evaluate is not None
    assert (job.evaluate.images, job.checkpoint_steps) == (f"{tmp_path}/val.tar", 5)
    assert train_job(load(TrainFile, write(TRAIN), ["run.storage=s3://b/r"])).run == "s3://b/r/s1"


def test_a_classifier_named_by_a_term_becomes_absolute(write, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    term = "{name: srrl, classifier: t.safetensors, student_nodes: [layer4]}"
    job = train_job(load(TrainFile, write(TRAIN), [f"method={{name: sum, terms: [{term}]}}"]))
    assert job.method["terms"][0]["classifier"] == f"{tmp_path}/t.safetensors"


def test_a_first_stage_reaches_the_job(write, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage = "{method: {name: srrl, classifier: t.safetensors, student_nodes: [a]}, epochs: 3, lr: 0.5}"
    job = train_job(load(TrainFile, write(TRAIN), [f"first_stage={stage}"]))
    assert job.first_stage is not None
    assert job.first_stage.method["classifier"] == f"{tmp_path}/t.safetensors"
    assert (job.first_stage.epochs, job.first_stage.lr, job.first_stage.weight_decay) == (3, 0.5, 0.0)
    with pytest.raises(ConfigError, match=r"a method has a name.*first_stage.method"):
        train_job(load(TrainFile, write(TRAIN), ["first_stage={method: {}, epochs: 1}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.temprature=2"], "temperature"),
        (["method.name=kdd"], "perhaps kd was meant"),
        (["method={temperature: 2}"], "a method has a name"),
        (["optimizer.warmup_epochs=9"], "warm-up lies within"),
        (["data.subset=cats"], "1 fault:\n  data.subset: input should be a valid number or a list in brackets"),
        (["store=[{url: a, weigth: 1}]"], "\n  store.0.weigth: no such key"),
        (["optimizer.learning_rate=1"], "optimizer.learning_rate: no such key; known are name, lr, momentum"),
        (["run.name=a/b"], "run.name: string should match pattern"),
        (["run.name=../x"], "run.name: string should match pattern"),
        (["optimizer.name=adam"], "optimizer.name: input should be 'sgd' or 'adamw'"),
    ],
)
def test_a_wrong_train_file_is_refused_in_words(write, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_job(load(TrainFile, write(TRAIN), overrides))
    assert message in str(caught.value)
