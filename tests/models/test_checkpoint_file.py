"""Files of tensors: what is damaged, of no use or of two models is refused, with its name."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlc.configs.errors import MlcError
from mlc.models.checkpoint_file import read_checkpoint

WEIGHT = torch.linspace(-1, 1, 999)


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refused(path: Path, unsafe: bool = False) -> str:
    with pytest.raises(MlcError) as error:
        read_checkpoint(path, unsafe)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize("unsafe", [False, True])
def test_a_flipped_bit_is_seen(tmp_path: Path, unsafe: bool) -> None:
    path = save(tmp_path / "c.pkl", {"a": WEIGHT, "b": WEIGHT + 1})
    assert torch.equal(read_checkpoint(path)["b"], WEIGHT + 1)
    content = bytearray(path.read_bytes())
    content[content.index((WEIGHT + 1).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    message = refused(path, unsafe)
    assert message.endswith("c/data/1 does not fit its checksum; get the file again")


def test_a_file_that_is_cut_short_is_one_sentence(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pkl", {"a": WEIGHT})
    path.write_bytes(path.read_bytes()[:-300])
    assert "not a checkpoint" in refused(path)


def test_programs_are_run_only_for_what_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, load = [], torch.load

    def spy(*arguments: Any, weights_only: bool, **settings: Any) -> Any:
        asked.append(weights_only)
        return load(*arguments, weights_only=weights_only, **settings)

    monkeypatch.setattr(torch, "load", spy)
    read_checkpoint(save(tmp_path / "a.pkl", {"a": WEIGHT}), unsafe=True)
    assert asked == [True]
    read_checkpoint(
        save(tmp_path / "b.pkl", {"model": {"a": WEIGHT}, "args": Namespace()}), unsafe=True
    )
    assert asked == [True, True, False]


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_that_no_model_has_are_all_listed(tmp_path: Path) -> None:
    others = {
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "bytes": torch.zeros(2, dtype=torch.uint8),
        "eighth": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    path = save(tmp_path / "c.pkl", {"a": WEIGHT, "count": torch.tensor(3)} | others)
    message = refused(path)
    assert "got 4 others (sparse: torch.sparse_coo torch.float32, complex: torch.strided" in message
    assert all(f"{name}: torch." in message for name in others)
    fine = {
        "a": WEIGHT,
        "count": torch.tensor(3),
        "half": WEIGHT.half(),
        "brain": WEIGHT.bfloat16(),
    }
    assert read_checkpoint(save(tmp_path / "d.pkl", fine)).keys() == fine.keys()


@pytest.mark.parametrize("names", [("a", "module.a"), ("7", 7)])
def test_two_names_that_become_one_are_refused(tmp_path: Path, names: tuple[Any, Any]) -> None:
    path = save(tmp_path / "c.pkl", {names[0]: WEIGHT, names[1]: -WEIGHT, "module.b": WEIGHT})
    message = refused(path)
    assert "1 tensors are there more than once, with 'module.' before the name and" in message
    assert f" without ({names[0]}); pass" in message
