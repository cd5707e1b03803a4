"""Weights files: every usual kind loads, every misfit is named, and no file runs its code."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from mlc.configs.errors import MlcError
from mlc.extract import weights
from mlc.extract.weights import COUNTERS, hash_weights, load_weights

State = dict[str, Tensor]


def tiny_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", pretrained=False)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    return model


def copied(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(got: State, want: State, *, counters: bool = True) -> None:
    names = [name for name in want if counters or not name.endswith(COUNTERS)]
    assert len(names) > 40
    for name in names:
        assert torch.equal(got[name], want[name]), name


@pytest.fixture(scope="module")
def state() -> State:
    """The tensors that the files of these tests hold; not to be changed."""
    return copied(tiny_model(seed=1))


@pytest.fixture
def model() -> nn.Module:
    return tiny_model(seed=2)


def save_safetensors(content: State, path: Path) -> None:
    safetensors.torch.save_file(content, path)


def save_old_pth(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def prefixed(content: State) -> State:
    return {f"module.{name}": tensor for name, tensor in content.items()}


KINDS: dict[str, tuple[str, Callable[[State, Path], None]]] = {
    "safetensors": ("a.safetensors", save_safetensors),
    "pth": ("a.pth", torch.save),
    "pth before torch 1.6": ("a.pth", save_old_pth),
    "bin": ("a.bin", torch.save),
    "state_dict": ("a.pth", lambda state, path: torch.save({"state_dict": state}, path)),
    "checkpoint": (
        "a.pt",
        lambda state, path: torch.save({"epoch": 3, "model": state, "args": {"lr": 0.1}}, path),
    ),
    "data parallel": (
        "a.pth",
        lambda state, path: torch.save({"state_dict": prefixed(state)}, path),
    ),
    "data parallel safetensors": (
        "a.safetensors",
        lambda state, path: save_safetensors(prefixed(state), path),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_usual_kind_of_file_loads(
    kind: str, state: State, model: nn.Module, tmp_path: Path
) -> None:
    name, save = KINDS[kind]
    assert not torch.equal(model.state_dict()["fc.weight"], state["fc.weight"])
    save(state, tmp_path / name)
    licence = load_weights(model, tmp_path / name)
    assert_same_state(model.state_dict(), state)
    assert licence == f"unknown, see where {name} is from"


def test_batchnorm_counters_may_be_missing(state: State, model: nn.Module, tmp_path: Path) -> None:
    without = {name: tensor for name, tensor in state.items() if not name.endswith(COUNTERS)}
    assert len(without) < len(state)
    torch.save(without, tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth")
    assert_same_state(model.state_dict(), state, counters=False)


def test_half_precision_is_widened(state: State, model: nn.Module, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in state.items()}
    save_safetensors(half, tmp_path / "a.safetensors")
    load_weights(model, tmp_path / "a.safetensors")
    got = model.state_dict()["fc.weight"]
    assert got.dtype == torch.float32
    assert torch.equal(got, state["fc.weight"].half().float())


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


MISFITS: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (lambda state: without(state, "layer1.0.conv1.weight"), r"1 missing \(layer1\.0"),
    "unknown": (
        lambda state: state | {"head.weight": torch.ones(2)},
        r"1 unknown \(head\.weight\)",
    ),
    "reshaped": (
        lambda state: state | {"fc.bias": torch.ones(80)},
        r"1 of another shape \(fc\.bias is \[80\], expected \[1000\]\)",
    ),
    "renamed": (
        lambda state: without(state, "fc.bias") | {"fc.b": state["fc.bias"]},
        r"1 missing \(fc\.bias\); 1 unknown \(fc\.b\)",
    ),
    "scalar": (
        lambda state: state | {"fc.bias": torch.tensor(1.0)},
        r"fc\.bias is \[\], expected \[1000\]",
    ),
    "many": (
        lambda state: without(state, *list(state)[:6]),
        r"5 missing \(.*, .*, .*, .*, …\)",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_every_misfit_is_named_and_the_model_stays_as_it_is(
    kind: str, name: str, state: State, model: nn.Module, tmp_path: Path
) -> None:
    change, expected = MISFITS[kind]
    save = save_safetensors if name.endswith("safetensors") else torch.save
    save(change(state), tmp_path / name)
    before = copied(model)
    with pytest.raises(MlcError, match=expected) as caught:
        load_weights(model, tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "do not fit ResNet" in str(caught.value)
    assert_same_state(model.state_dict(), before)


def test_weights_of_another_backbone_do_not_fit(model: nn.Module, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "a.pth")
    with pytest.raises(MlcError, match=r"missing .*; .* unknown .*name the backbone"):
        load_weights(model, tmp_path / "a.pth")


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.folder,)


def test_a_file_that_holds_code_is_refused_and_does_not_run(
    state: State, model: nn.Module, tmp_path: Path
) -> None:
    path, folder = tmp_path / "a.pth", tmp_path / "made by the file"
    torch.save({"state_dict": state, "extra": Intruder(folder)}, path)
    with pytest.raises(MlcError, match="holds more than tensors and is not opened"):
        load_weights(model, path)
    assert not folder.exists()
    torch.load(path, weights_only=False)
    assert folder.exists()


def test_a_whole_pickled_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "a.pth")
    with pytest.raises(MlcError, match="save its state_dict alone"):
        load_weights(model, tmp_path / "a.pth")


TEXTS = {
    "empty": b"",
    "note": b"hello world\n",
    "web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_what_is_no_weights_file_is_an_error(
    kind: str, name: str, model: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(TEXTS[kind])
    with pytest.raises(MlcError, match=name):
        load_weights(model, tmp_path / name)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth before torch 1.6"])
def test_a_truncated_file_is_an_error(
    kind: str, share: float, state: State, model: nn.Module, tmp_path: Path
) -> None:
    name, save = KINDS[kind]
    path = tmp_path / name
    save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    before = copied(model)
    with pytest.raises(MlcError, match=name):
        load_weights(model, path)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, 5], ids=str)
def test_a_file_without_named_tensors_is_an_error(
    content: object, model: nn.Module, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(MlcError, match="expected named tensors"):
        load_weights(model, tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "reason"), [("gone.pth", "No such file or directory"), (".", "Is a directory")]
)
def test_a_file_that_cannot_be_read_is_an_error(
    name: str, reason: str, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(MlcError, match=f"{reason}; --weights takes a weights file"):
        load_weights(model, tmp_path / name)


def test_a_known_file_in_another_naming_is_renamed_and_its_licence_known(
    state: State, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    torch.save({f"layer{index}": tensor for index, tensor in enumerate(state.values())}, path)
    with pytest.raises(MlcError, match="unknown"):
        load_weights(model, path)
    known = weights.KnownFile(weights._rename_by_position, licence="apache-2.0")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.KNOWN_FILES, sha256, known)
    assert load_weights(model, path) == "apache-2.0"
    assert_same_state(model.state_dict(), state)


def test_hash_is_that_of_equal_models() -> None:
    assert hash_weights(tiny_model(seed=3)) == hash_weights(tiny_model(seed=3))


def test_hash_changes_with_every_tensor_but_the_counters(model: nn.Module) -> None:
    base = hash_weights(model)
    hashes = {base}
    counters = 0
    for name, tensor in model.state_dict().items():
        first = tensor.flatten()[0].clone()
        tensor.view(-1)[0] += 1
        changed = hash_weights(model)
        tensor.view(-1)[0] = first
        if name.endswith(COUNTERS):
            assert changed == base, name
            counters += 1
        else:
            assert changed not in hashes, name
            hashes.add(changed)
    assert counters > 5
    assert len(hashes) == len(model.state_dict()) - counters + 1
    assert hash_weights(model) == base


def test_hash_changes_with_names_shapes_and_dtypes() -> None:
    class Holder(nn.Module):
        def __init__(self, name: str, tensor: Tensor) -> None:
            super().__init__()
            self.register_buffer(name, tensor)

    tensor = torch.zeros(2, 6)
    variants = [
        Holder("a", tensor),
        Holder("b", tensor),
        Holder("a", tensor.view(3, 4)),
        Holder("a", tensor.to(torch.int32)),
    ]
    assert len({hash_weights(each) for each in variants}) == len(variants)


def test_hash_does_not_depend_on_the_layout_in_memory(model: nn.Module) -> None:
    base = hash_weights(model)
    assert hash_weights(model.to(memory_format=torch.channels_last)) == base
