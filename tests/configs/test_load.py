"""The loader: every recipe loads, what wins over what, and all mistakes in one sentence."""

from importlib import resources
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from mlc.configs import Config, dump, load, load_each, recipes
from mlc.configs.errors import MlcError
from mlc.datasets.prepare import PrepareConfig
from mlc.extract.config import ExtractConfig
from mlc.finetune.config import FinetuneConfig
from mlc.heads.config import TrainConfig
from mlc.heads.grid import SweepConfig
from mlc.report.demo import DemoConfig

COMMANDS: dict[str, type[Config]] = {
    "data": PrepareConfig,
    "demo": DemoConfig,
    "extract": ExtractConfig,
    "finetune": FinetuneConfig,
    "sweep": SweepConfig,
    "train-head": TrainConfig,
}
FOLDER = Path(str(resources.files("mlc.configs")))
RECIPES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))


class Inner(Config):
    """A section."""

    depth: int = 1
    name: str | None = None


class Toy(Config):
    """One field of each kind."""

    lr: float = 0.1
    steps: int = 10
    fast: bool = False
    mode: Literal["slow", "careful"] = "slow"
    sizes: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] | None = None
    out: Path | None = None
    knobs: dict[str, float] = Field(default_factory=dict)
    inner: Inner = Inner()


class Needy(Config):
    """A field without a default."""

    path: Path
    size: int


def toy(*overrides: str, **flags: object) -> Toy:
    return load(Toy, "toy", None, overrides, flags)


def recipe(folder: Path, text: str | bytes) -> str:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2
    assert {len(path.parts) for path in RECIPES} == {2}


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_loads_with_the_class_of_its_command(path: Path) -> None:
    command, name = path.parent.name, path.stem
    config = load(COMMANDS[command], command, name)
    written = yaml.safe_load((FOLDER / path).read_text())
    assert written
    assert {
        key: config.model_dump(mode="json", exclude_unset=True)[key] for key in written
    } == written
    assert recipes(command)[name] == FOLDER / path


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_starts_with_the_command_that_uses_it(path: Path) -> None:
    first = (FOLDER / path).read_text().splitlines()[0]
    assert first.startswith(f"# mlc {path.parent.name} --config {path.stem}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_defaults_that_survive_dump_and_load(command: str, tmp_path) -> None:
    config = load(COMMANDS[command], command)
    assert config == COMMANDS[command]()
    assert load(COMMANDS[command], command, recipe(tmp_path, dump(config))) == config


def test_flags_win_over_set_and_set_over_the_recipe_and_the_recipe_over_defaults(
    tmp_path: Path,
) -> None:
    name = recipe(tmp_path, "lr: 2\nsteps: 2\nfast: true\n")
    config = load(Toy, "toy", name, ["lr=3", "steps=3"], {"lr": 4.0, "out": None})
    assert (config.lr, config.steps, config.fast, config.mode) == (4, 3, True, "slow")


def test_a_flag_that_is_not_given_hides_nothing(tmp_path: Path) -> None:
    assert load(Toy, "toy", recipe(tmp_path, "lr: 2\n"), (), {"lr": None}).lr == 2


def test_the_last_of_two_overrides_wins() -> None:
    assert toy("steps=1", "steps=2").steps == 2


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "0.001", "+1e-3"])
def test_a_number_may_be_written_as_people_write_learning_rates(text: str, tmp_path: Path) -> None:
    assert toy(f"lr={text}").lr == 0.001
    assert load(Toy, "toy", recipe(tmp_path, f"lr: {text}\n")).lr == 0.001


@pytest.mark.parametrize(("text", "value"), [("1e5", 1e5), ("-2e+3", -2000), ("5", 5), (".5", 0.5)])
def test_other_spellings_of_numbers_too(text: str, value: float) -> None:
    assert toy(f"lr={text}").lr == value


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("lr=no", "lr: should be a valid number, got False"),
        ("lr=fast", "lr: should be a valid number, got 'fast'"),
        ("lr='1'", "lr: should be a valid number, got '1'"),
        ("lr=", "lr: should be a valid number, got None"),
        ("steps=1.5", "steps: should be a valid integer, got 1.5"),
        ("steps=yes", "steps: should be a valid integer, got True"),
        ("fast=1", "fast: should be a valid boolean, got 1"),
        ("sizes=3", "sizes: should be a valid array, got 3"),
        ("sizes=[1, two]", "sizes.1: should be a valid integer, got 'two'"),
        ("mode=quick", "mode: should be 'slow' or 'careful', got 'quick'"),
        ("knobs.a=x", "knobs.a: should be a valid number, got 'x'"),
        ("inner.depth=x", "inner.depth: should be a valid integer, got 'x'"),
    ],
)
def test_a_value_of_another_kind_is_refused(override: str, problem: str) -> None:
    with pytest.raises(MlcError) as caught:
        toy(override)
    assert str(caught.value) == f"toy: {problem}"


def test_whole_numbers_are_floats_and_lists_are_tuples() -> None:
    config = toy("lr=5", "sizes=[3, 4]", "names=[a]", sizes=(5, 6))
    assert (type(config.lr), config.sizes, config.names) == (float, (5, 6), ("a",))


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(MlcError) as caught:
        load(Needy, "toy", None, ["size=big", "pat=x"])
    sentence = str(caught.value)
    assert sentence.startswith("toy: ")
    for problem in (
        "path: missing",
        "size: should be a valid integer, got 'big'",
        "pat: unknown key, did you mean 'path'?",
    ):
        assert problem in sentence


def test_an_unknown_key_gives_the_nearest_or_all_of_few() -> None:
    with pytest.raises(MlcError, match=r"^toy: moed: unknown key, did you mean 'mode'\?"):
        toy("moed=slow")
    with pytest.raises(MlcError, match=r"zzz: unknown key, choose from path, size"):
        load(Needy, "toy", None, ["path=x", "size=1", "zzz=3"])


def test_mistakes_of_a_recipe_name_the_recipe(tmp_path: Path) -> None:
    name = recipe(tmp_path, "steps: many\n")
    with pytest.raises(MlcError, match=rf"^{name}: steps: should be a valid integer"):
        load(Toy, "toy", name)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        toy().lr = 3.0


def test_set_reaches_into_sections_and_keeps_what_else_is_there(tmp_path: Path) -> None:
    name = recipe(tmp_path, "knobs: {a: 1}\ninner:\n  depth: 2\n")
    config = load(Toy, "toy", name, ["knobs.b=2e-1", "inner.name=x", "inner.depth=7"])
    assert config.knobs == {"a": 1, "b": 0.2}
    assert config.inner == Inner(depth=7, name="x")


def test_set_below_something_that_is_no_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"--set: 'lr.a' goes below 'lr', which is not a section"):
        load(Toy, "toy", recipe(tmp_path, "lr: 1\n"), ["lr.a=1"])


@pytest.mark.parametrize("override", ["lr", "lr 1", ""])
def test_set_without_an_equals_sign_is_refused(override: str) -> None:
    with pytest.raises(MlcError, match=rf"--set: expected key=value, got '{override}'"):
        toy(override)


def test_set_may_hold_equals_signs_and_spaces() -> None:
    assert toy("names=[a=b]").names == ("a=b",)
    assert toy(" steps = 3 ").steps == 3


@pytest.mark.parametrize("value", ["[1", "{a", "a: b: c", "'x", "@"])
def test_a_value_that_is_not_yaml_is_refused(value: str) -> None:
    with pytest.raises(MlcError, match=r"--set"):
        toy(f"names={value}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [1", r"not YAML"),
        ("a: b: c", r"not YAML"),
        ("\tlr: 1", r"not YAML"),
        (b"lr: 1 # \xe9", r"not YAML|UTF-8"),
        ("- lr", r"expected key: value lines, got list"),
        ("5", r"expected key: value lines, got int"),
    ],
)
def test_a_recipe_that_is_not_keys_and_values_is_refused(
    tmp_path: Path, content: str | bytes, sentence: str
) -> None:
    name = recipe(tmp_path, content)
    with pytest.raises(MlcError, match=rf"{name}: .*({sentence})"):
        load(Toy, "toy", name)


def test_an_unknown_recipe_gives_the_nearest() -> None:
    with pytest.raises(MlcError, match=r"no recipe and no file 'mlspl-linaer'; .*'mlspl-linear'"):
        load(TrainConfig, "train-head", "mlspl-linaer")
    with pytest.raises(MlcError, match=r"no recipe and no file 'x'; give the path of a YAML file"):
        load(Toy, "toy", "x")


FULL = Toy(
    lr=1e-05,
    steps=3,
    fast=True,
    mode="careful",
    sizes=(),
    names=("no", "010", "null", "12:30", "- a", "é ü", "1.5", "~", "2024-01-01", ""),
    out=Path("runs/1e3"),
    knobs={"a": 1e-7, "b": 3.0},
    inner=Inner(depth=4, name="yes"),
)


def test_dump_and_load_give_the_same_config(tmp_path: Path) -> None:
    assert load(Toy, "toy", recipe(tmp_path, dump(FULL))) == FULL


@pytest.mark.parametrize("text", ["1e3", "12e-4", "+5E6", "3e8"])
def test_text_that_looks_like_a_number_survives_dump_and_load(tmp_path: Path, text: str) -> None:
    config = Toy(names=(text,), out=Path(text))
    assert load(Toy, "toy", recipe(tmp_path, dump(config))) == config


# --- lists ---------------------------------------------------------------------------------------


def toys(*overrides: str, **flags: object) -> list[tuple[int, Path | None]]:
    """The steps and outs of the configs that lists of both give."""
    configs = load_each(Toy, "toy", ("steps", "out"), (), None, overrides, flags)
    return [(each.steps, each.out) for each in configs]


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ({}, [(10, None)]),
        ({"steps": 3}, [(3, None)]),
        ({"steps": (3,)}, [(3, None)]),
        ({"steps": (3, 4)}, [(3, None), (4, None)]),
        ({"steps": "3, 4", "out": Path("a,b")}, [(3, Path("a")), (4, Path("b"))]),
        ({"steps": (3, 4), "out": "a"}, [(3, Path("a")), (4, Path("a"))]),
        ({"out": "a #1,@b"}, [(10, Path("a #1")), (10, Path("@b"))]),
        ({"out": ["a", None]}, [(10, Path("a")), (10, None)]),
        ({"steps": ()}, [(10, None)]),
    ],
)
def test_a_list_gives_a_config_for_each_item(flags: dict[str, object], want: list[object]) -> None:
    assert toys(**flags) == want


def test_lists_come_from_overrides_and_recipes_too(tmp_path: Path) -> None:
    assert toys("steps=3,4", "out=[a, 'b,c']") == [(3, Path("a")), (4, Path("b,c"))]
    path = recipe(tmp_path, "steps: [3, 4]\nlr: 1e-3\n")
    assert [each.lr for each in load_each(Toy, "toy", ("steps",), (), path)] == [1e-3, 1e-3]


def test_what_is_not_to_be_split_is_not() -> None:
    (config,) = load_each(Toy, "toy", ("steps",), flags={"names": ("a", "b"), "out": "a,b"})
    assert (config.names, config.out) == (("a", "b"), Path("a,b"))


def test_a_file_whose_name_has_a_comma_is_one_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").touch()
    assert toys(out="a,b") == [(10, Path("a,b"))]


def test_what_goes_along_is_split_where_there_are_several(tmp_path: Path) -> None:
    flags = {"out": "a,b", "steps": (3, 4)}
    configs = load_each(Toy, "toy", ("steps",), ("out",), flags=flags)
    assert [each.out for each in configs] == [Path("a"), Path("b")]
    (config,) = load_each(Toy, "toy", ("steps",), ("out",), flags={"out": "a,b"})
    assert config.out == Path("a,b")


@pytest.mark.parametrize("text", ["3,", ",3", "3,,4"])
def test_an_empty_item_is_a_mistake(text: str) -> None:
    with pytest.raises(MlcError, match=rf"^steps: has an empty item, got '{text}'$"):
        toys(steps=text)


def test_lists_of_other_lengths_are_a_mistake() -> None:
    sentence = r"^out: should be one value, or one for each of the 3 of steps, got 2: a, b$"
    with pytest.raises(MlcError, match=sentence):
        toys(steps=(1, 2, 3), out="a,b")


def test_a_mistake_in_an_item_is_told() -> None:
    with pytest.raises(MlcError, match=r"^toy: steps: should be a valid integer, got 'x'$"):
        toys(steps="3,x")
