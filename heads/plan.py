"""plan(): which heads of a sweep train together, in blocks that fit the cache and the memory."""

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlc.configs.errors import MlcError
from mlc.heads.block import bytes_of_cells, bytes_of_head
from mlc.heads.changing import bytes_of_changing
from mlc.heads.config import TrainConfig
from mlc.heads.full_batch import MAX_BYTES, STRENGTHS
from mlc.heads.head_size import HeadSize
from mlc.heads.inputs import LabelsConfig
from mlc.heads.modules import make_head
from mlc.losses.table import LOSSES

OWN = {"lr", "weight_decay", "seed", "out"}  # in which the heads of a block may differ
# Fields that heads of tokens have in common if they are trained in one pass over them.
OF_A_PASS = {
    *LabelsConfig.model_fields,
    "labels",
    "layer",
    "view_augment",
    "epochs",
    "batch_size",
    "micro_batch",
    "token_dropout",
    "order_seed",
    "corruption_seed",
    "split_seed",
    "val_labels",
    "select_on",
    "checkpoint_minutes",
    "device",
}
TOKEN_STATES = 6  # of a head's size: itself, gradient, two moments, average, best epoch
# What the state of a block may take of the cache that all cores share. With 2,048 features and 80
# classes it is six heads: from two to eight cost the same, twelve a third more.
CACHE_BYTES = 16 * 2**20
MOST_HEADS = 6  # of a block on a CPU: more save little, and a block that is stopped is lost
MEMORY_SHARE = 0.5  # of what is there, for the heads that train at once
ESTIMATOR_COPIES = 5  # of a label table: rest, two moments, and two while it is made


@dataclass(frozen=True)
class Plan:
    """How a sweep is trained.

    Attributes:
        blocks: heads that see the same batches and train together, the longest work first.
        workers: blocks that train at once, each on a core of its own.
        bytes: that they take at most, besides the features.
    """

    blocks: list[list[TrainConfig]]
    workers: int
    bytes: int


def plan(
    configs: Sequence[TrainConfig], images: int, width: int, classes: int, device: torch.device
) -> Plan:
    """Divide heads into blocks.

    Args:
        configs: resolved.
        images: of the training split.
        width: D, of the features.
        classes: L.
        device: where they train.
    """
    on_gpu = device.type == "cuda"
    workers = 1 if on_gpu else torch.get_num_threads()
    limit = memory_bytes(device) // workers
    blocks = []
    for group in _groups(configs, TrainConfig.model_fields.keys() - OWN):
        bytes_each = _bytes(group[0], images, width, classes)
        most = limit // bytes_each
        if not on_gpu:
            most = min(most, MOST_HEADS, CACHE_BYTES // bytes_of_head(width, classes))
            most = min(most, -(-len(configs) // workers))  # a core without work helps nobody
        parts = -(-len(group) // max(1, most))
        blocks += [group[part::parts] for part in range(parts)]
    blocks.sort(key=lambda block: -head_steps(block, images))
    largest = sorted(
        (len(block) * _bytes(block[0], images, width, classes) for block in blocks), reverse=True
    )
    return Plan(blocks, min(workers, max(1, len(blocks))), sum(largest[:workers]))


def plan_tokens(
    configs: Sequence[TrainConfig], images: int, size: HeadSize, device: torch.device
) -> Plan:
    """Divide heads of tokens into passes over them, as many heads in each as memory holds.

    Args:
        configs: resolved.
        images: of the training split.
        size: of the heads' inputs and outputs.
        device: where they train.
    """
    limit = memory_bytes(device)
    blocks: list[list[TrainConfig]] = []
    sizes: list[int] = []
    for group in _groups(configs, OF_A_PASS):
        room = 0
        for config in group:
            taken = _token_bytes(config, size)
            if taken > room:
                blocks.append([])
                sizes.append(0)
                room = limit
            blocks[-1].append(config)
            sizes[-1] += taken
            room -= taken
    blocks.sort(key=lambda block: -head_steps(block, images))
    return Plan(blocks, 1, max(sizes))


def head_steps(block: Sequence[TrainConfig], images: int) -> int:
    """Return the steps that the heads of a block take, all together."""
    config = block[0]
    return len(block) * config.epochs * max(1, images // config.batch_size)


def memory_bytes(device: torch.device) -> int:
    """Return the memory that heads may take: of the GPU, or of the machine or its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * MEMORY_SHARE)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return int(total * MEMORY_SHARE)


def require_memory(configs: Sequence[TrainConfig], size: HeadSize, device: torch.device) -> None:
    """Raise an MlcError if heads of tokens take more memory than there is."""
    taken = sum(_token_bytes(config, size) for config in configs)
    total = memory_bytes(device) / MEMORY_SHARE
    if taken > total:
        raise MlcError(
            f"head: {len(configs)} of {configs[0].head} take {taken / 1e9:,.1f} GB of memory to "
            f"train, of {total / 1e9:,.1f} GB; pass a smaller --hidden-dim"
        )


def _groups(configs: Sequence[TrainConfig], fields: Collection[str]) -> list[list[TrainConfig]]:
    """Return the configs that have the same values of some fields."""
    groups: dict[str, list[TrainConfig]] = {}
    for config in configs:
        same = json.dumps(config.model_dump(mode="json", include=set(fields)), sort_keys=True)
        groups.setdefault(same, []).append(config)
    return list(groups.values())


def _token_bytes(config: TrainConfig, size: HeadSize) -> int:
    """Return the bytes of a head of tokens, without what a step takes."""
    with torch.device("meta"):
        head = make_head(config.head, size, config, torch.Generator())
    return 4 * TOKEN_STATES * sum(each.numel() for each in head.parameters())


def _bytes(config: TrainConfig, images: int, width: int, classes: int) -> int:
    """Return the bytes of a head: its state, its best epoch, its losses, tables of cells.

    Of a full-batch head: the features in other coordinates, the problems, the path of heads.
    """
    if config.solver == "lbfgs":
        strengths = len(config.strengths or STRENGTHS)
        return 4 * images * width + MAX_BYTES + 4 * strengths * classes * (width + 1)
    state = bytes_of_head(width, classes) + 4 * classes * (width + 1)
    table = 4 * images * classes * ESTIMATOR_COPIES
    cells = bytes_of_cells(config.batch_size, classes)
    method = LOSSES[config.loss]
    changing = bytes_of_changing(method, images, classes)
    return state + cells + changing + (table if method.has_estimator else 0)
