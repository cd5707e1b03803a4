"""The README: every mlc command in it can be typed, and every file it names is there."""

import re
import shlex
from pathlib import Path

import click
import pytest

from mlc.cli import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
LINES = dict.fromkeys(
    line.removeprefix("$ ").partition(" #")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith("$ ")
)


def test_the_readme_has_commands() -> None:
    assert len(LINES) >= 6
    assert {"make demo", "make test"} <= set(LINES)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("mlc ")])
def test_every_mlc_command_parses(line: str) -> None:
    command: click.Command = cli
    words = shlex.split(line)[1:]
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_every_make_target_is_there(line: str) -> None:
    for target in shlex.split(line)[1:]:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
