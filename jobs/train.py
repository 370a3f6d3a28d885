"""Trains a student from a store of labels, on Ray: alone on this machine, or under `ray job submit` on a cluster.

    python jobs/train.py jobs/configs/train.yaml
    python jobs/train.py jobs/configs/train.yaml run.name=s2 method.alpha=0.5 cluster.workers=2
    ray job submit --working-dir . -- python jobs/train.py jobs/configs/train.yaml store=s3://bucket/labels

Values are YAML, keys are dotted. The run's folder (run.storage/run.name) gets model.safetensors, card.json and
metrics.json. The same run name goes on where it stopped, and is refused with another job. Exit codes: see
`kddata --help`. With --json, the card comes as one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys

from kddata.config import TrainFile, load, train_job
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
    """Trains, and says what came of it."""
    file = load(TrainFile, path, overrides)
    job = train_job(file)
    from kddata.cluster.training import train  # after the job file is known to be right: this takes seconds
    from kddata.training import Progress

    with Bar(f"training {file.run.name}", unit="steps") as bar:

        def show(now: Progress) -> None:
            note = f"epoch {now.epoch + 1}, loss {now.loss:.4f}, {now.data_wait:.0%} waiting for data"
            bar.update(now.step, now.num_steps, speed=f"{now.images_per_s:,.0f} images/s", note=note)

        result = train(
            job,
            workers=file.cluster.workers,
            gpus_per_worker=file.cluster.gpus_per_worker,
            threads_per_worker=file.cluster.threads_per_worker,
            loader_processes=file.cluster.loader_processes,
            max_failures=file.cluster.max_failures,
            on_progress=show,
        )
    if as_json:
        print(json.dumps({"run": job.run, **result.card}))
        return
    metrics = [f"{name} {value:.4g}" for name, value in result.card["metrics"].items() if isinstance(value, float)]
    print(f"{job.run}: {', '.join(metrics)}")


if __name__ == "__main__":
    sys.exit(main())
