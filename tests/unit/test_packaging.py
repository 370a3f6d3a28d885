"""What is shipped: the wheel's contents, the public names, and how light `import kddata` is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import kddata

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "triton", "timm", "webdataset", "torch", "torchvision", "pydantic", "typer", "matplotlib", "pyarrow")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built once, from a copy of what git would hold: no build leaves anything in the checkout."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    kept = [*ROOT.glob("kddata/**/*"), *ROOT.glob("kernels/**/*"), *ROOT.glob("jobs/**/*"), *ROOT.glob("tests/unit/*")]
    for path in [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")] + kept:
        if path.is_file() and "__pycache__" not in path.parts:
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_the_two_packages_and_metadata_alone(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {
        "kddata",
        "kddata_kernels",
        f"kddata-{kddata.__version__}.dist-info",
    }
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "kddata").rglob("*.py")}
    code |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code, "every module is packaged; see tool.setuptools"
    assert {"kddata/py.typed", "kddata_kernels/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_starts_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "kddata = kddata.cli:main" in wheel.read(entry_points).decode()


def test_public_names_are_listed_once_and_all_arrive() -> None:
    assert kddata.__all__ == sorted(set(kddata.__all__))
    for name in kddata.__all__:
        assert getattr(kddata, name) is not None, name
    assert set(kddata.__all__) <= set(dir(kddata))


def test_an_unknown_name_is_an_attribute_error_that_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'LabelStor'.*LabelStore"):
        kddata.LabelStor  # noqa: B018


def test_importing_kddata_is_light() -> None:
    program = f"import sys, json, kddata; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_library_without_ray() -> None:
    """Every public name can be had without Ray, our kernels or WebDataset (torch itself may load Triton)."""
    program = (
        "import sys, kddata\n"
        "for name in kddata.__all__: getattr(kddata, name)\n"
        "print([m for m in ('ray', 'kddata_kernels', 'timm', 'webdataset', 'typer', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_versions_agree_and_the_checks_are_in_the_makefile() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == kddata.__version__
    assert f"## {kddata.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test: lint$", makefile, re.M)
    for check in ("ruff check .", "ruff format --check .", "mypy", "pytest"):
        assert check in makefile, check
