"""The root is the package: what must hold for an install to be this checkout, whole."""

import configparser
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import mlc

ROOT = Path(__file__).resolve().parents[1]


def test_the_tests_import_this_checkout() -> None:
    assert Path(mlc.__file__).resolve().parent == ROOT


def test_every_package_is_listed() -> None:
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    found = {"mlc"} | {f"mlc.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
    assert set(cfg["options"]["packages"].split()) == found


def test_only_shipped_modules_sit_at_the_root() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "timm", "numpy", "zarr", "h5py", "rich")
    code = f"import sys, mlc.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_examples_in_docstrings_hold() -> None:
    names = [module.name for module in pkgutil.walk_packages(mlc.__path__, "mlc.")]
    packages = [name for name in names if not name.startswith(("mlc.tests", "mlc.benchmarks"))]
    assert len(packages) > 30
    for name in packages:
        if name != "mlc.__main__":
            assert doctest.testmod(importlib.import_module(name)).failed == 0, name


def test_imports_go_one_way() -> None:
    order = ["configs", "datasets", "store", "losses", "extract", "heads", "models", "report"]
    level = {"configs": 0, "datasets": 1, "store": 1, "losses": 2, "extract": 3, "heads": 3}
    level |= {"models": 4, "report": 5}
    for folder in order:
        for path in (ROOT / folder).glob("*.py"):
            for line in path.read_text().splitlines():
                if line.startswith("from mlc."):
                    other = line.split()[1].split(".")[1]
                    below = level[other] < level[folder]
                    assert below or other == folder, f"{path.name} imports {other}"
