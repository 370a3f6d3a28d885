"""Labels images into a store, on Ray: alone on this machine, or under `ray job submit` on a cluster.

    python jobs/label.py jobs/configs/label.yaml
    python jobs/label.py jobs/configs/label.yaml store=out/labels8 views.per_image=8 cluster.teachers=2
    ray job submit --working-dir . -- python jobs/label.py jobs/configs/label.yaml store=s3://bucket/labels

Values are YAML, keys are dotted. The same command goes on where an earlier one stopped, and does nothing when the
store is finished. Exit codes: see `kddata --help`. With --json, what was made comes as one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys

from kddata.config import LabelFile, label_job, load
from kddata.console import Bar, exit_code


def main(argv: list[str] | None = None) -> int:
    """Runs the job that the command line names; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a YAML job file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args.file, args.overrides, as_json=args.json))


def run(path: str, overrides: list[str], *, as_json: bool) -> None:
    """Labels, and says what was made."""
    file = load(LabelFile, path, overrides)
    job = label_job(file)
    from kddata.cluster.labelling import Standing, label  # after the job file is known to be right: this takes seconds

    with Bar("labelling", unit="views") as bar:

        def show(now: Standing) -> None:
            right = f", teacher right {now.correct / now.labelled:.1%}" if now.labelled else ""
            bar.update(now.views, now.total_views, note=f"{now.bad_images} bad images{right}")

        done = label(
            job,
            teachers=file.cluster.teachers,
            gpus_per_teacher=file.cluster.gpus_per_teacher,
            on_standing=show,
        )
    info = done.store.info()
    if as_json:
        print(json.dumps({"new_units": done.new_units, **info}))
    elif done.new_units == 0:
        print(f"{info['url']} is finished already; nothing was done")
    else:
        print(f"{info['url']}: {info['rows']:,} views, {info['bytes_per_view']:.1f} B each, in {info['units']} units")


if __name__ == "__main__":
    sys.exit(main())
