"""Where benchmark results go: benchmarks/results/NAME.json, with the machine, the versions and the commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "results"
_LIBRARIES = ("kddata", "numpy", "pillow", "pyarrow", "ray", "torch", "torchvision", "triton", "webdataset")


def environment() -> dict[str, Any]:
    """The machine and the versions that figures belong to; no host name."""
    import torch

    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True, cwd=_FOLDER.parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    model = next((line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")), "unknown")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "commit": commit,
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": versions,
    }


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json and returns its path from here."""
    _FOLDER.mkdir(exist_ok=True)
    path = _FOLDER / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path.relative_to(_FOLDER.parent.parent)


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
