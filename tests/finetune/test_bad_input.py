"""Bad images, numbers and settings: training goes on without them, or ends with one sentence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_store
import numpy as np
import pytest
import torch
from finetune_data import SETTINGS, assert_same_bits, config_of, tuned, write_photos

from mlc.cli import main
from mlc.configs.errors import MlcError
from mlc.finetune import steps
from mlc.finetune.command import finetune_config
from mlc.finetune.config import check_finetune
from mlc.finetune.run import finetune
from mlc.heads.checkpoint import checkpoint_path
from mlc.heads.config import TrainConfig
from mlc.heads.fit import fit, prepare, read_inputs
from mlc.heads.order import batches_of_epoch, order_generators
from mlc.heads.run_folder import BACKBONE

ROLE = {"loss": "role", "labels": "single-positive", "knobs": {"expected_positives": 1.7}}
BROKEN = 5  # a photo of training


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep small sums from waiting for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def one_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("broken"), broken=[BROKEN])


def batches_without(bad: set[int], original: Any) -> Any:
    """Return what gives the batches of an epoch, of all images each, without some rows."""

    def batches(count: int, size: int, order: Any) -> torch.Tensor:
        rows = original(count, size, order)
        return torch.stack([row[~torch.isin(row, torch.tensor(sorted(bad)))] for row in rows])

    return batches


@pytest.mark.parametrize("settings", [{}, ROLE], ids=["bce", "role"])
def test_a_truncated_image_is_left_out_of_its_batch(
    photos: Path,
    one_broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    settings = settings | {"batch_size": 32, "epochs": 4}  # one batch of all
    done = tuned(one_broken, tmp_path / "broken", **settings)
    (file, reason), *others = done.bad.items()
    assert not others
    assert file == str(one_broken.parent / f"{BROKEN:02d}.jpg")
    assert "truncated" in reason
    original = steps.batches_of_epoch
    monkeypatch.setattr(steps, "batches_of_epoch", batches_without({BROKEN}, original))
    left_out = tuned(photos, tmp_path / "left out", **settings)
    monkeypatch.undo()
    for name in ("selection_mAP", "test", "best_epoch"):
        assert done.run.results[name] == left_out.run.results[name]
    for (name, one), other in zip(
        done.run.head().state_dict().items(),
        left_out.run.head().state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, other), name
    whole = tuned(photos, tmp_path / "whole", **settings)
    assert not whole.bad
    assert done.run.results["train_images"] == whole.run.results["train_images"] - 1
    with pytest.raises(AssertionError):
        assert_same_bits(done.run, whole.run)


def test_a_broken_image_of_an_evaluation_has_no_score(photos: Path, tmp_path: Path) -> None:
    some = write_photos(tmp_path / "photos", broken=[33, 45])
    done = tuned(some, tmp_path / "run")
    assert sorted(Path(file).name for file in done.bad) == ["33.jpg", "45.jpg"]
    ids, whole = done.run.scores()["image_id"].tolist(), tuned(photos, tmp_path / "whole").run
    assert not [each for each in ids if "45" in each]
    kept = np.isin(whole.scores()["image_id"], ids)
    assert kept.sum() == len(ids) == len(kept) - 1


def test_raise_stops_at_the_image(one_broken: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MlcError, match=r"/05\.jpg: .*truncated.*; mend it, or leave out --on-error"
    ):
        tuned(one_broken, tmp_path / "run", on_error="raise")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{}, ROLE, {"micro_batch": 3}], ids=["bce", "role", "parts"])
@pytest.mark.parametrize("good", [0, 1])
def test_a_batch_may_be_bad_as_a_whole(tmp_path: Path, settings: dict[str, Any], good: int) -> None:
    order, _ = order_generators(config_of(tmp_path, tmp_path).order_seed)
    bad = batches_of_epoch(32, 8, order)[1].tolist()[good:]
    some = write_photos(tmp_path / "photos", broken=bad)
    done = tuned(
        some, tmp_path / "run", **settings, size_px=64 if good or "micro_batch" in settings else 32
    )
    assert sorted(int(Path(file).stem) for file in done.bad) == sorted(bad)
    assert done.run.results["train_images"] == 32 - len(bad)


@pytest.mark.parametrize(
    ("broken", "split"), [(range(52), "train"), (range(32), "train"), (range(32, 42), "val")]
)
def test_a_split_of_bad_images_alone_is_told(tmp_path: Path, broken: range, split: str) -> None:
    some = write_photos(tmp_path / "photos", broken=broken)
    message = rf"photos: none of the {10 if split == 'val' else 32} images of split '{split}'"
    with pytest.raises(MlcError, match=message):
        tuned(some, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_root_that_is_not_there_is_told(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(MlcError, match="nowhere: "):
        tuned(photos, tmp_path / "run", root=tmp_path / "nowhere")


@pytest.mark.parametrize("minutes", [1e-9, 10.0])
def test_a_loss_that_is_no_number_names_its_images(
    photos: Path, tmp_path: Path, minutes: float
) -> None:
    out = tmp_path / "run"
    message = (
        r"^step [2-9]: the loss is (nan|inf), at a batch of 8 images \(image id (\S+, ){5}\.\.\.\);"
    )
    with pytest.raises(MlcError, match=message):
        tuned(photos, out, lr=1e30, checkpoint_minutes=minutes)
    path = checkpoint_path(out)
    assert path.is_file() == (minutes < 1)
    if minutes < 1:
        model = torch.load(path, weights_only=True)["state"]["tuning"]["model"]
        assert all(torch.isfinite(each).all() for each in model.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ("layr1",)}, "^freeze: no module is named 'layr1'; .*layer1"),
        ({"classes": ("red", "violet")}, "violet"),
        (ROLE | {"micro_batch": 2}, "^micro_batch: the loss role is of a whole batch"),
        ({"precision": "bfloat16"}, "^precision: bfloat16 is ten times slower on a CPU"),
        ({"size_px": -3}, "size_px: should be at least 1, got -3"),
        ({"workers": 0}, "^workers: should be at least 1, got 0"),
        ({"cutout": 1.0}, "^cutout: should be at least 0 and below 1, got 1.0"),
        ({"backbone_lr": -1.0}, "backbone_lr: "),
        ({"token_dropout": 0.5}, "^token_dropout: is of heads on cached features"),
        (ROLE | {"schedule": "one-cycle"}, "^schedule: the label estimator of role"),
        ({"backbone": "resnet5O"}, "resnet5O"),
        ({"head": "liner"}, "unknown head 'liner'; did you mean 'linear'"),
        ({"init": Path("nowhere")}, "nowhere"),
        (
            {"activation_checkpointing": True, "layer": "layer3"},
            "^activation_checkpointing: does not go with the layer layer3",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(
    photos: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MlcError, match=message) as refused:
        tuned(photos, tmp_path / "run", **settings)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_needs_no_data_is_seen_before_it(tmp_path: Path) -> None:
    for settings in ({"precision": "bfloat16"}, ROLE | {"micro_batch": 2}, {"workers": 0}):
        with pytest.raises(MlcError, match=f"^{list(settings)[-1]}: "):
            check_finetune(config_of(tmp_path / "nowhere.csv", tmp_path / "run", **settings))


# --init


def init(run: Path, photos: Path, out: Path, **flags: Any) -> Any:
    given = {"data": str(photos), "out": str(out), "device": "cpu", "epochs": 1} | flags
    return finetune(finetune_config(None, (), given, init=run))


def test_a_run_of_other_classes_is_refused(photos: Path, tmp_path: Path) -> None:
    two = tuned(photos, tmp_path / "two", classes=("red", "blue")).run.path
    with pytest.raises(MlcError, match=r"classes: .*init|init: .* classes"):
        init(two, photos, tmp_path / "run", classes=["red", "green", "blue"])
    three = tuned(photos, tmp_path / "three").run.path
    table = photos.with_name("others.csv")
    table.write_text(photos.read_text().replace("green", "violet"))
    with pytest.raises(MlcError, match="does not know violet; name the run's with --classes"):
        init(three, table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_starts_a_training_of_its_classes_alone(photos: Path, tmp_path: Path) -> None:
    two = tuned(photos, tmp_path / "two", classes=("red", "blue")).run.path
    assert init(two, photos, tmp_path / "run").run.classes == ("red", "blue")


def test_another_head_than_the_run_s_is_refused(photos: Path, tmp_path: Path) -> None:
    run = tuned(photos, tmp_path / "first").run.path
    for name, value in {"head": "q2l", "backbone": "resnet18"}.items():
        with pytest.raises(MlcError, match=f"^init: .* has {name} .*, got {value}; leave it out"):
            init(run, photos, tmp_path / "run", **{name: value})


def test_weights_that_the_head_was_not_trained_on_are_refused(photos: Path, tmp_path: Path) -> None:
    run = tuned(photos, tmp_path / "first").run.path
    other = tuned(photos, tmp_path / "second", seed=1).run.path / BACKBONE
    with pytest.raises(MlcError, match=r"^init: .*first was .* with other weights; .* --weights$"):
        init(run, photos, tmp_path / "run", weights=str(other))
    assert init(run, photos, tmp_path / "run", weights=str(run / BACKBONE)).notes == []


def test_other_labels_than_the_run_s_are_told(photos: Path, tmp_path: Path) -> None:
    run = tuned(photos, tmp_path / "first").run.path
    lines = photos.read_text().splitlines()
    others = photos.with_name("other-splits.csv")
    others.write_text("\n".join([lines[0], lines[-1].replace("test", "train"), *lines[1:-1]]))
    (note,) = init(run, others, tmp_path / "run").notes
    assert note.startswith(f"init: {run} is not known to have been trained on these labels")


def test_a_run_of_imported_features_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(made_store.MADE_BY, "backbone_config", None)
    config = TrainConfig(
        features=made_store.write(tmp_path), epochs=1, out=tmp_path / "imported", device="cpu"
    )
    features, table = read_inputs(config)
    run = fit(config, features, prepare(config, features, table)).path
    with pytest.raises(MlcError, match="was trained on imported features, and no backbone here"):
        init(run, photos, tmp_path / "run")


def test_a_run_that_is_not_there_is_told(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(MlcError, match="nowhere: "):
        init(tmp_path / "nowhere", photos, tmp_path / "run")


def test_the_command_wants_to_be_sure(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["finetune", "--data", str(photos), "--out", str(tmp_path / "run")])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("error: finetune: reads every image in every epoch; pass --end-to-")
    assert not list(tmp_path.iterdir())


def test_the_command_lists_bad_images(
    one_broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [each for item in SETTINGS.items() for each in ("--set", "{}={}".format(*item))]
    asked = ["--end-to-end", "--data", str(one_broken), "--out", str(tmp_path / "run"), *sets]
    main(["finetune", *asked])
    told = capsys.readouterr()
    assert "05.jpg" in told.out + told.err
    with pytest.raises(SystemExit):
        main(["finetune", *asked, "--out", str(tmp_path / "other"), "--on-error", "raise"])
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error" in each]
    assert "05.jpg: " in line
