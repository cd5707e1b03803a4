"""Cached features are those of a straight line: Pillow, timm's model, one image at a time."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import shared
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn.functional import interpolate
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

from mlc.extract.config import ExtractConfig
from mlc.extract.run import extract
from mlc.store.reader import FeatureStore

Features = NDArray[np.float32]
Weights = Callable[[str], Path]

TOLERANCE = 1e-5  # what two orders of summing in float32 may differ by, of an image's features
SWIN = "swin_tiny_patch4_window7_224"  # timm's smallest
TINY = ("test_resnet", "test_efficientnet", "test_vit")
CASES = [
    *[("torch", name) for name in TINY],
    *[("folded", name) for name in TINY[:2]],
    ("onnxruntime", "test_resnet"),
    ("onnxruntime", "test_vit"),
    pytest.param("torch", SWIN, marks=pytest.mark.slow),
    pytest.param("onnxruntime", SWIN, marks=pytest.mark.slow),
]
ENGINES = ("torch", "folded", "onnxruntime")
SUFFIX = {"torch": ".zarr", "folded": ".h5", "onnxruntime": ".zarr"}

# Wide and high, larger and smaller than the backbones' squares, and every mode without a rule of
# its own in mlc; width, height, mode, format.
PHOTOS = {
    "wide.jpg": (500, 300, "RGB", "JPEG"),
    "high.jpg": (310, 420, "RGB", "JPEG"),
    "grey.jpg": (333, 250, "L", "JPEG"),
    "cmyk.jpg": (270, 401, "CMYK", "JPEG"),
    "small.png": (90, 61, "RGB", "PNG"),
    "palette.png": (240, 251, "P", "PNG"),
    "square.webp": (300, 300, "RGB", "WEBP"),
}


@torch.inference_mode()
def straight_line(name: str, weights: Path, photos: Sequence[Path]) -> Features:
    """(N, D): what the features of photos are, by definition."""
    model = timm.create_model(name, num_classes=0).eval()
    missing, _ = model.load_state_dict(load_file(weights), strict=False)
    assert not missing  # what is too much is the classifier
    asked = resolve_model_data_config(model)
    resize = Resize(asked["input_size"][1:], InterpolationMode(asked["interpolation"]))
    prepare = Compose([resize, ToTensor(), Normalize(asked["mean"], asked["std"])])
    rows = [model(prepare(Image.open(photo).convert("RGB"))[None]) for photo in photos]
    return torch.cat(rows).numpy()


@torch.no_grad()
def save_weights(name: str, path: Path) -> None:
    """Save random weights with which every layer and norm does something, as after training."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    for each in model.modules():
        if isinstance(each, nn.Linear):
            each.weight.normal_(0, each.in_features**-0.5)
        elif isinstance(each, nn.BatchNorm2d | nn.LayerNorm):
            each.weight.uniform_(0.5, 1.5)
            each.bias.normal_(0, 0.2)
            each.momentum = 1.0  # one batch sets the statistics, or images would hardly matter
    size = resolve_model_data_config(model)["input_size"][1:]
    model(interpolate(torch.randn(8, 3, 7, 7), size, mode="bilinear"))
    save_file(model.state_dict(), path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weights]:
    """Files of weights, each made when first asked for."""
    folder = tmp_path_factory.mktemp("weights")

    def file(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_weights(name, path)
        return path

    yield file
    shutil.rmtree(folder)  # a Swin's are 113 MB, and pytest keeps three runs


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of photos with grain, which a resize in another way would show."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, (name, (width, height, mode, file_format)) in enumerate(PHOTOS.items()):
        grain = np.random.default_rng(seed).normal(0, 25, (height, width, 3))
        pixels = (pictures.colours(width, height, seed) + grain).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).convert(mode)
        (folder / name).write_bytes(pictures.encoded(image, file_format))
    return write_table(folder / "photos.csv", list(PHOTOS))


def write_table(path: Path, files: Sequence[str]) -> Path:
    path.write_text("\n".join(["file,labels", *[f"{file},thing" for file in files]]))
    return path


def cached(table: Path, out: Path, root: Path, **settings: Any) -> tuple[Features, list[Path]]:
    """Extract into a store; return its features, and the photo of each row."""
    data = {"data": str(table), "root": root, "out": out}
    values = {"device": "cpu", "batch_size": 4, "shard_rows": 5, "workers": 2}
    extract(ExtractConfig(**data, **(values | settings)))
    with FeatureStore(out) as store:
        assert store.key["engine"] == settings["engine"]
        assert not store.errors()
        return store.pooled(), [root / file for file in store.file]


def largest(got: Features, want: Features) -> float:
    """|got - want| / |want|, Euclidean norms, of the image where it is largest."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    apart = np.linalg.norm(got.astype(np.float64) - want, axis=1)
    return float((apart / np.linalg.norm(want, axis=1)).max())


def assert_same_features(got: Features, want: Features) -> None:
    assert largest(got, want) <= TOLERANCE
    # A number of an image has the rounding of all of them, so a small one has a large share of it.
    atol = 5 * TOLERANCE * np.sqrt(np.square(want).mean())
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def need(engine: str) -> None:
    if engine == "onnxruntime":
        for package in ("onnxruntime", "onnxscript"):
            pytest.importorskip(package, reason="the extra onnx is not installed")


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_cached_features_are_those_of_the_straight_line(
    engine: str, name: str, table: Path, weights: Weights, tmp_path: Path
) -> None:
    need(engine)
    out = tmp_path / f"photos{SUFFIX[engine]}"
    asked = {"backbone": name, "weights": weights(name), "engine": engine}
    got, photos = cached(table, out, table.parent, **asked)
    assert {photo.name for photo in photos} == PHOTOS.keys()
    assert_same_features(got, straight_line(name, weights(name), photos))


# Without these, the test above might see nothing.


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("settings", [{"interpolation": "lanczos"}, {"decode": "fast"}], ids=str)
def test_what_is_not_exact_is_far_from_it(
    settings: dict[str, Any], name: str, table: Path, weights: Weights, tmp_path: Path
) -> None:
    asked = {"backbone": name, "weights": weights(name), "engine": "torch"} | settings
    got, photos = cached(table, tmp_path / "photos.zarr", table.parent, **asked)
    assert largest(got, straight_line(name, weights(name), photos)) > 30 * TOLERANCE


@pytest.mark.parametrize("name", TINY)
def test_no_two_photos_have_the_same_features(name: str, table: Path, weights: Weights) -> None:
    want = straight_line(name, weights(name), [table.parent / file for file in PHOTOS])
    for turned in range(1, len(want)):
        apart = np.linalg.norm(np.roll(want, turned, axis=0) - want, axis=1)
        assert (apart > 1000 * TOLERANCE * np.linalg.norm(want, axis=1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_real_photos_and_weights_give_the_straight_line(engine: str, tmp_path: Path) -> None:
    need(engine)
    weights = shared.need("weights/tf_efficientnet_lite0.safetensors")
    folders = [shared.need("coco-native/images"), shared.need("coco-mini/val2014")]
    photos = [photo for folder in folders for photo in sorted(folder.glob("*.jpg"))[:20]]
    files = [str(photo.relative_to(shared.FOLDER)) for photo in photos]
    table = write_table(tmp_path / "photos.csv", files)
    out = tmp_path / f"photos{SUFFIX[engine]}"
    asked = {"backbone": "tf_efficientnet_lite0", "weights": weights, "engine": engine}
    got, found = cached(table, out, shared.FOLDER, **asked)
    assert sorted(found) == sorted(photos)
    assert len(photos) == 40
    assert_same_features(got, straight_line("tf_efficientnet_lite0", weights, found))
