"""Blocks of a sweep: every head in one of them, beside its like, within cache and memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlc.heads.config import TrainConfig
from mlc.heads.grid import SweepConfig, grid_of
from mlc.heads.plan import CACHE_BYTES, Plan, head_steps, memory_bytes, plan

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLENTY = 2**40
IMAGES, WIDTH, CLASSES = 65_665, 2048, 80  # of COCO
STATE = 4 * CLASSES * (WIDTH + 1)  # bytes of a head's parameters
CELLS = 4 * 10 * 32 * 16 * CLASSES  # of the losses of 32 steps, while they are worked out
HEAD = 5 * STATE + CELLS  # with gradient, two moments and the best epoch
TABLE = 4 * IMAGES * CLASSES * 5  # rest, two moments, and two while it is made

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give heads plenty of memory; return what sets another limit."""

    def limit(bytes_: int) -> None:
        monkeypatch.setattr("mlc.heads.plan.memory_bytes", lambda _: bytes_)

    limit(PLENTY)
    return limit


def heads(losses: tuple[str, ...] = ("an",), seeds: int = 1, **settings: Any) -> list[TrainConfig]:
    return grid_of(SweepConfig(losses=losses, seeds=tuple(range(seeds)), **settings))


def planned(configs: list[TrainConfig], device: torch.device = CPU) -> Plan:
    return plan(configs, IMAGES, WIDTH, CLASSES, device)


def sizes(made: Plan) -> list[int]:
    return [len(block) for block in made.blocks]


def require_whole(made: Plan, configs: list[TrainConfig]) -> None:
    """Each head is in one block, and the heads of a block differ in settings of OWN alone."""
    text = [each.model_dump_json() for block in made.blocks for each in block]
    assert Counter(text) == Counter(each.model_dump_json() for each in configs)
    for block in made.blocks:
        common = {each.model_dump_json(exclude={pair.name for pair in OWN}) for each in block}
        assert len(common) == 1


def test_the_papers_column_is_in_blocks_of_heads_that_share_their_batches() -> None:
    losses = (
        "bce",
        "bce_ls",
        "iun",
        "iu",
        "pr",
        "an",
        "an_ls",
        "wan",
        "epr",
        "role",
        "focal",
        "asl",
    )
    configs = heads(losses, seeds=3, lr=(1e-2, 1e-3, 1e-4), batch_size=(8, 16))
    made = planned(configs)
    require_whole(made, configs)
    assert len(configs) == 12 * 18
    assert sizes(made) == [*[5] * 12, *[4] * 12] * 2  # those of batch 8 first


@given(
    st.sets(st.sampled_from(["bce", "an", "role"]), min_size=1),
    st.integers(1, 9),
    st.sets(st.sampled_from([1e-2, 1e-3]), min_size=1),
    st.sets(st.sampled_from([8, 16, 100_000]), min_size=1),
    st.sampled_from([(), ("order",), ("corruption",)]),
    st.integers(1, 5),
)
def test_of_any_grid_each_head_is_in_one_block_beside_its_like(
    losses: set, seeds: int, lr: set, batch_size: set, vary: tuple, workers: int
) -> None:
    torch.set_num_threads(workers)
    lists = {"lr": tuple(lr), "batch_size": tuple(batch_size), "vary": vary}
    configs = heads(tuple(losses), seeds, **lists)
    made = planned(configs)
    require_whole(made, configs)
    assert all(made.blocks)
    assert made.workers == min(workers, len(made.blocks))
    steps = [len(block) * 25 * max(1, IMAGES // block[0].batch_size) for block in made.blocks]
    assert steps == sorted(steps, reverse=True)
    assert [head_steps(block, IMAGES) for block in made.blocks] == steps


@dataclass(frozen=True)
class Pair:
    """Two heads that differ in one setting."""

    name: str
    values: tuple[Any, Any]


OTHER = [
    Pair("loss", ("an", "wan")),
    Pair("batch_size", (8, 16)),
    Pair("labels", ("full", "single-positive")),
    Pair("knobs", ({}, {"negative_weight": 0.5})),
    Pair("order_seed", (0, 1)),
    Pair("corruption_seed", (0, 1)),
    Pair("split_seed", (0, 1)),
    Pair("epochs", (2, 3)),
    Pair("val_labels", ("clean", "observed")),
    Pair("view_augment", (False, True)),
    Pair("eval_views", ("first", "mean")),
    Pair("layer", (None, "early")),
    Pair("classes", (("cat",), ("dog",))),
    Pair("features", (Path("a.zarr"), Path("b.zarr"))),
]
OWN = [
    Pair("lr", (1e-2, 1e-3)),
    Pair("weight_decay", (0.0, 0.1)),
    Pair("seed", (0, 1)),
    Pair("out", (Path("a"), Path("b"))),
]


@pytest.mark.parametrize("pair", [*OTHER, *OWN], ids=lambda pair: pair.name)
def test_heads_train_together_where_they_may(pair: Pair, threads: Callable[[int], None]) -> None:
    threads(1)
    one, other = (TrainConfig(**({"loss": "wan"} | {pair.name: each})) for each in pair.values)
    made = planned([one, other])
    require_whole(made, [one, other])
    assert sizes(made) == ([2] if pair in OWN else [1, 1])


def test_a_block_stays_in_the_cache() -> None:
    assert sizes(planned(heads(seeds=30))) == [6] * 5  # of 2.6 MB each
    assert 6 * 4 * STATE <= CACHE_BYTES < 7 * 4 * STATE


def test_a_head_that_the_cache_does_not_hold_is_alone() -> None:
    made = plan(heads(seeds=3), IMAGES, 100_000, CLASSES, CPU)
    assert sizes(made) == [1, 1, 1]


def test_blocks_of_a_group_are_of_about_the_same_size() -> None:
    assert sizes(planned(heads(seeds=13))) == [5, 4, 4]


@pytest.mark.parametrize(
    ("workers", "seeds", "blocks"),
    [
        (1, 6, [6]),
        (2, 6, [3, 3]),
        (3, 4, [2, 2]),
        (4, 6, [2, 2, 2]),
        (8, 3, [1, 1, 1]),
        (2, 1, [1]),
    ],
)
def test_each_core_gets_work(
    threads: Callable[[int], None], workers: int, seeds: int, blocks: list[int]
) -> None:
    threads(workers)
    made = planned(heads(seeds=seeds))
    assert sizes(made) == blocks
    assert made.workers == min(workers, len(blocks))


def test_groups_are_work_for_cores_too(threads: Callable[[int], None]) -> None:
    """Two groups of four heads keep two cores busy as they are."""
    threads(2)
    assert sizes(planned(heads(("an", "wan"), seeds=4))) == [4, 4]


def test_the_longest_work_is_first() -> None:
    made = planned([*heads(("an",), 2, batch_size=(16, 8)), *heads(("wan",), 5, batch_size=(16,))])
    assert [(block[0].loss, block[0].batch_size, len(block)) for block in made.blocks] == [
        ("wan", 16, 5),
        ("an", 8, 2),
        ("an", 16, 2),
    ]


def test_memory_bounds_what_trains_at_once(memory: Callable[[int], None]) -> None:
    configs = heads(("an", "role"), seeds=12)
    for heads_of_role in (1, 3, 4):
        limit = 2 * heads_of_role * (HEAD + TABLE)
        memory(limit)
        made = planned(configs)
        require_whole(made, configs)
        assert made.bytes <= limit
        of_role = [len(block) for block in made.blocks if block[0].loss == "role"]
        of_an = [len(block) for block in made.blocks if block[0].loss == "an"]
        assert max(of_role) == heads_of_role
        assert of_an == [6, 6]


def test_the_bytes_are_those_of_the_largest_blocks_at_once(
    memory: Callable[[int], None], threads: Callable[[int], None]
) -> None:
    threads(2)
    assert planned(heads(seeds=1)).bytes == HEAD
    assert planned(heads(seeds=4)).bytes == 4 * HEAD
    assert planned(heads(seeds=30)).bytes == 2 * 6 * HEAD
    assert planned(heads(("an", "role"), seeds=5)).bytes == 10 * HEAD + 5 * TABLE


def test_a_workers_share_of_memory_is_smaller_the_more_there_are(
    memory: Callable[[int], None], threads: Callable[[int], None]
) -> None:
    memory(12 * HEAD)
    for workers, largest in ((1, 6), (2, 6), (3, 4), (4, 3), (6, 2)):
        threads(workers)
        assert max(sizes(planned(heads(seeds=36)))) == largest


def test_heads_train_one_by_one_where_memory_is_short(memory: Callable[[int], None]) -> None:
    memory(HEAD - 1)
    made = planned(heads(seeds=3))
    assert sizes(made) == [1, 1, 1]


def test_a_gpu_takes_as_many_heads_as_it_holds(memory: Callable[[int], None]) -> None:
    made = planned(heads(("an", "role"), seeds=36), GPU)
    assert (sizes(made), made.workers) == ([36, 36], 1)
    memory(20 * HEAD)
    assert sizes(planned(heads(seeds=36), GPU)) == [18, 18]
    memory(9 * (HEAD + TABLE))
    assert sizes(planned(heads(("role",), seeds=36), GPU)) == [9, 9, 9, 9]


def test_a_container_is_given_half_of_its_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("mlc.heads.plan.Path", lambda _: limit)
    machine = memory_bytes(CPU)
    assert 2**28 < machine < 2**50
    limit.write_text("max\n")
    assert memory_bytes(CPU) == machine
    limit.write_text(f"{2**26}\n")
    assert memory_bytes(CPU) == 2**25
