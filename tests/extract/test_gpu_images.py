"""JPEGs decoded on a device: the same pixels resized as by the fast way, or the fast way itself.

A CPU stands in for the GPU, with libjpeg for nvJPEG; a GPU is tried where there is one.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.extract import decoders, gpu_images
from mlc.extract.backbone import BackboneConfig, load_backbone
from mlc.extract.config import ExtractConfig
from mlc.extract.decoders import DECODERS, choose_decoder
from mlc.extract.fast_images import decode_views_fast
from mlc.extract.gpu_images import decode_jpeg, decode_views_gpu
from mlc.extract.images import Decode, decode_views, load_image
from mlc.extract.run import extract
from mlc.extract.views import VIEWS, Squares
from mlc.store.reader import FeatureStore

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision:DeprecationWarning")

S = 24
EXIF_ORIENTATION = 0x0112
CPU = torch.device("cpu")
Pixels = NDArray[np.uint8]


def stand_in(data: bytes, *asked: Squares) -> list[Pixels]:
    return list(decode_views_gpu(data, *asked, device=CPU))


def jpeg(width: int = 45, height: int = 35, mode: str = "RGB", **options: object) -> bytes:
    picture = pictures.photo(width, height, mode=mode)
    return pictures.encoded(picture, "JPEG", **{"subsampling": 0, "quality": 95} | options)


def turned(orientation: int, width: int = 45, height: int = 35) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return jpeg(width, height, exif=exif)


def noise(width: int = 45, height: int = 35) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was given to the device's decoder, which goes on working."""
    seen = []

    def spy(data: bytes, device: torch.device) -> Tensor:
        seen.append(data)
        return decode_jpeg(data, device)

    monkeypatch.setattr(gpu_images, "decode_jpeg", spy)
    return seen


def failing(error: Exception) -> Callable[..., Tensor]:
    def fail(*_: object) -> Tensor:
        raise error

    return fail


# --- what the device decodes ---------------------------------------------------------------------


@pytest.mark.parametrize(("interpolation", "most"), [("bilinear", 1), ("bicubic", 2)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_same_pixels_are_turned_and_resized_as_by_the_fast_way(
    orientation: int, interpolation: str, most: int, decoded: list[bytes]
) -> None:
    data, asked = turned(orientation), Squares(S, interpolation, tuple(VIEWS))  # at full scale
    gpu, fast = stand_in(data, asked), list(decode_views_fast(data, asked))
    assert decoded == [data]
    for one, other in zip(gpu, fast, strict=True):
        assert one.shape == (S, S, 3)
        assert one.dtype == np.uint8
        assert np.abs(one.astype(int) - other).max() <= most


def test_each_orientation_is_a_turn_of_its_own() -> None:
    squares = {
        stand_in(turned(orientation), Squares(S, "bilinear"))[0].tobytes()
        for orientation in range(1, 9)
    }
    assert len(squares) == 8


def test_edges_of_black_and_white_stay_within_8_bits() -> None:
    """Bicubic overshoots there; a number that is not clipped would come round."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, 32:] = 255
    data = pictures.encoded(Image.fromarray(stripes), "JPEG", quality=100)
    (square,) = stand_in(data, Squares(S, "bicubic"))
    assert square[:, : S // 2 - 2].max() < 20
    assert square[:, S // 2 + 2 :].min() > 235


def test_a_large_photo_is_decoded_whole(decoded: list[bytes]) -> None:
    data, asked = jpeg(8 * 2 * S, 8 * 2 * S), Squares(S, "bilinear")
    (gpu,), (exact,) = stand_in(data, asked), decode_views(data, asked)
    assert decoded == [data]
    assert np.abs(gpu.astype(int) - exact).max() <= 1


def test_squares_of_several_backbones_share_a_decoded_photo(decoded: list[bytes]) -> None:
    asked = [
        Squares(S, "bilinear", ("orig", "flip")),
        Squares(S, "lanczos"),  # not on the device
        Squares(S // 2, "bicubic", ("center",)),
    ]
    data = jpeg()
    together = stand_in(data, *asked)
    assert decoded == [data]
    alone = [square for each in asked for square in stand_in(data, each)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)


# --- what goes the fast way ----------------------------------------------------------------------

FAST = {
    "png": pictures.encoded(noise()),
    "webp": pictures.encoded(noise(), "WEBP"),
    "grey jpeg": jpeg(mode="L"),
    "cmyk jpeg": pictures.encoded(noise().convert("CMYK"), "JPEG"),
    "rgb-coded jpeg": jpeg(keep_rgb=True),
    "jpeg lower than the square": jpeg(100, S - 1),
}


@pytest.mark.parametrize("kind", FAST)
def test_what_a_gpu_is_not_trusted_with_goes_the_fast_way(kind: str, decoded: list[bytes]) -> None:
    asked = [Squares(S, "bilinear", ("orig", "center-flip")), Squares(S, "lanczos")]
    np.testing.assert_array_equal(
        stand_in(FAST[kind], *asked), list(decode_views_fast(FAST[kind], *asked))
    )
    assert decoded == []


@pytest.mark.parametrize(
    "error", [RuntimeError("nvjpeg status 2"), torch.OutOfMemoryError("CUDA out of memory")]
)
@pytest.mark.parametrize("fails", ["decode_jpeg", "resize_view"])
def test_what_the_gpu_refuses_goes_the_fast_way(
    fails: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_images, fails, failing(error))
    data, asked = jpeg(), Squares(S, "bilinear", ("orig", "rot90"))
    np.testing.assert_array_equal(stand_in(data, asked), list(decode_views_fast(data, asked)))
    monkeypatch.undo()
    assert len(stand_in(data, asked)) == 2  # the next photo does not wait for this one


def lenient(*_: object) -> Tensor:
    """Give pixels whatever is missing, as a GPU may."""
    return torch.zeros(3, 35, 45, dtype=torch.uint8)


def reason(decode: Decode, data: bytes, folder: Path) -> str:
    path = folder / "photo"
    path.write_bytes(data)
    asked = Squares(S, "bilinear")
    return load_image(path, {asked: asked.blank(1)[:, 0]}, decode=decode).error


def on_cpu(data: bytes, *asked: Squares):
    return decode_views_gpu(data, *asked, device=CPU)


WHOLE = pictures.encoded(noise(), "JPEG")
BROKEN = {
    "empty": b"",
    "text": b"not a photo",
    **{f"{kept} of a jpeg": WHOLE[: int(len(WHOLE) * kept)] for kept in (0.02, 0.3, 0.9, 0.99)},
    "a jpeg without its end, padded": WHOLE[: len(WHOLE) // 2] + bytes(9),
    "half a png": FAST["png"][: len(FAST["png"]) // 2],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_for_the_same_reason(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_images, "decode_jpeg", lenient)
    gpu, fast = (reason(way, BROKEN[kind], tmp_path) for way in (on_cpu, decode_views_fast))
    assert gpu
    assert gpu.split(" at 0x")[0] == fast.split(" at 0x")[0]


def test_a_jpeg_that_ends_in_zeros_is_whole(decoded: list[bytes]) -> None:
    stand_in(WHOLE + bytes(9), Squares(S, "bilinear"))
    assert decoded


def test_a_bomb_is_refused_before_it_is_decoded(
    decoded: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlc.extract.images.MOST_PIXELS", 45 * 35 - 1)
    monkeypatch.setattr(JpegImageFile, "load", failing(AssertionError("decoded")))
    assert (
        reason(on_cpu, jpeg(), tmp_path) == "too large: 45 x 35 pixels, the limit is 1,574 pixels"
    )
    assert decoded == []


# --- its name ------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CPU taken for a GPU that decodes."""
    monkeypatch.setattr(decoders, "_require_gpu", lambda device: None)
    return CPU


def test_other_decoders_are_what_they_are_on_any_device() -> None:
    for device in (CPU, torch.device("cuda:0")):
        assert choose_decoder("pillow", device) is decode_views
        assert choose_decoder("fast", device) is decode_views_fast
    assert list(DECODERS) == ["pillow", "fast", "fast-gpu"]


def test_the_photo_is_decoded_on_the_backbones_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_require_gpu", lambda device: None)
    monkeypatch.setattr(gpu_images, "_own_stream", lambda device: None)
    devices = []
    monkeypatch.setattr(
        gpu_images,
        "decode_jpeg",
        lambda data, device: devices.append(device) or decode_jpeg(data, CPU),
    )
    list(choose_decoder("fast-gpu", torch.device("cuda:1"))(jpeg(), Squares(S, "bilinear")))
    assert devices == [torch.device("cuda:1")]


def test_without_a_gpu_it_is_refused_before_a_model_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlc.extract.backbone._build", failing(AssertionError("built")))
    config = BackboneConfig(backbone="resnet18", decode="fast-gpu", device="cpu")
    with pytest.raises(MlcError) as caught:
        load_backbone(config)
    assert str(caught.value) == (
        "decode: fast-gpu decodes on a CUDA GPU, got device 'cpu'; choose fast, or a GPU"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore"),
        ImportError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support"),
        AttributeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_torchvision_without_nvjpeg_is_refused(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "decode_jpeg", failing(error))
    with pytest.raises(MlcError) as caught:
        choose_decoder("fast-gpu", torch.device("cuda:7"))
    assert str(caught.value) == (
        "decode: fast-gpu needs a torchvision with nvJPEG, and the one here decodes no JPEG on "
        "'cuda:7' (decode_jpegs_cuda: torchvision not compiled with nvJPEG support); "
        "choose fast, or install one that is built for CUDA"
    )


def test_a_gpu_is_asked_once_with_a_jpeg_that_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(
        decoders, "decode_jpeg", lambda data, _: shapes.append(decode_jpeg(data, CPU).shape)
    )
    for _ in range(2):
        choose_decoder("fast-gpu", torch.device("cuda:6"))
    assert shapes == [(3, 64, 64)]


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(MlcError, match="unknown decode 'fast-cpu'; did you mean"):
        choose_decoder("fast-cpu", CPU)


def test_it_makes_a_store_of_its_own(
    gpu: torch.device, decoded: list[bytes], tmp_path: Path
) -> None:
    def config(decode: str) -> ExtractConfig:
        return ExtractConfig(
            data=str(pictures.write_data(tmp_path / "photos")),
            out=tmp_path / "store.zarr",
            backbone="resnet18",
            random_weights=True,
            size_px=32,
            device="cpu",
            decode=decode,
        )

    report = extract(config("fast-gpu"))
    assert decoded
    assert sorted(report.bad) == sorted(pictures.BAD_FILES)
    with FeatureStore(report.path) as store:
        assert store.key["decode"] == "fast-gpu"
    with pytest.raises(MlcError, match="decode: stored 'fast-gpu', asked 'fast'"):
        extract(config("fast"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_gpu_gives_nearly_what_the_stand_in_gives(orientation: int) -> None:
    decode = choose_decoder("fast-gpu", torch.device("cuda:0"))
    asked = Squares(S, "bilinear", tuple(VIEWS))
    data = turned(orientation, 200, 150)
    for one, other in zip(decode(data, asked), stand_in(data, asked), strict=True):
        assert np.abs(one.astype(int) - other).mean() < 2
