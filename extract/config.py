"""ExtractConfig: what one extraction is asked for, and what can be refused before it starts."""

from pathlib import Path

from mlc.configs.cores import usable_cores
from mlc.configs.errors import MlcError, choose
from mlc.datasets.images import ImageSet
from mlc.datasets.source import DataConfig
from mlc.extract.backbone import BackboneConfig
from mlc.extract.existing import OnChanged, OnError
from mlc.extract.profile import check_trace_path
from mlc.extract.shards import Share
from mlc.store import schema
from mlc.store.key import FeatureKey

# Fields of which one pass over the images may have several values, for a store each.
EACH = ("backbone", "weights", "weights_licence", "size_px")
ALONG = ("out",)


class ExtractConfig(DataConfig, BackboneConfig):
    """Images, backbone and store of one extraction.

    Attributes:
        out: path of the store; by default ``features/`` and a name that carries its key's hash.
        format: "zarr" or "hdf5"; by default what ``out`` ends in, else Zarr.
        batch_size: images in one forward pass; by default what suits the device, see
            ``fit_batch_size``.
        shard_rows: images written and marked done together: what a killed process may lose; by
            default 256, or up to 1,024 of many.
        workers: threads that read and decode; by default one for each core.
        on_error: "skip" records a bad image and goes on, "raise" stops at it.
        on_changed: what to do where the store has features of another photo of the same name:
            "raise" stops, "extract" takes the photo that is there now.
        shard: "i/n": fill the i-th of n shares of the store's shards, from 0; the other workers,
            on this host or others, fill theirs. ``mlc store finish`` then ends the store.
        forecast: tell what it will take, and do nothing.
        profile: write a trace of some batches here, .json or .json.gz.
    """

    out: Path | None = None
    format: str | None = None
    batch_size: int | None = None
    shard_rows: int | None = None
    workers: int | None = None
    on_error: OnError = "skip"
    on_changed: OnChanged = "raise"
    shard: str | None = None
    forecast: bool = False
    profile: Path | None = None


def store_path(config: ExtractConfig, images: ImageSet, key: FeatureKey) -> Path:
    """Return where the store of this request is: the same request, the same path."""
    if config.out is not None:
        return config.out
    suffix = schema.FORMATS[config.format or "zarr"].suffix
    name = key.backbone.replace(":", "-")
    return Path("features") / f"{images.labels.dataset}-{name}-{key.size_px}-{key.digest()}{suffix}"


def worker_count(workers: int | None) -> int:
    """Return the number of decoding threads: as asked, else a thread for each usable core."""
    return usable_cores() if workers is None else workers


def read_share(text: str) -> Share:
    """Read "i/n" as a share of a store's shards.

    Raises:
        MlcError: it is not two such numbers, 0 <= i < n.
    """
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return Share(int(index), int(count))
    raise MlcError(
        f"shard: should be i/n with i from 0 to n - 1, as 0/4 to 3/4 for four workers, got {text!r}"
    )


def check_config(config: ExtractConfig) -> Share | None:
    """Refuse what can be seen to be wrong before images and weights are read; return the share.

    Raises:
        MlcError: a value that nothing can be done with, or two that contradict each other.
    """
    if config.out is not None:
        schema.format_of(config.out)
    if config.format is not None:
        suffix = choose(schema.FORMATS, config.format, "format").suffix
        if config.out is not None and config.out.suffix != suffix:
            raise MlcError(
                f"out: {config.out} does not end in {suffix}, as --format {config.format} asks"
            )
    if config.profile is not None:
        check_trace_path(config.profile)
    for name in ("batch_size", "shard_rows", "workers", "size_px"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise MlcError(f"{name}: should be at least 1, got {value}")
    if config.shard is None:
        return None
    if config.format == "hdf5" or (config.out is not None and config.out.suffix == ".h5"):
        raise MlcError("shard: an HDF5 file has one writer; several workers write a .zarr store")
    if config.on_changed == "extract":
        raise MlcError("on_changed: photos are not taken anew by --shard workers; leave one out")
    return read_share(config.shard)
