"""A loss of somebody else's, by CONTRIBUTING.md word by word: the command line, sweep and tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import made_store
import pytest

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "runs", "demo")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project with the loss of the page in its file."""
    folder = tmp_path_factory.mktemp("copy") / "mlc"
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (name,) = re.findall(r"A whole one, `(losses/\w+\.py)`", page)
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert not (folder / name).exists()
    (folder / name).write_text(code)
    return folder


def run(copy: Path, *command: str, at: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=at,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_commands_of_the_page_train_it(copy: Path, tmp_path: Path) -> None:
    store = str(made_store.write(tmp_path))
    own = ("--features", store, "--set", "epochs=2")
    knob = ("--set", "knobs.most=2")
    run(copy, "mlc", "train-head", "--loss", "clipped", *knob, *own, at=tmp_path)
    said = run(copy, "mlc", "sweep", "--losses", "an,clipped", *own, at=tmp_path)
    assert re.search(r"^\s*clipped ", said, flags=re.MULTILINE)


def test_the_tests_take_it_up(copy: Path) -> None:
    folders = ("tests/losses", "tests/heads/test_block.py", "tests/heads/test_training_labels.py")
    without = ("--deselect", "tests/losses/test_own_loss.py", "-p", "no:cacheprovider")
    said = run(copy, "pytest", "-q", *folders, *without, "-k", "clipped", at=copy)
    (count,) = re.findall(r"(\d+) passed", said)
    assert int(count) >= 20
