"""Trains many students from one store of labels, on Ray: alone on this machine, or under `ray job submit` on a cluster.

    python jobs/sweep.py jobs/configs/sweep.yaml
    python jobs/sweep.py jobs/configs/sweep.yaml 'grid.data.seed=[0, 1, 2]' cluster.at_once=4
    ray job submit --working-dir . -- python jobs/sweep.py jobs/configs/sweep.yaml run.storage=s3://bucket/runs

A student for every combination of the grid, each in a folder of its own below run.storage/run.name, as many at once as
there is room for. That folder gets results.json, results.csv and plot.html. The same command goes on where it stopped:
students that have finished are read back. A trial that fails stops no other; the exit code is then 7. Exit codes: see
`kddata --help`. With --json, the results come as one JSON line on stdout.

Library code for the same, without job files: `kddata.cluster.sweep.sweep`.
"""

from __future__ import annotations

import argparse
import sys

from kddata import commands
from kddata.console import exit_code

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a YAML sweep file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    sys.exit(exit_code(lambda: commands.sweep(args.file, args.overrides, as_json=args.json)))
