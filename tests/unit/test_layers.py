"""Imports go down only. The syntax trees are walked, so that an import inside a function counts too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"errors", "rng"},
    {"ops"},
    {"views", "labels", "boundary"},
    {
        "cards",
        "builders",
        "features",
    },  # cards are values too; a spec holds a plan, and temperatures as labels declare them
    {"images", "teacher", "nets", "store", "order", "losses", "evaluation", "corruption", "fashion_mnist"},
    {"labelling", "reader"},
    {"cutting"},
    {"replay", "care"},
    {"training", "report", "picture"},
    {"trackers"},
    {"config", "cluster", "console", "evidence"},
    {"commands"},
    {"cli", "jobs"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TESTING_MAY_USE = LEVEL["replay"]
ONLY = {  # who may import it, anywhere in the repository's shipped code
    "ray": {"cluster"},
    "pydantic": {"config"},
    "yaml": {"config"},
    "typer": {"cli"},
    "rich": {"console", "jobs"},
    "triton": {"kddata_kernels"},
    "kddata_kernels": {"losses", "kddata_kernels"},
    "matplotlib": {"report", "picture"},
    "timm": {"builders"},
    "tensorboardX": {"trackers"},
    "mlflow": {"trackers"},
    "wandb": {"trackers"},
    "transformers": {"builders"},
}


def stations() -> list[tuple[str, Path]]:
    """(station, file) of every shipped Python file; kddata/store/codecs.py belongs to the station `store`."""
    found = []
    for path in sorted((ROOT / "kddata").rglob("*.py")):
        found.append((path.relative_to(ROOT / "kddata").parts[0].removesuffix(".py"), path))
    found += [("jobs", path) for path in sorted((ROOT / "jobs").rglob("*.py"))]
    return found + [("kddata_kernels", path) for path in sorted((ROOT / "kernels").rglob("*.py"))]


def imports(source: str) -> set[str]:
    """Every absolute module name that a source text imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def faults(station: str, modules: set[str]) -> list[str]:
    """What a file of this station may not import."""
    found = []
    for module in sorted(modules):
        top, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if top in ONLY and station not in ONLY[top]:
            found.append(f"{module}: for {sorted(ONLY[top])} alone")
        if top != "kddata" or other == station or other == "__version__" or station == "__init__":
            continue
        if station == "kddata_kernels":
            found.append(f"{module}: kddata_kernels never imports kddata")
        elif station == "testing":
            if LEVEL[other] > TESTING_MAY_USE:
                found.append(f"{module}: testing uses nothing above replay")
        elif other == "testing":
            found.append(f"{module}: nothing shipped imports testing")
        elif other not in LEVEL:
            found.append(f"{module}: is in no layer")
        elif station != "jobs" and LEVEL[other] >= LEVEL[station]:
            found.append(f"{module}: not below {station}")
    return found


@pytest.mark.parametrize(("station", "path"), stations(), ids=lambda x: str(x).removeprefix(f"{ROOT}/"))
def test_imports_go_down_only(station: str, path: Path) -> None:
    assert station in LEVEL or station in {"__init__", "testing", "kddata_kernels"}, f"{path} has no layer"
    assert faults(station, imports(path.read_text())) == []


@pytest.mark.parametrize(
    ("station", "source", "expected"),
    [
        ("views", "from kddata.store import arrow", "not below views"),
        ("views", "def f():\n    import kddata.labels", "not below views"),
        ("labelling", "from kddata import reader", "not below labelling"),
        ("training", "import ray.train", "for ['cluster'] alone"),
        ("training", "from pydantic import BaseModel", "alone"),
        ("losses", "from kddata.testing import FakeTeacher", "nothing shipped imports testing"),
        ("testing", "from kddata.training import fit", "nothing above replay"),
        ("kddata_kernels", "from kddata.errors import KddataError", "never imports kddata"),
        ("cards", "import kddata.novel", "no layer"),
    ],
)
def test_the_walk_finds_planted_faults(station: str, source: str, expected: str) -> None:
    assert expected in "\n".join(faults(station, imports(source)))
    assert faults("store", imports("from kddata.cards import StoreSpec\nfrom kddata.store import arrow")) == []
