"""Engines: each gives what eager torch gives, and one that does not is not used."""

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models import SwinTransformer
from torch import Tensor, nn

from mlc.configs.errors import MlcError
from mlc.extract import engines, onnx_engine
from mlc.extract.backbone import BackboneConfig, load_backbone
from mlc.extract.engines import (
    ENGINES,
    PREFERENCE,
    TOLERANCE,
    check_engine,
    choose_engine,
    require_precision,
    tolerance_of,
)
from mlc.extract.fold import fold_batchnorms, foldable
from mlc.extract.forward import Engine, FixedBatch, ForwardPass, sample_pixels
from mlc.extract.layers import LayerReader
from mlc.extract.network import Network
from mlc.extract.onnx_engine import build_onnxruntime

BATCH = 3
# By backbone: size, and layers of every shape that it has.
CASES = {
    "test_resnet": (64, ("pre_logits", "layer2", "layer1.0.bn1", "bn1")),
    "test_efficientnet": (64, ("pre_logits", "blocks.1", "conv_stem")),
    "test_vit": (64, ("pre_logits", "blocks.1", "patch_embed")),
    "small_swin": (56, ("pre_logits", "layers.1")),
}


@cache
def eager(name: str = "test_resnet", **settings: Any) -> ForwardPass:
    if name == "small_swin":
        return small_swin()
    size_px, layers = CASES[name]
    values = {"layers": layers, "features": ("pooled", "tokens"), "size_px": size_px} | settings
    loaded = load_backbone(
        BackboneConfig(backbone=name, random_weights=True, device="cpu", engine="torch", **values)
    )
    torch.manual_seed(0)
    for each in loaded.module.modules():
        if isinstance(each, nn.BatchNorm2d):  # as after training; fresh ones do next to nothing
            each.running_mean.normal_(0, 0.2)
            each.running_var.uniform_(0.5, 2)
            each.weight.data.uniform_(0.5, 1.5)
            each.bias.data.normal_(0, 0.2)
    return loaded.forward


def small_swin() -> ForwardPass:
    """Return a Swin of 2 stages: timm's smallest would take longer than all the others."""
    size_px, layers = CASES["small_swin"]
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 0}
    module = SwinTransformer(img_size=size_px, **options).eval().requires_grad_(False)
    half = (0.5,) * 3
    network = Network(
        "small_swin", module, "none", size_px, size_px, "bicubic", half, half,
        final="forward_features", channels_last=True,
    )  # fmt: skip
    return ForwardPass(LayerReader(network, layers, ("pooled", "tokens")), half, half)


@cache
def built(engine: str, name: str) -> Engine:
    if engine == "onnxruntime":
        need_onnxruntime()
    return ENGINES[engine](eager(name), BATCH)


def need_onnxruntime() -> None:
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="the extra onnx is not installed")


@torch.inference_mode()
def run(engine: Engine, pixels: Tensor) -> dict[str, Tensor]:
    return engine(pixels)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


# --- every engine --------------------------------------------------------------------------------

ENGINE_CASES = [
    *[("folded", name) for name in CASES],
    *[("onnxruntime", name) for name in CASES],
    *[pytest.param("inductor", name, marks=pytest.mark.slow) for name in CASES],
]


@pytest.mark.parametrize(("engine", "name"), ENGINE_CASES)
def test_an_engine_gives_the_features_of_eager_torch(engine: str, name: str) -> None:
    forward = eager(name)
    pixels = sample_pixels(forward, 2 * BATCH + 1)
    for count in (1, BATCH, BATCH + 1, 2 * BATCH + 1):
        got, want = run(built(engine, name), pixels[:count]), run(forward, pixels[:count])
        assert list(got) == list(want)
        for array, values in want.items():
            assert got[array].dtype == torch.float32
            assert got[array].shape == values.shape
            size = values.flatten(1).norm(dim=1)
            apart = (got[array] - values).flatten(1).norm(dim=1)
            assert size.min() > 1e-2
            assert (apart <= TOLERANCE * size).all()
            spread = float(values.square().mean().sqrt())
            torch.testing.assert_close(got[array], values, rtol=0, atol=5 * TOLERANCE * spread)


@pytest.mark.parametrize(("engine", "name"), ENGINE_CASES)
def test_the_same_batch_gives_the_same_bits(engine: str, name: str) -> None:
    pixels = sample_pixels(eager(name), BATCH)
    assert_same(run(built(engine, name), pixels), run(built(engine, name), pixels.clone()))


def test_torch_is_the_pass_itself() -> None:
    assert ENGINES["torch"](eager(), BATCH) is eager()


def test_an_engine_leaves_the_pixels_alone() -> None:
    pixels = sample_pixels(eager(), BATCH - 1)
    before = pixels.clone()
    run(built("folded", "test_resnet"), pixels)
    run(FixedBatch(eager(), BATCH), pixels)
    assert torch.equal(pixels, before)


def test_the_eager_pass_is_that_of_the_backbone() -> None:
    settings = {"random_weights": True, "device": "cpu", "size_px": 64}
    loaded = load_backbone(BackboneConfig(backbone="test_resnet", engine="torch", **settings))
    forward = loaded.forward
    pixels = sample_pixels(forward, BATCH)
    assert_same(run(forward, pixels), loaded.features(pixels.numpy()))


# --- batches of one size -------------------------------------------------------------------------


def test_batches_of_one_size_serve_batches_of_any() -> None:
    sizes: list[int] = []

    def means(pixels: Tensor) -> dict[str, Tensor]:
        sizes.append(len(pixels))
        return {"mean": pixels.float().mean((1, 2)), "first": pixels[:, 0, 0].float()}

    pixels = torch.arange(7 * 2 * 2 * 3, dtype=torch.uint8).view(7, 2, 2, 3)
    for count in range(1, 8):
        got = FixedBatch(means, 3)(pixels[:count])
        assert_same(got, means(pixels[:count]))
        assert set(sizes[:-1]) == {3}
        sizes.clear()


# --- folding -------------------------------------------------------------------------------------


def norms(module: nn.Module) -> list[str]:
    return [name for name, each in module.named_modules() if isinstance(each, nn.BatchNorm2d)]


def test_every_batchnorm_of_a_resnet_is_folded_and_nothing_else_changes() -> None:
    forward = eager("test_resnet")
    before = {
        name: each.clone() for name, each in forward.reader.network.module.state_dict().items()
    }
    old, new = forward.reader.network.module, fold_batchnorms(forward).reader.network.module
    folded = {norm for _, norm in foldable(forward.reader)}
    assert folded == set(norms(old))
    assert not norms(new)
    kinds = {name: type(each) for name, each in old.named_modules() if name not in folded}
    assert {name: type(new.get_submodule(name)) for name in kinds} == kinds
    assert {name for name, _ in new.named_modules()} == {name for name, _ in old.named_modules()}
    for name, each in forward.reader.network.module.state_dict().items():
        assert torch.equal(each, before[name])


def test_a_batchnorm_keeps_its_activation() -> None:
    forward = eager("test_efficientnet")
    old, new = forward.reader.network.module, fold_batchnorms(forward).reader.network.module
    with_act = [name for name, each in old.named_modules() if type(each) is BatchNormAct2d]
    assert with_act
    for name in set(with_act) - set(norms(new)):
        assert type(new.get_submodule(f"{name}.act")) is type(old.get_submodule(f"{name}.act"))


def test_a_convolution_that_is_read_keeps_its_batchnorm() -> None:
    read = eager("test_efficientnet")
    unread = eager("test_efficientnet", layers=("pre_logits",))
    stem = ("conv_stem", "bn1")
    assert stem in foldable(unread.reader)
    assert stem not in foldable(read.reader)
    assert norms(fold_batchnorms(read).reader.network.module) == ["bn1"]


@pytest.mark.parametrize("name", ["test_vit", "small_swin"])
def test_without_a_batchnorm_nothing_is_folded(name: str) -> None:
    assert fold_batchnorms(eager(name)) is eager(name)


class Branches(nn.Module):
    """Convolutions of which some may not be folded, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "used_twice", "run_twice", "changed", "between"):
            self.add_module(name, nn.Conv2d(3, 3, 1))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(3))
        self.shared_norm = nn.BatchNorm2d(3)
        self.one, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain_norm(self.plain(x))
        y = self.used_twice(x)
        x = self.used_twice_norm(y) + y
        x = self.run_twice_norm(self.run_twice(self.run_twice(x)))
        x = self.changed_norm(self.changed(x).mul_(2))
        x = self.between_norm(self.between(x).relu())
        x = self.shared_norm(self.one(x)) + self.shared_norm(self.other(x))
        return x.mean((2, 3))


def test_only_a_norm_that_alone_reads_one_convolution_is_folded() -> None:
    torch.manual_seed(0)
    module = Branches().eval().requires_grad_(False)
    for name in norms(module):
        module.get_submodule(name).running_mean.normal_()
    zeros, ones = (0.0,) * 3, (1.0,) * 3
    network = Network("branches", module, "none", 8, 8, "bilinear", zeros, ones, None)
    forward = ForwardPass(LayerReader(network, (), ("pooled",)), zeros, ones)
    assert foldable(forward.reader) == [("plain", "plain_norm")]
    pixels = sample_pixels(forward, 2)
    assert check_engine(fold_batchnorms(forward), forward, pixels).largest < TOLERANCE


def test_training_norms_and_changed_weights_are_left() -> None:
    def found(convolution: nn.Module, norm: nn.Module) -> list[tuple[str, str]]:
        module = nn.Sequential(convolution, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network = Network("two", module, "none", 8, 8, "bilinear", (0.0,), (1.0,), None)
        return foldable(LayerReader(network, (), ("pooled",)))

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    norm = nn.BatchNorm2d(4)
    assert found(nn.Conv2d(3, 4, 3).eval(), norm.eval()) == [("0", "1")]
    assert not found(Doubled(3, 4, 3).eval(), norm.eval())
    assert not found(nn.Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4, track_running_stats=False).eval())
    assert not found(nn.Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).train())


# --- the check and the choice --------------------------------------------------------------------


@pytest.fixture
def shipped_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" try onnxruntime first, as it does outside tests; see tests/conftest.py."""
    monkeypatch.setattr(engines, "PREFERENCE", PREFERENCE)  # as it was when this was imported
    assert engines.PREFERENCE == ("onnxruntime", "folded", "torch")


def off_by(share: float) -> Any:
    """Return a builder of engines that are wrong in one number of the last array."""

    def build(forward: ForwardPass, _: int) -> Engine:
        def wrong(pixels: Tensor) -> dict[str, Tensor]:
            arrays = {name: each.clone() for name, each in forward(pixels).items()}
            last = list(arrays)[-1]
            arrays[last].view(-1)[-1] += share * arrays[last][-1].norm()
            return arrays

        return wrong

    return build


def test_the_difference_names_the_array_and_its_share() -> None:
    pixels = sample_pixels(eager(), BATCH)
    found = check_engine(off_by(0.01)(eager(), BATCH), eager(), pixels)
    assert found.array == list(run(eager(), pixels))[-1]
    assert found.largest == pytest.approx(0.01, rel=1e-3)


def test_no_difference_is_none() -> None:
    assert check_engine(eager(), eager(), sample_pixels(eager(), 1)) == engines.Difference("", 0)


@pytest.mark.parametrize(
    "broken",
    [
        lambda arrays: {name: each.double() for name, each in arrays.items()},
        lambda arrays: {name: each[..., :-1] for name, each in arrays.items()},
        lambda arrays: dict(list(arrays.items())[:-1]),
        lambda arrays: arrays | {"more": torch.zeros(1)},
        lambda arrays: {name: each * torch.nan for name, each in arrays.items()},
    ],
    ids=["dtype", "shape", "missing", "more", "nan"],
)
def test_what_cannot_be_compared_is_infinitely_far(broken: Any) -> None:
    pixels = sample_pixels(eager(), 1)
    found = check_engine(lambda given: broken(eager()(given)), eager(), pixels)
    assert found.largest == torch.inf


def test_an_engine_that_is_wrong_for_one_image_alone_is_found() -> None:
    def wrong(pixels: Tensor) -> dict[str, Tensor]:
        arrays = eager()(pixels)
        return {name: each + 1 for name, each in arrays.items()} if len(pixels) == 1 else arrays

    assert check_engine(wrong, eager(), sample_pixels(eager(), BATCH)).largest > 0.1


def test_features_that_are_all_zero_can_be_compared() -> None:
    def zeros(pixels: Tensor) -> dict[str, Tensor]:
        return {"a/pooled": torch.zeros(len(pixels), 4)}

    def near(pixels: Tensor) -> dict[str, Tensor]:
        return {"a/pooled": torch.full((len(pixels), 4), 0.5)}

    assert check_engine(zeros, zeros, torch.zeros(2, 8, 8, 3)).largest == 0
    assert check_engine(near, zeros, torch.zeros(2, 8, 8, 3)).largest == 1


@pytest.mark.usefixtures("shipped_order")
def test_an_engine_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(forward: ForwardPass, _: int) -> Engine:
        raise AttributeError("no such thing")

    monkeypatch.setitem(ENGINES, "folded", build)
    monkeypatch.setitem(ENGINES, "onnxruntime", lambda *_: build)
    chosen = choose_engine("auto", eager(), BATCH)
    assert chosen.name == "torch"
    assert "onnxruntime is passed over: engine: onnxruntime cannot run" in chosen.note
    assert "folded cannot run test_resnet here (no such thing)" in chosen.note
    with pytest.raises(MlcError, match=r"folded cannot run test_resnet"):
        choose_engine("folded", eager(), BATCH)


def test_a_wrong_engine_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "folded", off_by(3 * TOLERANCE))
    with pytest.raises(
        MlcError, match=r"^engine: folded does not give .*test_resnet.*choose torch"
    ):
        choose_engine("folded", eager(), BATCH)


@pytest.mark.usefixtures("shipped_order")
def test_a_wrong_engine_is_passed_over_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "folded"):
        monkeypatch.setitem(ENGINES, name, off_by(3 * TOLERANCE))
    chosen = choose_engine("auto", eager(), BATCH)
    assert (chosen.name, chosen.engine) == ("torch", eager())
    assert chosen.note.startswith("onnxruntime is passed over: ")
    assert ". folded is passed over: " in chosen.note


@pytest.mark.usefixtures("shipped_order")
def test_an_engine_within_the_tolerance_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "onnxruntime", off_by(0.3 * TOLERANCE))
    chosen = choose_engine("auto", eager(), BATCH)
    assert (chosen.name, chosen.note) == ("onnxruntime", "")


@pytest.mark.usefixtures("shipped_order")
@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_auto_without_onnxruntime_folds_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    monkeypatch.setitem(sys.modules, package, None)
    chosen = choose_engine("auto", eager(), BATCH)
    assert chosen.name == "folded"
    assert chosen.note.startswith(
        f"onnxruntime is passed over: engine: onnxruntime needs the package {package}, "
    )
    assert 'pip install "mlc[onnx]"' in chosen.note
    assert choose_engine("auto", eager("test_vit"), BATCH).name == "torch"
    with pytest.raises(MlcError, match=f"needs the package {package}"):
        choose_engine("onnxruntime", eager(), BATCH)


@pytest.mark.usefixtures("shipped_order")
def test_auto_folds_where_onnxruntime_is_installed_and_does_not_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(onnx_engine, "import_module", fail)
    chosen = choose_engine("auto", eager(), BATCH)
    assert chosen.name == "folded"
    assert chosen.note.startswith("onnxruntime is passed over: ")
    assert "folded is passed over" not in chosen.note


def test_in_tests_auto_does_not_try_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """See tests/conftest.py."""
    monkeypatch.setitem(ENGINES, "onnxruntime", lambda forward, _: forward)
    chosen = choose_engine("auto", eager(), BATCH)
    assert (chosen.name, chosen.note) == ("folded", "")


class OnGpu(ForwardPass):
    """A pass that says it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def test_on_a_gpu_auto_is_torch_and_onnxruntime_is_refused() -> None:
    forward = OnGpu(eager().reader, eager().mean, eager().std, torch.bfloat16)
    chosen = choose_engine("auto", forward, BATCH)
    assert (chosen.name, chosen.engine, chosen.note) == ("torch", forward, "")
    with pytest.raises(MlcError, match=r"onnxruntime runs on a CPU here, got device 'cuda:0'"):
        choose_engine("onnxruntime", forward, BATCH)


def test_without_a_compiler_inductor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*_: object, **__: object) -> Engine:
        def fail(_: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("no C++ compiler\nfound")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(
        MlcError, match=r"test_resnet cannot be compiled here \(no C\+\+ compiler f"
    ):
        choose_engine("inductor", eager(), BATCH)


def test_an_engine_by_name_is_that_engine() -> None:
    assert choose_engine("torch", eager(), BATCH).engine is eager()
    chosen = choose_engine("folded", eager(), BATCH)
    assert (chosen.name, chosen.note) == ("folded", "")
    nothing = choose_engine("folded", eager("test_vit"), BATCH)
    assert (nothing.name, nothing.note) == (
        "torch",
        "folded: there is no BatchNorm to fold, torch runs",
    )


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(MlcError, match=r"unknown engine 'onnxrt'; did you mean 'onnxruntime'"):
        choose_engine("onnxrt", eager(), BATCH)


def test_reduced_precision_is_refused_on_a_cpu() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(MlcError, match=r"^precision: b?float16 is for GPUs.*got device 'cpu'"):
            require_precision(dtype, torch.device("cpu"))
        require_precision(dtype, torch.device("cuda"))
    require_precision(torch.float32, torch.device("cpu"))


def test_the_sample_is_the_same_every_time_and_looks_like_photos() -> None:
    torch.manual_seed(1)
    pixels = sample_pixels(eager(), 2)
    torch.manual_seed(2)
    assert torch.equal(pixels, sample_pixels(eager(), 2))
    assert pixels.shape == (2, 64, 64, 3)
    steps = pixels.float().diff(dim=1).abs().mean()
    assert 2 < steps < 40 < pixels.float().std()
    assert tolerance_of(eager()) == TOLERANCE


# --- onnxruntime ---------------------------------------------------------------------------------


def test_onnxruntime_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_onnxruntime()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    engine = build_onnxruntime(eager(), BATCH, threads=1)
    run(engine, sample_pixels(eager(), 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("shipped_order")
def test_onnxruntime_is_what_auto_takes_where_it_is_installed() -> None:
    need_onnxruntime()
    chosen = choose_engine("auto", eager(), BATCH)
    assert (chosen.name, chosen.note) == ("onnxruntime", "")


def test_weights_above_the_limit_of_a_message_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_engine, "MOST_BYTES", 1000)
    with pytest.raises(MlcError, match=r"test_resnet has 0\.0 GB of weights.*choose folded"):
        onnx_engine.export_graph(eager(), BATCH)
