"""A model that looks for colours, so that where it looks is known; photos of coloured squares."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.heads.config import TrainConfig
from mlc.heads.run_folder import Run
from mlc.models.whole import WholeModel

SIZE_PX, CELLS = 64, 4
CLASSES = ("red", "green", "blue")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
LAYER = "layer4"

Cell = tuple[int, int]


class ColourHead(nn.Module):
    """Each class looks for its colour; its logit is how much of it there is in the whole image."""

    def attention(self, tokens: Tensor) -> Tensor:
        return (20 * tokens).softmax(dim=1).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return 10 * tokens.mean(dim=1)


def mean_colours(pixels: Tensor) -> dict[str, Tensor]:
    """Tokens (B, T, 3): the mean colour of each cell, in [0, 1]."""
    maps = pixels.permute(0, 3, 1, 2).float() / 255
    cells = nn.functional.avg_pool2d(maps, SIZE_PX // CELLS)
    return {f"{LAYER}/tokens": cells.flatten(2).transpose(1, 2).contiguous()}


def colour_backbone() -> Backbone:
    """A backbone whose tokens are the mean colours of 4 x 4 cells."""
    settings = {"backbone": "test_resnet", "random_weights": True, "device": "cpu"}
    made = load_backbone(
        BackboneConfig(**settings, size_px=SIZE_PX, layers=(LAYER,), features=("tokens",))
    )
    arrays, grids = {f"{LAYER}/tokens": (CELLS**2, 3)}, {LAYER: (CELLS, CELLS)}
    return replace(made, engine=mean_colours, arrays=arrays, grids=grids)


def model_of(
    backbone: Backbone, view: str = "orig", head: nn.Module | None = None, **more: Any
) -> WholeModel:
    results = {"features": {}, "classes": list(CLASSES)}
    run = Run(Path("runs/made"), TrainConfig(head="attention-pool"), results)
    key = replace(backbone.key, views=(view,))
    return WholeModel(run, replace(backbone, key=key, **more), head or ColourHead())


def write_photo(path: Path, squares: Mapping[str, Cell], sides: tuple[int, int]) -> Path:
    """Write a black photo of width and height with squares of one colour in cells, row first."""
    width, height = sides
    photo = np.zeros((height, width, 3), dtype=np.uint8)
    for name, (row, column) in squares.items():
        rows = slice(row * height // CELLS, (row + 1) * height // CELLS)
        columns = slice(column * width // CELLS, (column + 1) * width // CELLS)
        photo[rows, columns] = COLOURS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo).save(path)
    return path
