"""Trains a student from a store of labels, on Ray: alone on this machine, or under `ray job submit` on a cluster.

    python jobs/train.py jobs/configs/train.yaml
    python jobs/train.py jobs/configs/train.yaml run.name=s2 method.alpha=0.5 cluster.workers=2
    ray job submit --working-dir jobs -- python train.py configs/train.yaml store=s3://bucket/labels

Values are YAML, keys are dotted. The run's folder (run.storage/run.name) gets model.safetensors, card.json and
metrics.json. The same run name goes on where it stopped, and is refused with another job. Exit codes: see
`kddata --help`. With --json, the card comes as one JSON line on stdout.

Library code for the same, without job files: `kddata.train` in one process, `kddata.cluster.training.train` on Ray.
"""

from __future__ import annotations

import argparse
import sys

from kddata import commands
from kddata.console import exit_code

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a YAML job file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    sys.exit(exit_code(lambda: commands.train(args.file, args.overrides, as_json=args.json)))
