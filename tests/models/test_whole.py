"""WholeModel: photos -> logits, by the layer and the view that the head was trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from torch import Tensor, nn

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.images import decode_image
from mlc.heads.config import TrainConfig
from mlc.heads.inputs import EvalViews
from mlc.heads.run_folder import Run
from mlc.models.whole import load_whole

SIZE_PX = 64
WIDTHS = {"pre_logits": 96, "layer2": 48}
CLASSES = ("cat", "cow", "dog")
PLAIN: dict[str, Any] = {
    "backbone": "test_resnet",
    "random_weights": True,
    "size_px": SIZE_PX,
    "device": "cpu",
}
RICH = PLAIN | {
    "layers": ("pre_logits", "layer2"),
    "features": ("pooled:float16", "tokens:int8"),
    "views": ("flip", "center"),
}


class MadeRun(Run):
    """A run whose head is made up, not read from its folder."""

    def head(self) -> nn.Module:
        return made_head(WIDTHS[self.config.layer or self.results["features"]["key"]["layers"][0]])


def made_head(width: int) -> nn.Linear:
    head = nn.Linear(width, len(CLASSES))
    values = torch.linspace(-1, 1, width * len(CLASSES)) ** 3
    head.load_state_dict({"weight": values.view(len(CLASSES), width), "bias": torch.ones(3)})
    return head


def run_of(
    settings: dict[str, Any],
    layer: str | None = None,
    eval_views: EvalViews = "first",
    **changed: Any,
) -> Run:
    """A run that was trained on features of these settings."""
    config = BackboneConfig(**settings)
    key = load_backbone(config).key.to_json() | changed
    made = {"key": key, "backbone_config": config.model_dump(mode="json")}
    results = {"features": made, "classes": list(CLASSES)}
    return MadeRun(Path("runs/made"), TrainConfig(layer=layer, eval_views=eval_views), results)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve photos, two of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    pictures.write_data(folder)
    return [folder / name for name in pictures.FILES]


def straight_line(files: list[Path], backbone: Backbone, layer: str, flip: bool) -> Tensor:
    squares = np.stack(
        [
            decode_image(file.read_bytes(), size_px=SIZE_PX, interpolation="bilinear")
            for file in files
        ]
    )
    pixels = np.ascontiguousarray(squares[:, :, ::-1]) if flip else squares
    with torch.inference_mode():
        return made_head(WIDTHS[layer])(backbone.features(pixels)[f"{layer}/pooled"])


@pytest.mark.parametrize(
    ("settings", "layer"),
    [(PLAIN, None), (RICH, None), (RICH, "layer2"), (PLAIN | {"layers": ("layer2",)}, None)],
)
def test_logits_are_the_heads_of_its_layer_and_the_first_view(
    files: list[Path], settings: dict[str, Any], layer: str | None
) -> None:
    model = load_whole(run_of(settings, layer), device="cpu")
    logits, bad = model.logits(files)
    good = [row for row in range(len(files)) if row not in bad]
    assert [pictures.FILES[row] for row in bad] == list(pictures.BAD_FILES)
    assert not logits[list(bad)].any()
    name = layer or settings.get("layers", ("pre_logits",))[0]
    reference = load_backbone(BackboneConfig(**PLAIN | {"layers": (name,)}))
    want = straight_line([files[row] for row in good], reference, name, "views" in settings)
    np.testing.assert_allclose(logits[good], want.numpy(), rtol=0, atol=1e-4)


def test_logits_are_the_mean_over_the_views_if_the_run_was_scored_so(files: list[Path]) -> None:
    settings = PLAIN | {"views": ("orig", "flip")}
    logits, bad = load_whole(run_of(settings, eval_views="mean"), device="cpu").logits(files)
    good = [row for row in range(len(files)) if row not in bad]
    backbone = load_backbone(BackboneConfig(**PLAIN))
    views = [
        straight_line([files[row] for row in good], backbone, "pre_logits", flip)
        for flip in (False, True)
    ]
    want = (views[0] + views[1]) / 2
    np.testing.assert_allclose(logits[good], want.numpy(), rtol=0, atol=1e-4)
    assert float((views[0] - views[1]).abs().max()) > 1e-2


def test_nothing_is_computed_that_the_head_does_not_read() -> None:
    backbone = load_whole(run_of(RICH, "layer2"), device="cpu").backbone
    assert dict(backbone.arrays) == {"layer2/pooled": (WIDTHS["layer2"],)}
    assert backbone.key.views == ("flip",)


def test_a_run_of_before_the_kinds_of_features_still_works() -> None:
    run = run_of(PLAIN, dtype="float16")
    del run.results["features"]["key"]["features"]
    assert load_whole(run, device="cpu").backbone.key.layers == ("pre_logits",)


def test_another_backbone_is_refused() -> None:
    run = run_of(PLAIN, weights="0123456789abcdef", interpolation="bicubic")
    expected = r"runs/made: made with other settings: interpolation: .*; weights: .*"
    with pytest.raises(MlcError, match=expected):
        load_whole(run, device="cpu")


def test_imported_features_have_no_backbone() -> None:
    run = run_of(PLAIN)
    run.results["features"]["backbone_config"] = None
    with pytest.raises(MlcError, match=r"runs/made: was trained on imported features"):
        load_whole(run, device="cpu")
