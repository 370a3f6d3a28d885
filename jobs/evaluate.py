"""Judges a student on labelled images, and by a store how faithful it is to its teacher. In this process, without Ray.

    python jobs/evaluate.py jobs/configs/evaluate.yaml
    python jobs/evaluate.py jobs/configs/evaluate.yaml student=null run=runs/s1 images=data/val.tar store=out/labels
    ray job submit --working-dir jobs -- python evaluate.py configs/evaluate.yaml images=s3://bucket/val.tar

Values are YAML, keys are dotted. Exit codes: see `kddata --help`. With --json, one JSON line on stdout.

Library code for the same, without job files: `kddata.training.open_student` and `kddata.training.judge`.
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
    sys.exit(exit_code(lambda: commands.evaluate(args.file, args.overrides, as_json=args.json)))
