"""Recipes of the commands: a YAML file, overrides and flags become one checked, frozen config.

Each command's config is a class beside the function that it configures; the recipes that ship
with mlc are ``configs/COMMAND/NAME.yaml``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mlc.configs.errors import MlcError, nearest


class Config(BaseModel):
    """Base of all configs: frozen, and a key that is not a field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number, as everybody who writes a learning rate means it."""


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads: text like ``1e-3`` goes into quotes."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def load(
    cls: type[C],
    command: str,
    name: str | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> C:
    """Build a command's config: defaults < recipe < ``--set key=value`` < flags.

    Args:
        cls: the config class.
        command: the command's name, which is the folder of its recipes.
        name: a recipe of that folder, or a path to a YAML file.
        overrides: ``key=value`` texts, the value read as YAML.
        flags: values of the command line; None means not given.

    Raises:
        MlcError: one sentence with every key that is unknown, missing or of the wrong type.
    """
    return load_values(cls, name or command, gather(command, name, overrides, flags))


def gather(
    command: str,
    name: str | None,
    overrides: Sequence[str],
    flags: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the values of a recipe, overrides and flags, not checked yet; see ``load``."""
    values: dict[str, Any] = {} if name is None else _read_recipe(command, name)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise MlcError(f"--set: expected key=value, got {override!r}")
        _assign(values, key.strip(), _read_yaml("--set", text))
    return values | {key: value for key, value in (flags or {}).items() if value is not None}


def load_values(cls: type[C], where: str, values: Mapping[str, Any]) -> C:
    """Return a config of values that ``gather`` gave.

    Args:
        cls: the config class.
        where: the values are from, for errors.
        values: by field.

    Raises:
        MlcError: see ``load``.
    """
    try:
        text = json.dumps(values, default=str)
    except (TypeError, ValueError) as error:
        raise MlcError(f"{where}: not plain keys and values ({error})") from None
    try:
        # Strict JSON mode: 5 is a float and a list is a tuple, but "no" is not 0 and "3" is not 3.
        return cls.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = "; ".join(_problem(cls, each) for each in error.errors())
        raise MlcError(f"{where}: {problems}") from None


def load_each(
    cls: type[C],
    command: str,
    split: Sequence[str],
    along: Sequence[str] = (),
    name: str | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> list[C]:
    """Build a command's config once for each item of fields that may be lists.

    ``backbone: a,b`` with ``size_px: 224`` is a config of a and one of b, both at 224 px.

    Args:
        cls: the config class.
        command: see ``load``.
        split: fields that may be lists, or text with commas unless it is a file's name; a single
            item is of every config, None leaves the default.
        along: fields that may be such lists too where there are several configs.
        name: see ``load``.
        overrides: see ``load``.
        flags: see ``load``.

    Raises:
        MlcError: see ``load``; two fields have lists of different lengths; or an item is empty.
    """
    values = gather(command, name, overrides, flags)
    lists = {field: _items(field, values[field]) for field in split if field in values}
    count = max(map(len, lists.values()), default=1)
    if count > 1:
        lists |= {field: _items(field, values[field]) for field in along if field in values}
    for field, items in lists.items():
        if len(items) not in (1, count):
            longest = next(each for each in lists if len(lists[each]) == count)
            raise MlcError(
                f"{field}: should be one value, or one for each of the {count} of {longest}, "
                f"got {len(items)}: {', '.join(map(str, items))}"
            )
    return [
        load_values(cls, name or command, _chosen(values, lists, index)) for index in range(count)
    ]


def _items(field: str, value: object) -> list[Any]:
    """Return the items of a list, or of text with commas."""
    if isinstance(value, list | tuple):
        return list(value) or [None]
    if "," not in str(value) or Path(str(value)).exists():
        return [value]
    items = [each.strip() for each in str(value).split(",")]
    if "" in items:
        raise MlcError(f"{field}: has an empty item, got {str(value)!r}")
    return [int(each) if each.isdecimal() else each for each in items]


def _chosen(
    values: Mapping[str, Any], lists: Mapping[str, list[Any]], index: int
) -> dict[str, Any]:
    """Return the values of one of several configs, without those that are None."""
    chosen = {field: items[index % len(items)] for field, items in lists.items()}
    return {key: value for key, value in {**values, **chosen}.items() if value is not None}


def dump(config: Config) -> str:
    """Return a resolved config as YAML that ``load`` reads back to the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def recipes(command: str) -> dict[str, Path]:
    """Return the recipes that ship with a command, by name."""
    folder = Path(str(resources.files("mlc.configs"))) / command
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read_recipe(command: str, name: str) -> dict[str, Any]:
    known = recipes(command)
    path = known.get(name, Path(name))
    if not path.is_file():
        hint = nearest(name, known) if known else "give the path of a YAML file"
        raise MlcError(f"--config: no recipe and no file {name!r}; {hint}")
    try:
        values = _read_yaml(str(path), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise MlcError(f"{path}: not text in UTF-8 ({error})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise MlcError(f"{path}: expected key: value lines, got {type(values).__name__}")
    return values


def _read_yaml(where: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise MlcError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` in nested dictionaries."""
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise MlcError(f"--set: {key!r} goes below {parent!r}, which is not a section")
    values[last] = value


def _problem(cls: type[Config], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key, {nearest(where, cls.model_fields)}"
    if error["type"] == "missing":
        return f"{where}: missing"
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: should be {message}, got {error['input']!r}"
