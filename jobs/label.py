"""Labels images into a store, on Ray: alone on this machine, or under `ray job submit` on a cluster.

    python jobs/label.py jobs/configs/label.yaml
    python jobs/label.py jobs/configs/label.yaml store=out/labels8 views.per_image=8 cluster.teachers=2
    ray job submit --working-dir jobs -- python label.py configs/label_gpu.yaml store=s3://bucket/labels

Values are YAML, keys are dotted. The same command goes on where an earlier one stopped, and does nothing when the
store is finished. Exit codes: see `kddata --help`. With --json, what was made comes as one JSON line on stdout.

Library code for the same, without job files: `kddata.label_store` in one process, `kddata.cluster.labelling.label` on
Ray.
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
    sys.exit(exit_code(lambda: commands.label(args.file, args.overrides, as_json=args.json)))
