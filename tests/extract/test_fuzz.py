"""No file can stop an extraction, fill the memory or change its neighbours' features."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from PIL import Image

from mlc.extract import images
from mlc.extract.config import ExtractConfig
from mlc.extract.images import decode_image, load_image
from mlc.extract.job import ExtractReport
from mlc.extract.run import extract
from mlc.extract.views import Squares
from mlc.store.reader import FeatureStore

SIZE_PX = 32
EXIF_ORIENTATION = 0x0112
NOT_AN_IMAGE = b"no image, a note"


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def animation(file_format: str) -> bytes:
    frames = [pictures.photo(seed=seed) for seed in range(3)]
    return pictures.encoded(frames[0], file_format, save_all=True, append_images=frames[1:])


SOURCES = {
    "jpg": pictures.encoded(pictures.photo(seed=100), "JPEG"),
    "noise.jpg": pictures.encoded(noise(1), "JPEG"),
    "progressive.jpg": pictures.encoded(pictures.photo(), "JPEG", progressive=True),
    "cmyk.jpg": pictures.encoded(noise(2, "CMYK"), "JPEG"),
    "png": pictures.encoded(pictures.photo(seed=101)),
    "16bit.png": pictures.encoded(
        Image.fromarray(np.arange(6400, dtype=np.uint16).reshape(80, 80))
    ),
    "palette.png": pictures.encoded(noise(3).quantize(16), transparency=bytes(range(0, 256, 16))),
    "1x1.png": pictures.encoded(Image.new("RGB", (1, 1), (3, 2, 1))),
    "1x20000.png": pictures.encoded(Image.new("L", (1, 20000), 77)),
    "webp": pictures.encoded(pictures.photo(seed=102), "WEBP"),
    "lossless.webp": pictures.encoded(noise(4), "WEBP", lossless=True),
    "animated.webp": animation("WEBP"),
    "gif": pictures.encoded(noise(5, "P"), "GIF"),
    "animated.gif": animation("GIF"),
}


# --- mutations -----------------------------------------------------------------------------------

Random = np.random.Generator


def cut(data: bytearray, random: Random) -> bytes:
    return bytes(data[: random.integers(len(data))])


def flip(data: bytearray, random: Random) -> bytes:
    for _ in range(random.integers(1, 20)):
        data[random.integers(len(data))] ^= int(random.integers(1, 256))
    return bytes(data)


def swap(data: bytearray, random: Random) -> bytes:
    size = max(1, len(data) // 8)
    first, second = random.integers(0, len(data) - size + 1, 2)
    one, other = data[first : first + size], data[second : second + size]
    data[first : first + size], data[second : second + size] = other, one
    return bytes(data)


def zero(data: bytearray, random: Random) -> bytes:
    start, length = random.integers(0, min(64, len(data))), random.integers(1, 64)
    data[start : start + length] = bytes(len(data[start : start + length]))
    return bytes(data)


def huge(data: bytearray, random: Random) -> bytes:
    """Every number somewhere in the header is as large as can be."""
    start = random.integers(4, min(64, len(data)))
    data[start : start + 4] = b"\xff" * len(data[start : start + 4])
    return bytes(data)


def repeat(data: bytearray, random: Random) -> bytes:
    start = random.integers(len(data))
    return bytes(data[:start] + data[start // 2 :] + data)


def exif(data: bytearray, random: Random) -> bytes:
    """Nonsense where a JPEG has its EXIF data, of others a broken start."""
    nonsense = b"Exif\0\0II*\0" + random.bytes(random.integers(1, 200))
    segment = b"\xff\xe1" + struct.pack(">H", len(nonsense) + 2) + nonsense
    return bytes(data[:2] + segment + data[2:])


MUTATIONS = (cut, flip, flip, swap, zero, huge, repeat, exif)


def mutants(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of files that are broken, or at least not what they were."""
    random = np.random.default_rng(seed)
    for index in range(count):
        if index % 10 == 9:  # no image at all
            yield f"{index:03d}.jpg", random.bytes(index)
            continue
        name, data = list(SOURCES.items())[random.integers(len(SOURCES))]
        mutation: Callable[[bytearray, Random], bytes] = MUTATIONS[index % len(MUTATIONS)]
        suffix = name if index % 3 else "wrong.jpg"
        yield f"{index:03d}.{mutation.__name__}.{suffix}", mutation(bytearray(data), random)


def make_special(folder: Path) -> dict[str, str]:
    """Make what is no file, or never a photo; return a part of the reason by name."""
    (folder / "directory.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "nowhere.jpg").symlink_to("gone")
    (folder / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(2**40)
    return {
        "directory.jpg": "Is a directory",
        "loop.jpg": "Too many levels of symbolic links",
        "nowhere.jpg": "No such file",
        "device.jpg": "not a file but a pipe",
        "pipe.jpg": "not a file but a pipe",
        "empty.jpg": "the file is empty",
        "sparse.jpg": "too large: 1,099,511,627,776 bytes, the limit is 2,147,483,648",
        "gone.jpg": "No such file",
    }


def readable(data: bytes) -> bool:
    """Return whether plain Pillow makes an RGB picture of the first frame."""
    with warnings.catch_warnings(action="ignore"):
        try:
            Image.open(io.BytesIO(data)).convert("RGB")
        except Exception:
            return False
    return True


# --- one extraction of them all ------------------------------------------------------------------


def extracted(folder: Path, names: list[str], out: Path) -> tuple[ExtractReport, NDArray]:
    table = folder / "photos.csv"
    table.write_text("file,labels,split\n" + "".join(f"{name},cat,train\n" for name in names))
    config = ExtractConfig(
        data=str(table),
        out=out,
        backbone="test_resnet",
        random_weights=True,
        size_px=SIZE_PX,
        device="cpu",
        batch_size=4,
        shard_rows=30,
        workers=3,
    )
    report = extract(config)
    with FeatureStore(out) as store:
        return report, store.pooled()


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_bad_files_are_listed_and_good_ones_do_not_notice(
    tmp_path: Path, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    fuzzed, plain = tmp_path / "fuzzed", tmp_path / "plain"
    fuzzed.mkdir()
    plain.mkdir()
    special = make_special(fuzzed)
    broken = dict(mutants(count, seed=count))
    for name, data in broken.items():
        (fuzzed / name).write_bytes(data)
    names, good = [], []
    for index, name in enumerate([*broken, *special]):
        photo = f"good{index:03d}.jpg"
        data = pictures.encoded(pictures.photo(seed=1000 + index), "JPEG")
        for folder in (fuzzed, plain):
            (folder / photo).write_bytes(data)
        (plain / name).write_bytes(NOT_AN_IMAGE)
        good.append(len(names) + index % 2)
        names += [photo, name] if index % 2 == 0 else [name, photo]
    with warnings.catch_warnings(record=True, action="always") as leaked:
        report, features = extracted(fuzzed, names, tmp_path / "fuzzed.zarr")
    assert [str(each.message) for each in leaked] == []
    assert capfd.readouterr().err == ""
    _, want = extracted(plain, names, tmp_path / "plain.zarr")
    assert features[good].tobytes() == want[good].tobytes()
    assert features[good].any(axis=1).all()
    unreadable = {name for name, data in broken.items() if not readable(data)}
    assert report.bad.keys() == unreadable | special.keys()
    assert len(unreadable) > count / 4
    assert len(unreadable) < len(broken)
    for name, reason in report.bad.items():
        assert reason.removeprefix("broken image: "), name
        assert reason.isprintable(), (name, reason)
    for name, reason in special.items():
        assert reason in report.bad[name]


# --- what a viewer shows all the same ------------------------------------------------------------


def test_a_broken_second_frame_does_not_matter() -> None:
    data = animation("GIF")
    broken = data[: len(data) // 3 + 100] + b"\x07" * (len(data) // 3)
    with Image.open(io.BytesIO(broken)) as image:
        want = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
    got = decode_image(broken, size_px=16, interpolation="bilinear")
    np.testing.assert_array_equal(got, want)


NONSENSE = (
    b"Exif\0\0garbage!!",
    b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    b"Exif\0\0XX*\0\x08\0\0\0",
)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_exif_does_not_make_a_photo_bad(file_format: str, nonsense: bytes) -> None:
    data = pictures.encoded(pictures.photo(), file_format, exif=nonsense, dpi=(72, 72))
    plain = pictures.encoded(pictures.photo(), file_format)
    got, want = (decode_image(each, size_px=16, interpolation="bilinear") for each in (data, plain))
    np.testing.assert_array_equal(got, want)


def test_a_photo_is_turned_though_another_entry_of_its_exif_points_nowhere() -> None:
    entries = struct.pack("<HHII", EXIF_ORIENTATION, 3, 1, 6) + struct.pack(
        "<HHII", 0x8769, 4, 1, 0xFFFFFF
    )
    nonsense = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    data = pictures.encoded(pictures.photo(), "PNG", exif=nonsense)
    got = decode_image(data, size_px=16, interpolation="nearest")
    turned = pictures.photo().transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(got, turned.resize((16, 16), Image.Resampling.NEAREST))


SQUARES = Squares(8, "bilinear")
SCRATCH = {SQUARES: SQUARES.blank(1)[:, 0]}

# --- warnings ------------------------------------------------------------------------------------


def test_pillows_warnings_are_kept_and_those_of_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(pictures.encoded(pictures.photo(), "JPEG", exif=NONSENSE[1], dpi=(72, 72)))
    with warnings.catch_warnings(action="error"):
        with Image.open(path) as image, pytest.raises(UserWarning):
            image.getexif()
        assert load_image(path, SCRATCH).decoded
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", UserWarning, stacklevel=1)


# --- bombs ---------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *others: bytes, lines: int | None = None) -> bytes:
    """A black PNG of one bit a pixel, of which some lines are there."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((height if lines is None else lines) * (1 + (width + 7) // 8)))
    parts = [chunk(b"IHDR", header), *others, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_size(data: bytes, start: bytes, offset: int, kind: str, *size: int) -> bytes:
    """The file with another size in its header, ``offset`` bytes after a marker."""
    place = data.index(start) + offset
    return data[:place] + struct.pack(kind, *size) + data[place + struct.calcsize(kind) :]


INFLATED = zlib.compress(bytes(300_000_000), 9)
SIDE = 60_000
TEXT = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(1_000_000), 9))
BOMBS = {
    "png": png(SIDE, SIDE, lines=1000),
    "gif": with_size(pictures.encoded(noise(1, "P"), "GIF"), b"GIF8", 6, "<HH", SIDE, SIDE),
    "gif frame": with_size(
        pictures.encoded(noise(1, "P"), "GIF"), b",\0\0\0\0", 5, "<HH", SIDE, SIDE
    ),
    "webp": with_size(SOURCES["lossless.webp"], b"VP8L", 9, "<I", 0x0FFFFFFF),
    "jpeg": with_size(SOURCES["jpg"], b"\xff\xc0", 5, ">HH", SIDE, SIDE),
    "bmp": with_size(pictures.encoded(noise(1), "BMP"), b"BM", 18, "<II", SIDE, SIDE),
    "text": png(9, 9, chunk(b"zTXt", b"note\0\0" + INFLATED)),
    "international text": png(9, 9, chunk(b"iTXt", b"note\0\1\0\0\0" + INFLATED)),
    "many texts": png(9, 9, *[TEXT] * 200),
    "colour profile": png(9, 9, chunk(b"iCCP", b"note\0\0" + INFLATED)),
    "pixels": png(9, 9, lines=100_000_000),
}
HARMLESS = {"pixels"}  # what is beyond the last line is not read

MEASURE = """
import resource, sys
from pathlib import Path
from mlc.extract.images import load_image
from mlc.extract.views import Squares
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
squares = Squares(8, "bilinear")
pixels = {squares: squares.blank(1)[:, 0]}
load_image(Path(sys.argv[1]), pixels)
before = peak()
for name in sys.argv[2:]:
    reason = load_image(Path(name), pixels).error
    print(Path(name).name, peak() - before, reason, sep="|")
"""


def measured(folder: Path, files: dict[str, bytes]) -> dict[str, tuple[int, str]]:
    """Load files in another process: MiB beyond those of a small one, and the reason, by name."""
    for name, data in {"small": SOURCES["png"], **files}.items():
        (folder / name).write_bytes(data)
    names = [str(folder / name) for name in ("small", *files)]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, *names], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = [line.split("|", 2) for line in ran.stdout.splitlines()]
    return {name: (int(peak), reason) for name, peak, reason in lines}


def test_decompression_bombs_are_refused_and_take_no_memory(tmp_path: Path) -> None:
    found = measured(tmp_path, BOMBS)
    for name, (peak, reason) in found.items():
        assert (reason == "") == (name in HARMLESS), (name, reason)
        assert peak < 150, name
    assert found.keys() == BOMBS.keys()
    for name in ("png", "gif", "jpeg", "bmp"):
        assert "too large: Image size (3600000000 pixels)" in found[name][1]
        assert "limit of 178956970 pixels" in found[name][1]
    assert "Decompressed data too large" in found["text"][1]


def test_a_photo_of_a_hundred_megapixels_is_no_bomb(tmp_path: Path) -> None:
    found = measured(tmp_path, {"large": png(11_000, 10_000)})
    peak, reason = found["large"]
    assert reason == ""
    assert peak < 1500


def test_a_bomb_is_refused_where_pillows_own_limit_is_lifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(BOMBS["png"])
    pixels = np.full((1, 8, 8, 3), 7, np.uint8)
    loaded = load_image(tmp_path / "a.png", {SQUARES: pixels})
    assert loaded.error == (
        f"too large: 60,000 x 60,000 pixels, the limit is {images.MOST_PIXELS:,} pixels"
    )
    assert (pixels == 7).all()


def test_a_postscript_program_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n")
    loaded = load_image(tmp_path / "a.jpg", SCRATCH)
    assert loaded.error == "broken image: EPS is a drawing, not a photo"
