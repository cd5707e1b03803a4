"""Official checkpoints: a small made-up one in every respect, the six real ones on request."""

import json
import re
import resource
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden
import numpy as np
import official_weights
import pictures
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from mlc.cli import main
from mlc.configs import load_each
from mlc.configs.errors import MlcError
from mlc.extract import engines, query2label
from mlc.extract.backbone import load_backbone
from mlc.extract.config import EACH, ExtractConfig
from mlc.extract.query2label import BACKBONES, OfficialBackbone
from mlc.extract.run import extract
from mlc.heads.decoder import DecoderConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.metrics import evaluate
from mlc.heads.modules import make_head
from mlc.heads.query2label import to_official as head_to_official
from mlc.heads.run_folder import Run, read_run
from mlc.heads.train import probabilities
from mlc.models import official_layout
from mlc.models.evaluate import evaluate_checkpoint, evaluate_run
from mlc.models.official import (
    FFN_DIMS,
    NAMES,
    ImportOptions,
    import_checkpoint,
    write_official,
)
from mlc.models.official_tensors import position_code
from mlc.models.whole import backbone_flags, load_whole, predict
from mlc.report.query2label_paper import PAPER
from mlc.report.table import make_report
from mlc.store.reader import FeatureStore

SIZE_PX, GRID, WIDTH, CLASSES = 64, (2, 2), 96, ("cat", "cow", "dog")
HEAD = {"hidden_dim": WIDTH, "ffn_dim": 40, "attention_heads": 4}
SETTINGS = {
    "backbone": "tiny",
    "hidden_dim": WIDTH,
    "dim_feedforward": 40,
    "enc_layers": 1,
    "dec_layers": 2,
    "nheads": 4,
    "num_class": 3,
    "img_size": SIZE_PX,
    "pre_norm": False,
    "position_embedding": "sine",
    "keep_input_proj": False,
    "gamma_neg": 2.0,
}


TINY = OfficialBackbone("test_resnet.r160_in1k", 32, ((r"^", "body."),), counters=False)
MARK = ("body.layer4.0.conv1.weight", (WIDTH, 192, 3, 3))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an official model of a small ResNet."""
    monkeypatch.setitem(BACKBONES, "tiny", TINY)
    monkeypatch.setitem(official_layout.MARKS, "tiny", MARK)
    monkeypatch.setitem(NAMES, ("tiny", SIZE_PX), "Q2L-tiny-64")
    monkeypatch.setitem(FFN_DIMS, "Q2L-tiny-64", 40)
    monkeypatch.setattr(engines, "PREFERENCE", ("torch",))  # the others take seconds to build


def made(width: int = WIDTH, **sizes: Any) -> dict[str, Tensor]:
    """Tensors of a small model by their official names, each of its own random numbers."""
    config = DecoderConfig(**(HEAD | {"hidden_dim": width} | sizes))
    head = make_head("q2l", HeadSize(WIDTH, len(CLASSES), GRID), config, torch.Generator())
    backbone = {
        f"backbone.0.body.{name}": each
        for name, each in timm.create_model("test_resnet", num_classes=0).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    random = torch.Generator().manual_seed(0)
    drawn = {"backbone.1.pe": position_code(GRID, width)}
    for name, each in (backbone | head_to_official(head.state_dict())).items():
        spread = 0.2 if each.ndim < 2 else 1.5 * each[0].numel() ** -0.5
        values = spread * torch.randn(each.shape, generator=random)
        is_scale = each.ndim == 1 and name.endswith(("weight", "running_var"))
        drawn[name] = (1 + values).abs() if is_scale else values
    return drawn


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return made()


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def write_json(path: Path, **changed: Any) -> Path:
    path.write_text(json.dumps(SETTINGS | changed))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    return save(tmp_path / "checkpoint.pkl", {"state_dict": tensors, "epoch": 3, "arch": "Q2L"})


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Run:
    return import_checkpoint(checkpoint, ImportOptions(out=tmp_path / "run", classes=CLASSES))


def extraction_of(run: Run, **flags: Any) -> ExtractConfig:
    (config,) = load_each(ExtractConfig, "extract", EACH, flags=backbone_flags(run, flags))
    return config


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return pictures.write_data(tmp_path / "photos", bad=False)


def by_hand(tensors: Mapping[str, Tensor], file: Path) -> np.ndarray:
    """Logits of one photo, by timm's model and torch's normalisation."""
    with Image.open(file) as image:
        square = image.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    backbone = timm.create_model("test_resnet", num_classes=0).eval()
    prefix = "backbone.0.body."
    backbone.load_state_dict(
        {name.removeprefix(prefix): each for name, each in tensors.items() if prefix in name},
        strict=False,
    )
    head = make_head("q2l", HeadSize(WIDTH, 3, GRID), DecoderConfig(**HEAD), torch.Generator())
    head.load_state_dict({name: each for name, each in tensors.items() if "backbone" not in name})
    with torch.inference_mode():
        maps = backbone.forward_features(((pixels - mean) / std)[None])
        return head.eval()(maps.flatten(2).mT)[0].numpy()


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, each in want.items():
        assert (got[name].shape, got[name].dtype) == (each.shape, each.dtype), name
        assert torch.equal(got[name], each), name


# --- import --------------------------------------------------------------------------------------


def test_a_run_folder_says_what_it_is(run: Run) -> None:
    assert run.results["official"] is None  # of three classes; the official ones have COCO's
    assert run.is_imported
    assert run.classes == CLASSES
    config, features = run.config, run.results["features"]
    assert (config.head, config.hidden_dim, config.ffn_dim) == ("q2l", WIDTH, 40)
    assert (config.encoder_layers, config.decoder_layers) == (1, 2)
    assert (config.attention_heads, config.self_attention) == (4, "none")
    assert (config.threshold, config.input_projection) == (0.823, False)
    assert (features["width"], features["grid"]) == (WIDTH, [2, 2])
    key = features["key"]
    assert (key["backbone"], key["size_px"], key["resize"]) == ("test_resnet", 64, "squash")
    assert key["interpolation"] == "bilinear"
    assert key["mean"] == [0.485, 0.456, 0.406]
    assert not {"val", "test"} & run.results.keys() - {"selection_mAP"}
    names = {each.name for each in run.path.iterdir()}
    assert names == {"config.yaml", "head.safetensors", "backbone.safetensors", "results.json"}


def of_80_classes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    width = tensors["query_embed.weight"].shape[1]
    return tensors | {
        "query_embed.weight": torch.randn(80, width),
        "fc.W": torch.randn(1, 80, width),
        "fc.b": torch.randn(1, 80),
    }


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_dim": 32, "input_projection": True},
        {"ffn_dim": 48},
        {"encoder_layers": 2},
        {"decoder_layers": 1},
        {"self_attention": "first"},
    ],
)
def test_a_head_of_other_sizes_is_not_the_official_one(
    tmp_path: Path, sizes: dict[str, Any]
) -> None:
    path = save(tmp_path / "c.pkl", of_80_classes(made(sizes.pop("hidden_dim", WIDTH), **sizes)))
    layers = {f"{kind[:3]}_layers": sizes.get(f"{kind}_layers") for kind in ("encoder", "decoder")}
    settings = tmp_path / "config_new.json"
    settings.write_text(json.dumps({name: each for name, each in layers.items() if each}))
    run = import_checkpoint(path, ImportOptions(settings, tmp_path / "run"))
    assert (run.results["official"], len(run.classes)) == (None, 80)


def test_a_head_of_80_other_classes_is_not_the_official_one(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = save(tmp_path / "c.pkl", of_80_classes(tensors))
    others = tuple(f"bird {index}" for index in range(80))
    run = import_checkpoint(path, ImportOptions(out=tmp_path / "run", classes=others))
    assert (run.results["official"], run.results["dataset"]) == (None, None)


def test_names_of_folder_model_and_classes_are_those_of_the_official_one(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = import_checkpoint(save(tmp_path / "checkpoint.pkl", of_80_classes(tensors)))
    assert run.results["official"] == "Q2L-tiny-64"
    assert run.results["dataset"] == "coco"
    assert (run.classes[0], run.classes[79], len(run.classes)) == ("person", "toothbrush", 80)
    assert run.path.parent.name == "runs"
    name, _, digest = run.path.name.rpartition("-")
    assert (name, len(digest)) == ("Q2L-tiny-64", 8)
    # The same again is not imported again; with other settings it is another run.
    stamp = (run.path / "results.json").stat().st_mtime_ns
    assert import_checkpoint(tmp_path / "checkpoint.pkl").path == run.path
    assert (run.path / "results.json").stat().st_mtime_ns == stamp
    plain = write_json(tmp_path / "plain.json", num_class=80, orid_norm=True)
    other = import_checkpoint(tmp_path / "checkpoint.pkl", ImportOptions(config_json=plain))
    assert other.path != run.path
    assert other.results["features"]["key"]["mean"] == [0.0, 0.0, 0.0]
    assert other.results["features"]["key"]["std"] == [1.0, 1.0, 1.0]


def test_all_six_have_the_names_of_the_papers_table() -> None:
    own = {key: name for key, name in NAMES.items() if key[0] != "tiny"}
    assert set(own.values()) == set(PAPER) == set(official_weights.NAMES)
    for (backbone, size_px), name in own.items():
        assert PAPER[name].size_px == size_px
        assert BACKBONES[backbone].backbone.partition(".")[0] in PAPER[name].backbones
        assert {BACKBONES[backbone].backbone} <= {*PAPER[name].weights, "cvt_w24"}
        keys = golden.load(f"q2l/{name}.json")["keys"]
        layer = "transformer.decoder.layers.0.linear1.weight"
        assert keys[layer][0] == [FFN_DIMS[name], keys["query_embed.weight"][0][1]]


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_or_not_and_from_several_gpus_or_not(
    tmp_path: Path, tensors: dict[str, Tensor], run: Run, wrapper: str | None, prefix: str
) -> None:
    content: Any = {prefix + name: each for name, each in tensors.items()}
    content = content if wrapper is None else {wrapper: content, "optimizer": {"lr": 1e-4}}
    options = ImportOptions(out=tmp_path / "other", classes=CLASSES)
    other = import_checkpoint(save(tmp_path / "other.pkl", content), options)
    same(other.head().state_dict(), run.head().state_dict())
    assert other.results["features"]["key"] == run.results["features"]["key"]


def test_files_of_before_zip_open_too(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    old = tmp_path / "old.pkl"
    torch.save({"state_dict": tensors}, old, _use_new_zipfile_serialization=False)
    same(
        import_checkpoint(old, ImportOptions(out=tmp_path / "run")).head().state_dict(),
        {name: each for name, each in tensors.items() if "backbone" not in name},
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {"self_attention": "all"},
        {"self_attention": "first"},
        {"self_attention": "others", "decoder_layers": 3},
        {"encoder_layers": 2, "decoder_layers": 1},
        {"input_projection": True},
        {"width": 32},
    ],
)
def test_other_heads_are_known_by_their_tensors(tmp_path: Path, sizes: dict[str, Any]) -> None:
    tensors = made(**sizes)
    path = save(tmp_path / "checkpoint.pkl", tensors)
    options = ImportOptions(out=tmp_path / "run")
    if sizes.keys() & {"encoder_layers", "decoder_layers"}:
        layers = {"enc_layers": sizes.get("encoder_layers", 1), "dec_layers": 1}
        layers["dec_layers"] = sizes.get("decoder_layers", 2)
        settings = tmp_path / "config_new.json"
        settings.write_text(json.dumps(layers))
        options = replace(options, config_json=settings)
    run = import_checkpoint(path, options)
    config = run.config.model_dump()
    assert config["hidden_dim"] == sizes.pop("width", WIDTH)
    projects = "input_proj.weight" in tensors
    assert config["input_projection"] == projects
    assert {name: config[name] for name in sizes} == sizes
    again = tmp_path / "again.pkl"
    write_official(run, again)
    same(torch.load(again)["state_dict"], tensors)
    assert run.head()(torch.zeros(2, 4, WIDTH)).shape == (2, 3)


# --- whole ---------------------------------------------------------------------------------------


def test_evaluation_is_that_of_the_parts_by_hand(
    tmp_path: Path, checkpoint: Path, tensors: dict[str, Tensor], photos: Path
) -> None:
    options = ImportOptions(out=tmp_path / "run", classes=CLASSES)
    run, metrics, bad = evaluate_checkpoint(
        checkpoint, {"data": str(photos)}, "test", options=options, device="cpu"
    )
    assert not bad
    scores = run.scores()
    files = [photos.parent / name for name in scores["image_id"].tolist()]
    assert len(files) == 4
    want = np.stack([by_hand(tensors, file) for file in files])
    np.testing.assert_allclose(scores["logits"], want, rtol=1e-4, atol=1e-4)
    assert float(want.std(axis=0).min()) > 1e-3  # it does look at the photos
    assert metrics == evaluate(probabilities(want), scores["true"], CLASSES, 0.823)
    assert run.results["test"] == metrics
    assert run.results["dataset"] == "csv-photos"
    row = make_report([run], resamples=20).rows[0]
    assert row.test == metrics["mAP"]
    # A second time it is there, and another threshold changes what is above it alone.
    _, other, _ = evaluate_checkpoint(
        checkpoint, {"data": str(photos)}, options=options, threshold=0.0, device="cpu"
    )
    assert (other["mAP"], other["threshold"], other["CR"]) == (metrics["mAP"], 0.0, 100.0)


def test_the_folder_can_be_moved_and_predicts(
    tmp_path: Path,
    run: Run,
    tensors: dict[str, Tensor],
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    run.path.rename(moved)
    monkeypatch.chdir(moved.parent)
    model = load_whole(read_run(Path("model")), device="cpu")
    assert predict(model, photos.parent, tmp_path / "scores.csv")[0] == len(pictures.FILES)
    line = (tmp_path / "scores.csv").read_text().splitlines()[1].split(",")
    want = probabilities(by_hand(tensors, photos.parent / line[0]))
    np.testing.assert_allclose([float(each) for each in line[1:]], want, atol=1e-5)


def test_its_head_on_cached_tokens_gives_the_logits_of_the_whole(
    tmp_path: Path, run: Run, photos: Path
) -> None:
    asked = {"features": "tokens:float32", "data": str(photos), "device": "cpu"}
    config = extraction_of(run, **asked, out=tmp_path / "s.zarr")
    assert config.features == ("tokens:float32",)
    store = extract(config).path
    with FeatureStore(store) as opened:
        tokens = torch.from_numpy(opened.features(kind="tokens").read_all())
        key, files = opened.key, [photos.parent / name for name in opened.image_id.tolist()]
    assert {name: value for name, value in key.items() if name not in ("features", "engine")} == {
        name: value
        for name, value in run.results["features"]["key"].items()
        if name not in ("features", "engine")
    }
    with torch.inference_mode():
        cached = run.head()(tokens).numpy()
    whole, _ = load_whole(run, device="cpu").logits(files)
    np.testing.assert_allclose(cached, whole, rtol=1e-5, atol=1e-5)


def test_it_is_evaluated_on_a_store_of_its_backbone(tmp_path: Path, run: Run, photos: Path) -> None:
    config = extraction_of(run, data=str(photos), device="cpu", out=tmp_path / "s.zarr")
    assert config.features == ("tokens:float16",)
    store = extract(config).path
    on_store, _ = evaluate_run(run, {"features": store}, device="cpu")
    on_images, _ = evaluate_run(run, {"data": str(photos)}, device="cpu")
    assert on_store["images"] == on_images["images"] == 4
    assert on_store["mAP"] == pytest.approx(on_images["mAP"])
    assert on_store["threshold"] == 0.823


def test_another_backbone_beside_a_runs_is_refused(run: Run) -> None:
    with pytest.raises(MlcError, match=r"^backbone: got resnet18 beside the backbone of .*run;"):
        backbone_flags(run, {"backbone": "resnet18"})


def test_another_backbones_weights_do_not_load(run: Run) -> None:
    for name in ("test_vit", "test_efficientnet"):
        config = extraction_of(run, device="cpu").model_copy(update={"backbone": name})
        with pytest.raises(MlcError, match=rf"are of test_resnet, got backbone {name}; name"):
            load_backbone(config)


def test_its_backbone_is_cached_by_the_command_line(
    tmp_path: Path, run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its licence has a comma, which parts several backbones elsewhere."""
    monkeypatch.chdir(tmp_path)
    command = ("extract", "--backbone-of", "run", "--data", str(photos), "--device", "cpu")
    (tmp_path / "fast.yaml").write_text("decode: fast\n")
    main([*command, "--out", "s.zarr"])
    main([*command, "--out", "set.zarr", "--set", "decode=fast"])
    main([*command, "--out", "recipe.zarr", "--config", "fast.yaml"])
    decodes = {}
    for name in ("s", "set", "recipe"):
        with FeatureStore(tmp_path / f"{name}.zarr") as opened:
            decodes[name] = opened.key["decode"]
            assert opened.key["weights"] == run.results["features"]["key"]["weights"]
            assert opened.made_by["weights_licence"] == "unknown, see where checkpoint.pkl is from"
    assert decodes["set"] == decodes["recipe"] != decodes["s"]


@pytest.mark.parametrize(
    "asked", [("--set", "backbone=resnet18"), ("--set", "weights=x.pth"), ("--config", "r.yaml")]
)
def test_another_backbone_in_a_recipe_is_refused_too(
    tmp_path: Path,
    run: Run,
    asked: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("backbone: resnet18\n")
    with pytest.raises(SystemExit):
        main(["extract", "--backbone-of", str(run.path), *asked])
    assert re.search(r"(backbone|weights): got \S+ beside the backbone of", capsys.readouterr().err)


def test_without_scores_a_report_is_one_sentence(run: Run) -> None:
    with pytest.raises(MlcError, match=r"run: an imported checkpoint that has no scores yet; mlc"):
        make_report([run])


def test_a_folder_that_lacks_something_is_damaged(run: Run) -> None:
    (run.path / "backbone.safetensors").unlink()
    with pytest.raises(MlcError, match=r"a damaged run folder, backbone.safetensors: missing"):
        read_run(run.path)


# --- export --------------------------------------------------------------------------------------


def test_there_and_back_is_the_same_to_the_bit(
    tmp_path: Path, run: Run, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "again.pkl"
    write_official(run, path)
    written = torch.load(path)
    assert list(written) == ["state_dict"]
    same(written["state_dict"], tensors)
    again = import_checkpoint(path, ImportOptions(out=tmp_path / "again", classes=CLASSES))
    same(again.head().state_dict(), run.head().state_dict())
    first, second = ((each.path / "backbone.safetensors").read_bytes() for each in (run, again))
    assert first.replace(b"checkpoint.pkl", b"again.pkl")[-2000:] == second[-2000:]
    assert again.results["features"]["key"] == run.results["features"]["key"]


# --- files that do not fit -----------------------------------------------------------------------


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(MlcError) as error:
        import_checkpoint(path, ImportOptions(out=path.parent / "refused", **options))
    assert not (path.parent / "refused").exists()
    assert not list(path.parent.glob(".refused*"))
    return str(error.value)


def test_all_that_does_not_fit_is_listed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    missing = (
        "fc.W",
        "transformer.decoder.norm.bias",
        "backbone.0.body.layer1.0.conv1.weight",
        "backbone.0.body.layer2.0.bn1.bias",
    )
    extra = ("fc.weight", "transformer.decoder.layers.0.norm1.weight", "backbone.0.body.fc.weight")
    reshaped = (
        "query_embed.weight",
        "transformer.encoder.layers.0.linear1.weight",
        "backbone.0.body.layer4.0.bn1.weight",
    )
    changed = {name: each for name, each in tensors.items() if name not in missing}
    changed |= {name: torch.zeros(7, 5) for name in (*extra, *reshaped)}
    message = refused(save(tmp_path / "checkpoint.pkl", changed))
    for name in (*missing, *extra, *reshaped):
        assert name.removeprefix("backbone.0.") in message, name
    assert all(f"{name} is [7, 5], expected [" in message for name in reshaped[:2])
    assert "body.layer4.0.bn1.weight is [7, 5], expected [96]" in message
    assert "head: 2 missing (" in message
    assert "expected [40, 96]" in message


@pytest.mark.parametrize("name", ["input_proj.weight", "transformer.decoder.norm.weight", "fc.W"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_tensor_of_too_few_axes_is_listed_like_any(
    tmp_path: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> None:
    message = refused(save(tmp_path / "c.pkl", tensors | {name: torch.zeros(shape)}))
    assert f"{name} is {list(shape)}, expected [" in message


@pytest.mark.parametrize("lost", ["backbone.1.pe", MARK[0]])
def test_what_tells_most_may_be_missing_too(
    tmp_path: Path, tensors: dict[str, Tensor], lost: str
) -> None:
    lost = lost if lost.startswith("backbone") else f"backbone.0.{lost}"
    changed = {name: each for name, each in tensors.items() if name not in (lost, "fc.b")}
    path = save(tmp_path / "checkpoint.pkl", changed)
    message = refused(path, config_json=write_json(tmp_path / "config_new.json"))
    assert "1 missing" in message or "2 missing" in message
    assert lost.removeprefix("backbone.0.") in message
    assert "fc.b" in message


def test_another_position_code_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    code = tensors["backbone.1.pe"]
    turned = tensors | {"backbone.1.pe": code.transpose(2, 3).contiguous()}
    assert "backbone.1.pe is no sine position code" in refused(save(tmp_path / "c.pkl", turned))
    near = tensors | {"backbone.1.pe": code + 5e-5}
    import_checkpoint(save(tmp_path / "d.pkl", near), ImportOptions(out=tmp_path / "run"))


def test_half_precision_is_rounded_and_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        half = {name: each.to(dtype) for name, each in tensors.items()}
        name = str(dtype).removeprefix("torch.")
        run = import_checkpoint(
            save(tmp_path / f"{name}.pkl", half), ImportOptions(out=tmp_path / name)
        )
        assert torch.equal(run.head().state_dict()["fc.b"], half["fc.b"].float())
        code = tensors["backbone.1.pe"]
        wrong = save(tmp_path / "wrong.pkl", half | {"backbone.1.pe": (code + 0.02).to(dtype)})
        assert "backbone.1.pe is no sine position code" in refused(wrong)


def test_integers_are_no_weights(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    names = ("fc.b", "backbone.1.pe", "backbone.0.body.layer1.0.bn1.weight")
    rounded = {name: tensors[name].long() for name in names}
    message = refused(save(tmp_path / "c.pkl", tensors | rounded))
    assert "2 of integers (" in message
    assert "1 of integers (body.layer1.0.bn1.weight)" in message


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        ("transformer.decoder.", "dec_layers: should be at least 1, got 0; pass a whole file"),
        ("transformer.encoder.", "enc_layers: should be 1 as in the released models, got 0; if"),
        ("transformer.decoder.layers.1.", "dec_layers: should be 2 as in the released mo"),
    ],
)
def test_a_file_that_lacks_whole_layers_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], prefix: str, sentence: str
) -> None:
    cut = {name: each for name, each in tensors.items() if not name.startswith(prefix)}
    message = refused(save(tmp_path / "c.pkl", cut))
    assert sentence in message
    if "released" in sentence:
        assert message.endswith("in the JSON of --config-json")


def test_a_file_without_classes_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    none = {"query_embed.weight": (0, WIDTH), "fc.W": (1, 0, WIDTH), "fc.b": (1, 0)}
    empty = tensors | {name: torch.zeros(shape) for name, shape in none.items()}
    message = refused(save(tmp_path / "c.pkl", empty))
    assert "num_class: should be at least 1, got 0" in message


def test_scales_with_signs_are_written_as_they_were(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query2label, "SCALE", re.compile(r"bn1\.weight$"))
    monkeypatch.setitem(BACKBONES, "tiny", replace(TINY, abn=True))
    name = "backbone.0.body.layer1.0.bn1.weight"
    negative = tensors | {name: -tensors[name]}
    options = ImportOptions(out=tmp_path / "run", signed_scales=True)
    run = import_checkpoint(save(tmp_path / "c.pkl", negative), options)
    write_official(run, tmp_path / "again.pkl")
    same(torch.load(tmp_path / "again.pkl")["state_dict"], negative)


def test_signed_scales_of_another_backbone_are_refused(checkpoint: Path) -> None:
    message = refused(checkpoint, signed_scales=True)
    assert "--signed-scales is of models with InPlaceABN, TResNets, got a backbone tiny" in message


@contextmanager
def a_full_disk(room: int) -> Iterator[None]:
    """No file can be longer than this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence(tmp_path: Path, checkpoint: Path, run: Run) -> None:
    with a_full_disk(20_000):
        assert f"{tmp_path}: cannot be written (" in refused(checkpoint)
        with pytest.raises(MlcError, match=r"again.pkl: cannot be written \(.*has room, and try"):
            write_official(run, tmp_path / "again.pkl")
    assert not list(tmp_path.glob("*again*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], value: float
) -> None:
    broken = tensors["fc.b"].clone()
    broken[0, 1] = value
    message = refused(save(tmp_path / "c.pkl", tensors | {"fc.b": broken}))
    assert "1 tensors have NaN or infinite numbers (fc.b)" in message


def test_a_file_with_programs_opens_only_if_asked(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = save(tmp_path / "c.pkl", {"state_dict": tensors, "args": Namespace(lr=1e-4)})
    message = refused(path)
    assert "as pickles can run any program" in message
    assert message.endswith("if you trust who made it, pass --unsafe-checkpoint")
    import_checkpoint(path, ImportOptions(out=tmp_path / "run", unsafe=True))


@pytest.mark.parametrize("unsafe", [False, True])
def test_other_files_are_one_sentence(tmp_path: Path, unsafe: bool) -> None:
    (tmp_path / "a.pkl").write_bytes(b"no checkpoint")
    assert "a.pkl: not a checkpoint" in refused(tmp_path / "a.pkl", unsafe=unsafe)
    assert "b.pkl: no such file" in refused(tmp_path / "b.pkl", unsafe=unsafe)
    path = save(tmp_path / "c.pkl", {"epoch": 3})
    assert "expected named tensors" in refused(path, unsafe=unsafe)
    path = save(tmp_path / "d.pkl", {"weight": torch.zeros(3)})
    assert "of no official Query2Label model; choose from CvT_w24, " in refused(path)
    assert "expected named tensors" in refused(save(tmp_path / "e.pkl", [1, 2]))


# --- the JSON ------------------------------------------------------------------------------------


def test_a_json_that_agrees_changes_nothing(tmp_path: Path, checkpoint: Path, run: Run) -> None:
    path = write_json(tmp_path / "config_new.json", keep_other_self_attn_dec=False)
    options = ImportOptions(path, tmp_path / "other", CLASSES)
    other = import_checkpoint(checkpoint, options)
    assert other.config.model_dump(exclude={"out"}) == run.config.model_dump(exclude={"out"})
    assert other.results["features"] == run.results["features"]


def test_heads_and_dropout_are_what_the_json_says(tmp_path: Path, checkpoint: Path) -> None:
    path = write_json(tmp_path / "config_new.json", nheads=8, dropout=0.3)
    run = import_checkpoint(checkpoint, ImportOptions(path, tmp_path / "run", CLASSES))
    assert (run.config.attention_heads, run.config.dropout) == (8, 0.3)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_dim", 128, "hidden_dim: the JSON has 128, the tensors 96"),
        ("dim_feedforward", 96, "dim_feedforward: the JSON has 96, the tensors 40"),
        ("num_class", 80, "num_class: the JSON has 80, the tensors 3"),
        ("img_size", 448, "img_size: the JSON has 448, the tensors 64"),
        ("enc_layers", 2, "enc_layers: the JSON has 2, the tensors 1"),
        ("dec_layers", 6, "dec_layers: the JSON has 6, the tensors 2"),
        ("keep_input_proj", True, "keep_input_proj: the JSON has True, the tensors False"),
        ("keep_first_self_attn_dec", True, "keep_first_self_attn_dec: the JSON has True, the t"),
        ("keep_other_self_attn_dec", True, "keep_other_self_attn_dec: the JSON has True, the t"),
        ("backbone", "resnet101", "backbone: the JSON has 'resnet101', the tensors 'tiny'"),
        ("backbone", "resnet50", "unknown official backbone 'resnet50'; did you mean"),
        ("pre_norm", True, "pre_norm: true: norms before attention"),
        ("position_embedding", "learned", "position_embedding: should be sine, got 'learned'"),
        ("nheads", "4", "nheads: should be a number from 1, got '4'"),
        ("nheads", 7, "hidden_dim: should be divisible by 7"),
        ("dropout", 2, "dropout: should be at least 0 and below 1, got 2"),
    ],
)
def test_a_json_that_contradicts_is_refused(
    tmp_path: Path, checkpoint: Path, field: str, value: object, expected: str
) -> None:
    path = write_json(tmp_path / "config_new.json", **{field: value})
    assert expected in refused(checkpoint, config_json=path)


def test_a_norm_before_attention_is_known_by_its_tensors(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    more = tensors | {"transformer.encoder.norm.weight": torch.ones(WIDTH)}
    assert "transformer.encoder.norm.weight: norms before" in refused(save(tmp_path / "c", more))


def test_a_json_that_is_none_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "config_new.json"
    assert "No such file" in refused(checkpoint, config_json=path)
    path.write_text("{")
    assert "config_new.json: not JSON" in refused(checkpoint, config_json=path)
    path.write_text("[1]")
    assert "expected named settings, got list" in refused(checkpoint, config_json=path)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "b")])
def test_classes_are_named_once_each(checkpoint: Path, names: tuple[str, ...]) -> None:
    assert "classes: the checkpoint has 3, got 2" in refused(checkpoint, classes=names)


def test_another_run_is_not_overwritten(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    with pytest.raises(MlcError, match=r"run: holds another run than this checkpoint"):
        import_checkpoint(checkpoint, ImportOptions(out=run.path, classes=("a", "b", "c")))


# --- the six real ones ---------------------------------------------------------------------------


@pytest.mark.official
@pytest.mark.parametrize("name", official_weights.NAMES)
def test_logits_are_those_of_the_authors_code(tmp_path: Path, name: str) -> None:
    """Keys and logits of the whole model, through its run folder; and back, key for key."""
    began, values = time.monotonic(), golden.load(f"q2l/{name}.json")
    path = save(tmp_path / "checkpoint.pkl", {"state_dict": official_weights.weights(name)})
    run = import_checkpoint(path, ImportOptions(out=tmp_path / "run"))
    assert run.results["official"] == name
    backbone = load_backbone(extraction_of(run, device="cpu", engine="torch"), batch_size=1)
    assert backbone.key.weights == run.results["features"]["key"]["weights"]
    size_px, head, logits = values["img_size"], run.head(), []
    assert backbone.key.size_px == size_px
    with torch.inference_mode():
        for index in range(2):
            image = official_weights.image(values["image_seed"], index, size_px)[None]
            tokens = backbone.forward.reader(image)["pre_logits"].tokens
            logits.append(head(tokens)[0])
    difference = float((torch.stack(logits) - torch.tensor(values["logits"])).abs().max())
    del backbone, head, tokens
    cached = cached_and_whole(run, tmp_path)
    again = tmp_path / "again.pkl"
    write_official(run, again)
    shutil.rmtree(run.path)
    written = torch.load(again, mmap=True)["state_dict"]
    assert {
        key: [list(each.shape), str(each.dtype).removeprefix("torch.")]
        for key, each in written.items()
    } == values["keys"]
    del written
    shutil.rmtree(tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{name}: logits differ by {difference:.1e}, on cached tokens by {cached:.1e} relative, "
        f"{time.monotonic() - began:.0f} s, peak {peak:.1f} GB of this process so far"
    )
    assert difference < 1e-3
    assert cached < 1e-5


def cached_and_whole(run: Run, folder: Path) -> float:
    """How far its head on float32 tokens of a store is from the whole model, relative, at most."""
    table = pictures.write_data(folder / "photos", bad=False)
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:3]))
    asked = {"data": str(table), "features": "tokens:float32", "out": folder / "store.zarr"}
    store = extract(extraction_of(run, **asked, device="cpu", batch_size=2)).path
    with FeatureStore(store) as opened:
        tokens = torch.from_numpy(opened.features(kind="tokens").read_all())
        files = [table.parent / name for name in opened.image_id.tolist()]
    model = load_whole(run, device="cpu")
    model = replace(model, backbone=model.backbone.for_batches(2))
    whole, bad = model.logits(files)
    assert (len(files), bad) == (2, {})
    with torch.inference_mode():
        cached = model.head(tokens).numpy()
    return float(np.abs(cached - whole).max() / np.abs(whole).max())
