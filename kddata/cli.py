"""The `kddata` command: a thin layer of arguments over the library. Results go to stdout, all else to stderr."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kddata import __version__, commands
from kddata.console import Bar, exit_code
from kddata.errors import ConfigError, StoreDamagedError

if TYPE_CHECKING:
    from kddata.care import Audit

EXIT_CODES = """
Exit codes: 0 done; 1 something unforeseen, with its traceback; 2 a job file or argument is wrong; 3 images are missing,
broken or ambiguous; 4 a teacher or student cannot be built, or answers with NaN; 5 a store cannot be used as asked, or
`verify` or `audit` found a fault; 6 too few CPUs or GPUs; 7 trials of a sweep failed; 130 ctrl-C; 143 SIGTERM. Stopped
commands go on where they were when they are given again.
"""

app = typer.Typer(
    name="kddata",
    help=f"Label once, distil many: soft labels that are stored, proven and reused.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

JobFile = Annotated[str, typer.Argument(metavar="FILE", help="a YAML job file; jobs/configs has examples")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="replaces values of the file")]
Store = Annotated[str, typer.Argument(metavar="STORE", help="path or URL of a store")]
Images = Annotated[str | None, typer.Option(help="where the images lie now, if they moved")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON value on stdout, for machines")]


def main() -> None:
    """Entry point of the console script."""
    app()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Adds a command whose errors for users become one message and a documented exit code."""
    assert function.__doc__ is not None
    first_line = function.__doc__.partition("\n")[0]  # whole, where typer would cut it for `kddata --help`

    @app.command(short_help=first_line)
    @functools.wraps(function)
    def guarded(**arguments: Any) -> None:
        raise typer.Exit(exit_code(lambda: function(**arguments)))

    return guarded


@app.callback(invoke_without_command=True)
def _about(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if version:
        commands.say(f"kddata {__version__}")
        raise typer.Exit


@command
def pack(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="tars, a folder, Parquet files; any URL")],
    out: Annotated[str, typer.Option(help="directory for the shards, new or empty")],
    shard_mb: Annotated[int, typer.Option(help="most megabytes of a shard")] = 256,
    shard_images: Annotated[int, typer.Option(help="most images of a shard")] = 10_000,
    short_side_px: Annotated[int | None, typer.Option(help="make larger images this small")] = None,
    image_column: Annotated[str | None, typer.Option(help="of Parquet files; found where there is one")] = None,
    label_column: Annotated[str | None, typer.Option(help="of Parquet files")] = None,
    id_column: Annotated[str | None, typer.Option(help="of Parquet files")] = None,
    threads: Annotated[int, typer.Option(help="that resize")] = 1,
    as_json: AsJson = False,
) -> None:
    """Turns any source of images into WebDataset tar shards of bounded size.

    \b
    kddata pack photos/ --out shards
    kddata pack 'train-{000..099}.parquet' --out s3://bucket/shards --short-side-px 256 --threads 8
    """
    import dataclasses

    from kddata.images import open_source
    from kddata.images import pack as pack_images

    source = open_source(
        images[0] if len(images) == 1 else images,
        image_column=image_column,
        label_column=label_column,
        id_column=id_column,
    )
    with Bar("packing", unit="images") as bar:
        packed = pack_images(
            source,
            out,
            max_shard_bytes=shard_mb * 1_000_000,
            max_shard_images=shard_images,
            short_side_px=short_side_px,
            threads=threads,
            on_image=bar.update,
        )
    if as_json:
        commands.say(json.dumps(dataclasses.asdict(packed)))
        return
    commands.say(
        f"{packed.url}: {packed.num_images:,} images in {packed.num_shards} shards, {packed.num_bytes:,} B, "
        f"{packed.num_resized:,} resized, {len(packed.unreadable)} unreadable"
    )
    for image_id, reason in packed.unreadable:
        commands.say(f"  {image_id}: {reason}")


@command
def label(file: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Labels images with a teacher into a store, on Ray; goes on where an earlier run stopped.

    \b
    kddata label jobs/configs/label.yaml
    kddata label jobs/configs/label.yaml store=out/labels8 views.per_image=8 'labels.temperatures=[1, 4]'
    """
    commands.label(file, overrides or (), as_json=as_json)


@command
def plan(
    file: JobFile,
    overrides: Overrides = None,
    passes: Annotated[int, typer.Option(help="how often a student will see each view")] = 1,
    probe_views: Annotated[int, typer.Option(help="that are labelled to measure speed and size")] = 512,
    as_json: AsJson = False,
) -> None:
    """Says what a label job will make and cost, before any machine is rented: units, bytes, hours, students to pay.

    Counts the images and labels a few of them, on this machine, into a temporary folder; the store is not touched.

    \b
    kddata plan jobs/configs/label.yaml
    kddata plan jobs/configs/label.yaml views.per_image=300 cluster.teachers=64 --passes 3
    """
    commands.plan(file, overrides or (), passes=passes, probe_views=probe_views, as_json=as_json)


@command
def extend(file: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Adds views, or image shards after the former ones, to a finished store; what is there stays byte for byte.

    Takes the job file that the store was labelled by, with a larger views.per_image or longer images; any other
    change is refused and named. Goes on where an earlier run stopped.

    \b
    kddata extend jobs/configs/label.yaml views.per_image=100
    kddata extend jobs/configs/label.yaml 'images=shards/{00000..00200}.tar'
    """
    commands.label(file, overrides or (), extend=True, as_json=as_json)


@command
def teach(file: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Trains or fine-tunes a teacher on labelled images, in this process on the CPU, before it labels a store.

    \b
    kddata teach jobs/configs/teach.yaml images=data/train.tar teacher.num_classes=100
    """
    commands.teach(file, overrides or (), as_json=as_json)


@command
def train(file: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Trains a student from a store, on Ray; the same run name goes on where an earlier run stopped.

    \b
    kddata train jobs/configs/train.yaml
    kddata train jobs/configs/train.yaml run.name=hard method='{name: hard}' cluster.workers=2
    """
    commands.train(file, overrides or (), as_json=as_json)


@command
def sweep(file: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Trains many students from one store, side by side, and gives one table and plot; goes on where it stopped.

    \b
    kddata sweep jobs/configs/sweep.yaml
    kddata sweep jobs/configs/sweep.yaml 'grid.data.seed=[0, 1, 2]' cluster.at_once=4
    """
    commands.sweep(file, overrides or (), as_json=as_json)


@command
def evaluate(file: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Judges a student: accuracy, loss and calibration on labelled images, and fidelity to the teacher of a store.

    \b
    kddata evaluate jobs/configs/evaluate.yaml
    kddata evaluate jobs/configs/evaluate.yaml student=null run=runs/s1 images=data/val.tar store=out/labels
    """
    commands.evaluate(file, overrides or (), as_json=as_json)


@command
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder or URL of a finished run")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="a folder, tars, Parquet files; any URL")],
    top: Annotated[int, typer.Option(min=1, help="classes to name for each image")] = 5,
    arch: Annotated[str | None, typer.Option(help="of a python: student, which is code that you trust")] = None,
    class_names: Annotated[str | None, typer.Option(help="a text file, one name a line")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value a line, one line an image")] = False,
) -> None:
    """Classifies images with the student of a finished run.

    \b
    kddata predict runs/s1 photos/
    kddata predict runs/s1 shards/{00000..00003}.tar --top 1 --json
    """
    from kddata.config.label import read_class_names
    from kddata.picture import class_name
    from kddata.training import classify

    names = None if class_names is None else read_class_names(class_names)
    right = known = 0
    for found in classify(run, images[0] if len(images) == 1 else images, arch=arch, top=top):
        known += found.label is not None
        right += found.label == found.classes[0]
        if as_json:
            commands.say(json.dumps(found._asdict()))
            continue
        said = zip(found.classes, found.probabilities, strict=True)
        text = "  ".join(f"{class_name(c, names)} {p:.1%}" for c, p in said)
        commands.say(f"{found.image_id}  {text}")
    if known and not as_json:
        commands.say(f"top-1 {right / known:.2%} of {known:,} images with ground truth")


@command
def inspect(store: Store, as_json: AsJson = False) -> None:
    """Says what a finished store is and holds: teacher, views, counts, sizes, and how good and sure the teacher was.

    \b
    kddata inspect out/labels
    kddata inspect s3://bucket/labels --json | jq .teacher_accuracy
    """
    from kddata.store import LabelStore

    info = LabelStore.open(store).info()
    if as_json:
        commands.say(json.dumps(info))
        return
    for name, text in summary(info):
        commands.say(f"{name:<12} {text}")
    for image_id, reason in info["bad"]:
        commands.say(f"bad image {image_id}: {reason}")


def summary(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What `kddata inspect` prints, as (name, text)."""
    spec = info["spec"]
    teacher, plan = spec["teacher"], spec["plan"]
    accuracy = info["teacher_accuracy"]
    sampled = spec.get("keep") == "sampled"
    by = ", by the class most drawn" if sampled else ""
    crop = f"centre {plan['center_px']} px" if plan["policy"] == "center" else _random_crop(plan)
    return [
        ("store", f"{info['url']}, {spec['format']}, codec {spec['codec']}, format version {spec['format_version']}"),
        ("fingerprint", info["fingerprint"]),
        ("teacher", f"{teacher['arch']}, {teacher['num_classes']} classes, {teacher['size_px']} px"),
        ("weights", f"sha256 {teacher['weights_sha256']}"),
        ("views", f"{info['views_per_image']} an image, {crop}, {plan['interpolation']}, seed {plan['seed']}"),
        (
            "labels",
            f"k = {spec['k']} {'draws ' if sampled else ''}of {teacher['num_classes']}, "
            f"temperatures {spec['temperatures']}",
        ),
        ("outputs", ", ".join(f"{x['name']} {x['shape']}" for x in spec.get("outputs", ())) or "none"),
        ("images", f"{info['labelled_images']:,} in {info['images']['shards']} shards, {info['bad_images']} bad"),
        ("", str(info["images"]["location"])),
        ("rows", f"{info['rows']:,} in {info['units']:,} units"),
        ("size", f"{info['bytes']:,} B, {info['bytes_per_view']:.1f} B a view"),
        ("accuracy", "no ground truth" if accuracy is None else f"{accuracy:.2%} of {info['labelled']:,} views{by}"),
        ("entropy", f"{info['mean_entropy_nats']:.3f} nats, mean over views{' of the draws' if sampled else ''}"),
        ("tail mass", f"{info['mean_tail_mass']:.4f}, mean over views"),
    ]


def _random_crop(plan: dict[str, Any]) -> str:
    area, aspect = ("-".join(f"{x:.3g}" for x in plan[name]) for name in ("area", "aspect"))
    more = [plan["policy"]] * (plan["policy"] != "none") + [f"erased {plan['erase_p']:g}"] * (plan["erase_p"] > 0)
    more += [plan["mix"]] * (plan["mix"] != "none")
    return ", ".join([f"random crops of area {area} and aspect {aspect}, flipped {plan['flip_p']:g}", *more])


@command
def verify(
    store: Store,
    pixels: Annotated[bool, typer.Option("--pixels", help="also render the hashed sample of views again")] = False,
    images: Images = None,
    as_json: AsJson = False,
) -> None:
    """Reads every byte of a finished store, compares it with what was written, and names each damaged file.

    With --pixels, also renders the views whose pixels were hashed, and compares: the proof that training sees what the
    teacher saw, with these images and these library versions.

    \b
    kddata verify out/labels && echo sound
    kddata verify out/labels --pixels --images moved/shards
    """
    from kddata.store import LabelStore, verify_store

    problems = verify_store(store)
    manifest_lost = any(problem.file.startswith("manifest-") for problem in problems)
    if pixels and not manifest_lost:
        from kddata.care import check_pixels

        damaged = frozenset(problem.file for problem in problems)
        problems += check_pixels(LabelStore.open(store), images=images, skip=damaged)
    if as_json:
        commands.say(json.dumps([{"file": problem.file, "reason": problem.reason} for problem in problems]))
    else:
        for problem in problems:
            commands.say(f"{problem.file}: {problem.reason}")
        if not problems:
            commands.say(f"{store}: every file is as it was written" + ", every hashed view too" * pixels)
    if problems:
        raise StoreDamagedError(
            "a store is as it was written",
            actual=f"{len(problems)} problems, first in {problems[0].file}",
            where=store,
            fix="`kddata repair` makes damaged and missing files again, `kddata gc` removes extra ones",
        )


@command
def repair(file: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Makes the damaged and missing files of a finished store again, byte for byte; sound files are not touched.

    Takes the job file that the store was labelled by; images may have moved. Another teacher, plan or images are
    refused and named, and so is a file that would come out with other bytes (another machine kind or library version).

    \b
    kddata repair jobs/configs/label.yaml
    kddata repair jobs/configs/label.yaml 'images=moved/{00000..00003}.tar'
    """
    import dataclasses

    from kddata import care
    from kddata.config import LabelFile, label_job, load

    settings = load(LabelFile, file, overrides or ())
    device = "cuda" if settings.cluster.gpus_per_teacher else "cpu"
    job = dataclasses.replace(label_job(settings), device=device)
    done = care.repair(job, on_file=lambda name: None if as_json else commands.say(f"{name}: made again"))
    if as_json:
        commands.say(json.dumps(dataclasses.asdict(done)))
    elif not done.files:
        commands.say(f"{done.url}: no file is damaged")
    for problem in () if as_json else done.left:
        commands.say(f"{problem.file}: {problem.reason}")


@command
def gc(
    store: Store,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list them, and remove nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Removes from a store's folder what belongs to nothing: temporary files, files that no manifest names.

    \b
    kddata gc out/labels --dry-run
    kddata gc s3://bucket/labels
    """
    import dataclasses

    from kddata.care import collect_garbage

    strays = collect_garbage(store, dry_run=dry_run)
    if as_json:
        commands.say(json.dumps([dataclasses.asdict(stray) for stray in strays]))
        return
    for stray in strays:
        commands.say(f"{stray.file}: {stray.reason}, {stray.num_bytes:,} B")
    done = "would be removed" if dry_run else "removed"
    commands.say(f"{store}: {len(strays)} files, {sum(stray.num_bytes for stray in strays):,} B {done}")


@command
def merge(
    out: Annotated[str, typer.Argument(metavar="OUT", help="path or URL of the new store")],
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="finished stores of one spec")],
    images: Images = None,
    as_json: AsJson = False,
) -> None:
    """Joins stores that were labelled apart into a new one, as if they had been labelled at once.

    Of the same views of other image shards each, or of views of the same images that follow each other
    (views.first). Stores of another spec are refused and the fields named.

    \b
    kddata merge out/all out/part0 out/part1
    kddata merge out/views0-99 out/views0-49 out/views50-99
    """
    from kddata import care

    info = care.merge(out, stores, images=images).info()
    if as_json:
        commands.say(json.dumps(info))
    else:
        commands.say(f"{info['url']}: {info['rows']:,} views, in {info['units']} units of {len(stores)} stores")


@command
def convert(
    store: Store,
    out: Annotated[str, typer.Argument(metavar="OUT", help="path or URL of the new store")],
    format: Annotated[str | None, typer.Option(help="of its shards: arrow, tar, or tar+images")] = None,
    codec: Annotated[str | None, typer.Option(help="of its values: compact rounds those of an exact store")] = None,
    images: Images = None,
    as_json: AsJson = False,
) -> None:
    """Writes a finished store again in another format, losslessly, or rounded by codec compact.

    \b
    kddata convert out/labels out/labels-tar --format tar
    kddata convert out/labels out/labels-small --codec compact
    """
    import typing

    from kddata import care
    from kddata.cards import Codec, Format
    from kddata.store import LabelStore

    for name, value, known in (("--format", format, Format), ("--codec", codec, Codec)):
        if value is not None and value not in typing.get_args(known):
            raise ConfigError(f"{name} is one of {', '.join(typing.get_args(known))}", actual=repr(value))
    choice: dict[str, Any] = {"format": format, "codec": codec}
    info = care.convert(LabelStore.open(store), out, images=images, **choice).info()
    if as_json:
        commands.say(json.dumps(info))
    else:
        spec = info["spec"]
        commands.say(
            f"{info['url']}: {info['rows']:,} views, {spec['format']}, codec {spec['codec']}, "
            f"{info['bytes_per_view']:.1f} B a view"
        )


@command
def export(
    store: Store,
    out: Annotated[str, typer.Argument(metavar="OUT.parquet", help="path or URL of the file")],
    as_json: AsJson = False,
) -> None:
    """Writes the rows of a store into one Parquet file, for DuckDB, Polars and Hugging Face datasets.

    \b
    kddata export out/labels labels.parquet
    """
    import dataclasses

    from kddata import care
    from kddata.store import LabelStore

    with Bar("exporting", unit="rows") as bar:
        done = care.export_parquet(LabelStore.open(store), out, on_rows=bar.update)
    if as_json:
        commands.say(json.dumps(dataclasses.asdict(done)))
    else:
        commands.say(f"{done.url}: {done.rows:,} rows in {done.row_groups} row groups, {done.num_bytes:,} B")


@command
def audit(
    store: Store,
    overrides: Overrides = None,
    job: Annotated[str | None, typer.Option(help="job file whose teacher is asked again")] = None,
    views: Annotated[int, typer.Option(min=1, help="most stored views to ask about")] = 256,
    seed: Annotated[int, typer.Option(help="of the sample")] = 0,
    images: Images = None,
    min_top1: Annotated[float, typer.Option(help="least share of views with the stored top-1 (or of draws)")] = 0.99,
    max_kl: Annotated[float, typer.Option(help="most mean KL(stored || asked again), nats")] = 0.01,
    max_output_error: Annotated[
        float, typer.Option(help="most mean relative error of an output; 10 x of a view")
    ] = 0.01,
    min_accuracy: Annotated[float, typer.Option(help="least accuracy of the teacher, where there is ground truth")] = 0,
    max_bad: Annotated[float, typer.Option(help="most bad images, as a share of all")] = 1,
    as_json: AsJson = False,
) -> None:
    """Asks the teacher again about a sample of views, and judges the store's numbers; fails past the thresholds.

    Also notices another teacher than the store's, and mean and std under which it would be right more often.

    \b
    kddata audit out/labels
    kddata audit out/labels --job jobs/configs/label.yaml --views 1000 --min-accuracy 0.6
    kddata audit out/labels --job jobs/configs/label.yaml teacher.weights=teacher.safetensors
    """
    import dataclasses

    from kddata import care
    from kddata.config import LabelFile, label_job, load
    from kddata.errors import StoreMismatchError
    from kddata.labelling import load_job_teacher
    from kddata.store import LabelStore

    if overrides and job is None:
        raise ConfigError(
            "overrides replace values of a job file", actual=" ".join(overrides), fix="name the file with --job"
        )
    opened = LabelStore.open(store)
    teacher = None if job is None else load_job_teacher(label_job(load(LabelFile, job, overrides or ())))
    found = care.audit(
        opened,
        teacher,
        views=views,
        seed=seed,
        images=images,
        min_top1=min_top1,
        max_kl=max_kl,
        max_output_error=max_output_error,
        min_accuracy=min_accuracy,
        max_bad=max_bad,
    )
    if as_json:
        commands.say(json.dumps(dataclasses.asdict(found)))
    else:
        for name, text in audit_lines(found):
            commands.say(f"{name:<12} {text}")
    if found.faults:
        raise StoreMismatchError(
            "a store's labels are what its teacher says", actual="; ".join(found.faults), where=opened.url
        )


def audit_lines(found: Audit) -> list[tuple[str, str]]:
    """What `kddata audit` prints, as (name, text)."""
    again, classes = "no teacher named, so none was asked again (--job)", "no ground truth"
    if found.views:
        again = f"{found.top1_match:.2%} of the draws are drawn again"
        if found.mean_kl is not None:
            again = f"top-1 as stored {found.top1_match:.2%}, KL mean {found.mean_kl:.3g}, "
            again += f"largest {found.max_kl:.3g} nats"
        again = f"{found.views} views: {again}"
    if found.images_per_class is not None:
        least, median, most = found.images_per_class
        classes = f"{least} to {most} images each, median {median:g}; {found.classes_without_images} have none"
    accuracy = found.teacher_accuracy
    outputs = [
        (name, f"{error:.3%} of its norm from the stored, mean; largest {found.max_output_errors[name]:.3%}")
        for name, error in found.output_errors.items()
    ]
    by, of_draws = (", by the class most drawn", ", estimated from the draws") if found.sampled else ("", "")
    return [
        ("asked again", again),
        *outputs,
        ("accuracy", "no ground truth" if accuracy is None else f"{accuracy:.2%} of all views{by}"),
        ("entropy", f"{found.mean_entropy_nats:.3f} nats, mean over views{of_draws}"),
        ("tail mass", f"{found.mean_tail_mass:.4f}, mean over views{of_draws}"),
        ("classes", classes),
        ("bad images", f"{found.bad_images} of {found.num_images}"),
        ("verdict", "; ".join(found.faults) or "nothing past its threshold"),
    ]


@command
def show(
    store: Store,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="an image id")],
    out: Annotated[Path, typer.Option(help="the PNG file to write")] = Path("views.png"),
    images: Images = None,
    class_names: Annotated[str | None, typer.Option(help="a text file, one name a line")] = None,
    most: Annotated[int, typer.Option(min=1, help="most views to draw")] = 11,
) -> None:
    """Draws the stored views of one image, with the teacher's top labels, into a PNG file.

    \b
    kddata show out/labels n01440764_10026 --class-names imagenet.txt --out fish.png
    """
    import io

    from kddata.config.label import read_class_names
    from kddata.picture import draw_views, stored_views
    from kddata.store import LabelStore

    names = None if class_names is None else read_class_names(class_names)
    opened = LabelStore.open(store)
    rows, png = stored_views(opened, image, most=most), io.BytesIO()
    draw_views(png, opened, rows, images=images, class_names=names)
    try:
        out.write_bytes(png.getvalue())
    except OSError as error:
        raise ConfigError(
            "a picture goes into a folder that is there", actual=error, where=out, fix="name another file with --out"
        ) from error
    commands.say(f"{out}: {len(rows)} of {opened.views_per_image} views of {image}")


if __name__ == "__main__":
    main()
