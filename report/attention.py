"""Attention to look at: each photo with the maps of its labels, and a table of what they hit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mlc.configs.errors import MlcError
from mlc.configs.files import written_aside
from mlc.configs.progress import Progress, silent
from mlc.datasets.images import find_images
from mlc.datasets.labels import class_columns
from mlc.extract.images import as_shown, open_image, read_file, squash
from mlc.extract.views import VIEWS
from mlc.heads.run_folder import Run
from mlc.models.attention import WHOLE, attention_maps, cell_centres, peak_of
from mlc.models.whole import WholeModel
from mlc.report.console import print_table

ImageBoxes = Mapping[str, NDArray[np.float64]]  # of a class, (n, 4); see datasets.boxes

PANEL_PX = 320  # the longer side of a photo
TITLE_PX, MARGIN_PX, FONT_PX = 24, 6, 15
# Colours of attention from an even share up, the upper part of matplotlib's inferno (CC0).
COLOURS = np.array([(101, 21, 110), (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164)])
DIMMED, MOST_OPAQUE = 0.55, 0.8
# A map is in full colour at its peak if that is this many times an even share: one that looks
# everywhere alike stays dim instead of glowing from edge to edge.
CLEAR_PEAK = 3.0


def write_attention(
    model: WholeModel,
    folder: Path,
    out: Path,
    labels: Sequence[str] | None = None,
    top: int = 3,
    boxes: Mapping[str, ImageBoxes] | None = None,
    progress: Progress = silent,
) -> tuple[int, dict[str, str]]:
    """Write a PNG for each image below a folder: the photo, and where the model looks for labels.

    Args:
        model: see ``attention_maps``.
        folder: searched with its subfolders.
        out: a folder; ``a/b.jpg`` becomes ``a/b.jpg.png`` in it.
        labels: classes to show of each image; by default its most probable ones.
        top: so many of them.
        boxes: drawn where there are any, by the file's path relative to the folder and by class.
        progress: told after each batch.

    Returns:
        How many pictures were written, and the reason by file of each image that could not be.

    Raises:
        MlcError: see ``check_pictures`` and ``attention_maps``.
    """
    check_pictures(model.run, folder, out, labels)
    columns = None if labels is None else class_columns(model.run.classes, labels)
    files = find_images(folder)
    bad: dict[str, str] = {}
    for batch in attention_maps(model, files, progress):
        for row, maps, probs, error in zip(
            batch.rows, batch.maps, batch.probs, batch.error, strict=True
        ):
            name = files[row].relative_to(folder).as_posix()
            if error:
                bad[name] = str(error)
                continue
            shown = columns or np.argsort(-probs, kind="stable")[:top].tolist()
            picture = draw_attention(
                seen_by(model, files[row]),
                {f"{model.run.classes[each]} {probs[each]:.2f}": maps[each] for each in shown},
                [_of_class(boxes, name, model.run.classes[each], model) for each in shown],
            )
            with written_aside(out / f"{name}.png") as partial:
                picture.save(partial, "PNG")
    return len(files) - len(bad), bad


def check_pictures(run: Run, folder: Path, out: Path, labels: Sequence[str] | None = None) -> None:
    """Refuse what can be seen to be wrong with pictures before the model is loaded.

    Raises:
        MlcError: no images there, an unknown class, or pictures that would be among the photos.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise MlcError(f"out: {out} is within {folder}, whose photos are drawn; name another")
    if out.is_file():
        raise MlcError(f"out: {out} is a file; name a folder")
    if labels is not None:
        class_columns(run.classes, labels)
    find_images(folder)


def seen_by(model: WholeModel, file: Path) -> Image.Image:
    """Return a photo as the model sees it: squashed to its square, then stretched back.

    What a view cuts off is not there; how it turns the photo is undone.
    """
    view, squares = VIEWS[model.backbone.key.views[0]], model.backbone.squares
    with open_image(read_file(file)) as image:
        shown = as_shown(image)
    square = Image.fromarray(squash(shown, squares, view))
    scale = PANEL_PX / max(shown.size)
    width, height = (max(1, round(side * scale)) for side in shown.size)
    return square.resize((width, height), Image.Resampling.BICUBIC)


def draw_attention(
    photo: Image.Image,
    maps: Mapping[str, NDArray[np.float32]],
    boxes: Sequence[NDArray[np.float64]] = (),
) -> Image.Image:
    """Return a photo, and beside it the same under each map, with a ring at the map's peak.

    Args:
        photo: RGB.
        maps: (H, W) by title, of sum 1.
        boxes: (n, 4) of each map, as shares of the photo's sides.
    """
    panels = [_titled(photo, "photo")]
    for index, (title, map_) in enumerate(maps.items()):
        panel = _heated(photo, map_)
        if len(boxes) > index:
            _draw_boxes(panel, boxes[index])
        _draw_peak(panel, map_)
        panels.append(_titled(panel, title))
    step = panels[0].width + MARGIN_PX
    picture = Image.new("RGB", (len(panels) * step - MARGIN_PX, panels[0].height), "white")
    for index, panel in enumerate(panels):
        picture.paste(panel, (index * step, 0))
    return picture


def pointing_records(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a record for each class, those with the most labels first, then the means."""
    ordered = sorted(result["per_class"].items(), key=lambda item: -item[1]["labels"])
    means = {"mean of labels": result, "mean of classes": result["class_mean"]}
    return [
        {
            "class": name,
            "labels": f"{shares['labels']:,}" if "labels" in shares else "",
            **{kind: f"{shares[kind]:.1f}" for kind in ("pointing", "centre", "random")},
        }
        for name, shares in [*ordered, *means.items()]
    ]


def pointing_note(result: Mapping[str, Any]) -> str:
    """Say what the columns of ``pointing_records`` are."""
    height, width = result["grid"]
    over = ""
    if result["over_centre"] is not None:
        low, high = result["over_centre"]
        over = f" pointing minus centre: {low:+.1f} to {high:+.1f}, 95 % interval over images."
    return (
        f"{result['labels']:,} labels with boxes in {result['images']:,} images, {height} x "
        f"{width} cells. pointing: per cent of the labels whose attention peaks inside a box of "
        "theirs; centre: of a guess at the middle of the photo; random: of any cell. Labels with "
        f"a crowd are left out.{over}"
    )


def print_pointing(result: Mapping[str, Any]) -> None:
    """Print the table of a pointing game and what is in it."""
    print_table(pointing_records(result))
    click.echo(pointing_note(result))


def _of_class(
    boxes: Mapping[str, ImageBoxes] | None, file: str, name: str, model: WholeModel
) -> NDArray[np.float64]:
    """Return the boxes of a class (n, 4) as shares of what the view shows of the photo."""
    own = (boxes or {}).get(file, {}).get(name, np.zeros((0, 4)))
    left, upper, right, lower = VIEWS[model.backbone.key.views[0]].crop or WHOLE
    size = np.array([right - left, lower - upper])
    return np.asarray((own - np.array([left, upper] * 2)) / np.tile(size, 2))


def _heated(photo: Image.Image, map_: NDArray[np.float32]) -> Image.Image:
    """Return the photo dimmed, coloured where a map has more than an even share."""
    shares = map_ * map_.size
    heat = (shares - 1) / (max(float(shares.max()), CLEAR_PEAK) - 1)
    smooth = Image.fromarray(heat.clip(0).astype(np.float32))
    share = np.asarray(smooth.resize(photo.size, Image.Resampling.BILINEAR), dtype=np.float64)
    places = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(share, places, channel) for channel in COLOURS.T], axis=-1)
    opacity = MOST_OPAQUE * share[..., None].clip(0, 1) ** 0.5
    mixed = opacity * colour + (1 - opacity) * DIMMED * np.asarray(photo)
    return Image.fromarray(mixed.round().astype(np.uint8))


def _draw_peak(panel: Image.Image, map_: NDArray[np.float32]) -> None:
    centre = cell_centres((map_.shape[0], map_.shape[1]), VIEWS["orig"])[peak_of(map_)]
    x, y = centre * panel.size
    draw = ImageDraw.Draw(panel)
    for colour, radius, width in (("black", 8, 4), ("white", 7, 2)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)


def _draw_boxes(panel: Image.Image, boxes: NDArray[np.float64]) -> None:
    draw = ImageDraw.Draw(panel)
    for box in (boxes * np.tile(np.array(panel.size) - 1, 2)).round():
        draw.rectangle(tuple(box.tolist()), outline="black", width=3)
        draw.rectangle(tuple(box.tolist()), outline="lime", width=1)


def _titled(panel: Image.Image, title: str) -> Image.Image:
    font = ImageFont.load_default(FONT_PX)
    while title and font.getlength(title) > panel.width:
        title = title[1:]  # the probability is at its end
    whole = Image.new("RGB", (panel.width, panel.height + TITLE_PX), "white")
    ImageDraw.Draw(whole).text((2, 3), title, fill="black", font=font)
    whole.paste(panel, (0, TITLE_PX))
    return whole
