"""The recipes of fine-tuning: they can be run, and train as their papers' code does."""

from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlc.configs import load, recipes
from mlc.extract.backbone import resolve_name
from mlc.finetune.config import OF_BACKBONE, FinetuneConfig, check_finetune
from mlc.finetune.init import FIXED
from mlc.finetune.model import ImageModel
from mlc.finetune.objective import Objective
from mlc.finetune.processes import Processes
from mlc.finetune.training import FineTuning
from mlc.heads.decoder import DecoderConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.modules import make_head
from mlc.losses.role import ESTIMATOR_LR_FACTOR

IMAGES, CLASSES, STEPS = 6, 3, 50
QUERY2LABEL = ("q2l-r101-448", "q2l-r101-448-v2")
STEM_AND_LAYER1 = 222_400  # parameters of their convolutions; the code's BatchNorms have none
TRAINED = 193_579_088  # as trainings of the code print it
HERE = {"precision": "float32", "device": "cpu"}  # float16 is for GPUs
LIGHT = {"random_weights": True, "size_px": 64}
SLIM = {"hidden_dim": 16, "ffn_dim": 16}


def config_of(name: str, **flags: Any) -> FinetuneConfig:
    return load(FinetuneConfig, "finetune", name, flags={**HERE, **flags})


def model_of(config: FinetuneConfig) -> ImageModel:
    return ImageModel(config, CLASSES, torch.Generator().manual_seed(0))


def begin(config: FinetuneConfig, model: ImageModel) -> FineTuning:
    observed = torch.ones(IMAGES, CLASSES, dtype=torch.int8)
    objective = Objective(config, observed, torch.Generator().manual_seed(0))
    return FineTuning(config, model, objective, Processes(torch.device("cpu")), STEPS)


def groups(tuning: FineTuning) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tuning.state()["optimiser"]["param_groups"]
    return found


def trained(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad)


@pytest.fixture(scope="module", params=QUERY2LABEL)
def query2label(request: pytest.FixtureRequest) -> tuple[FinetuneConfig, ImageModel]:
    """Return a recipe of Query2Label and its model, the head slim."""
    config = config_of(request.param, **LIGHT, **SLIM)
    return config, model_of(config)


@pytest.fixture(scope="module")
def mlspl() -> tuple[FinetuneConfig, ImageModel]:
    config = config_of("mlspl", **LIGHT, loss="role", knobs={"expected_positives": 2.9})
    return config, model_of(config)


def test_there_are_the_recipes_of_both_papers() -> None:
    assert set(recipes("finetune")) >= {"mlspl", "mlspl-linear-init", *QUERY2LABEL}


@pytest.mark.parametrize("name", recipes("finetune"))
def test_every_recipe_can_be_run(name: str) -> None:
    config = config_of(name)
    check_finetune(config)
    assert resolve_name(config.backbone)


def test_names_mean_the_weights_that_the_papers_mean() -> None:
    names = {name: resolve_name(config_of(name).backbone) for name in recipes("finetune")}
    assert names["mlspl"] == "resnet50.tv_in1k"
    assert names["q2l-r101-448"] == "resnet101.tv_in1k"
    assert names["q2l-r101-448-v2"] == "torchvision:resnet101.IMAGENET1K_V2"


def test_a_run_to_start_from_may_be_of_any_model() -> None:
    values = yaml.safe_load(recipes("finetune")["mlspl-linear-init"].read_text())
    assert not values.keys() & {*FIXED, *OF_BACKBONE, "loss", "labels"}
    both = [
        config_of(name).model_dump(include=set(values)) for name in ("mlspl", "mlspl-linear-init")
    ]
    assert both[0] == both[1]


def test_the_second_weights_are_trained_as_the_first() -> None:
    first, second = (config_of(name).model_dump() for name in QUERY2LABEL)
    different = {key for key in first if first[key] != second[key]}
    assert different == {"backbone", "micro_batch", "activation_checkpointing"}


def test_parts_of_a_batch_are_whole() -> None:
    for name in QUERY2LABEL:
        config = config_of(name)
        assert config.micro_batch is not None
        assert config.batch_size % config.micro_batch == 0


def test_the_model_of_query2label_has_as_many_parameters_as_its_code_prints(
    query2label: tuple[FinetuneConfig, ImageModel],
) -> None:
    _, model = query2label
    sizes = {key: getattr(config_of("q2l-r101-448"), key) for key in DecoderConfig.model_fields}
    with torch.device("meta"):
        head = make_head(
            "q2l", HeadSize(2048, 80, (14, 14)), DecoderConfig(**sizes), torch.Generator()
        )
    assert trained(model.backbone) + trained(head) == TRAINED


def test_stem_layer1_and_batch_norms_of_query2label_are_frozen(
    query2label: tuple[FinetuneConfig, ImageModel],
) -> None:
    _, model = query2label
    norms = [each for each in model.backbone.modules() if isinstance(each, _BatchNorm)]
    assert len(norms) == 104
    assert not any(each.requires_grad for norm in norms for each in norm.parameters())
    convolutions = {
        name: each.weight
        for name, each in model.backbone.named_modules()
        if isinstance(each, nn.Conv2d)
    }
    frozen = {name: each for name, each in convolutions.items() if not each.requires_grad}
    assert {name.partition(".")[0] for name in frozen} == {"conv1", "layer1"}
    assert sum(each.numel() for each in frozen.values()) == STEM_AND_LAYER1
    assert all(each.requires_grad for each in model.head.parameters())


def test_a_gradient_reaches_all_that_query2label_trains_and_nothing_else(
    query2label: tuple[FinetuneConfig, ImageModel],
) -> None:
    _, model = query2label
    before = {name: each.clone() for name, each in model.named_buffers()}
    pixels = torch.randint(256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    model.train()(pixels.to(torch.uint8)).sum().backward()
    for name, each in model.named_parameters():
        assert (each.grad is not None) == each.requires_grad, name
    # Not that of a block's own convolutions: timm's blocks begin as their shortcuts.
    first = model.backbone.get_submodule("layer2.0.downsample.0").weight.grad
    assert first is not None
    assert first.any()
    model.zero_grad()
    assert all(torch.equal(each, before[name]) for name, each in model.named_buffers())


def test_all_of_query2label_decays_at_the_rates_of_one_cycle(
    query2label: tuple[FinetuneConfig, ImageModel],
) -> None:
    config, model = query2label
    tuning = begin(config, model)
    of_backbone, of_head = groups(tuning)
    counts = [
        sum(each.requires_grad for each in part.parameters())
        for part in (model.backbone, model.head)
    ]
    assert [len(group["params"]) for group in (of_backbone, of_head)] == counts
    peak = STEPS // 5 - 1  # the last step of the first fifth
    seen = {}
    for step in (0, peak - 1, peak, peak + 1, STEPS - 1):
        tuning.step(step)
        rates = {(group["lr"], group["betas"]) for group in groups(tuning)}
        ((rate, betas),) = rates  # of backbone and head
        seen[step] = (rate, *betas)
    assert {group["weight_decay"] for group in groups(tuning)} == {0.01}
    assert seen[0] == pytest.approx((4e-6, 0.95, 0.999), rel=1e-6)
    assert seen[peak] == pytest.approx((1e-4, 0.85, 0.999), rel=1e-6)
    assert max(seen[peak - 1][0], seen[peak + 1][0]) < 0.999e-4
    assert seen[STEPS - 1] == pytest.approx((4e-10, 0.95, 0.999), rel=1e-6)


def test_the_average_of_query2label_is_slow_from_the_first_step(
    query2label: tuple[FinetuneConfig, ImageModel],
) -> None:
    config, model = query2label
    tuning = begin(config, model)
    names = ("head.query_embed.weight", "backbone.bn1.running_mean")
    state = model.state_dict()
    before = {name: state[name].clone() for name in names}
    for step in range(2):
        for name in names:
            state[name].copy_(before[name] + 1)
        tuning.step(step)
    for name in names:
        moved = tuning.state()["average"][name] - before[name]
        torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9997**2), rtol=0, atol=1e-6)
        state[name].copy_(before[name])


def test_what_else_query2label_s_code_says() -> None:
    config = config_of("q2l-r101-448", precision="float16", device="cuda")
    assert (config.batch_size, config.epochs, config.patience) == (128, 80, 8)
    assert (config.optimiser, config.loss, config.loss_scale) == ("adamw", "asl", 1000)
    assert (config.size_px, config.interpolation) == (448, "bilinear")
    assert (config.rand_augment, config.cutout, config.flip) == (True, 0.5, False)
    assert (config.keep_unlabelled, config.threshold) == (True, 0.823)
    assert config.knobs == {
        "gamma_neg": 2, "gamma_pos": 0, "clip": 0, "focus_gradient": 0, "epsilon": 1e-5
    }  # fmt: skip
    written = yaml.safe_load(recipes("finetune")["q2l-r101-448"].read_text())
    assert written["precision"] == "float16"


def test_all_of_mlspl_is_trained_by_plain_adam_at_one_rate(
    mlspl: tuple[FinetuneConfig, ImageModel],
) -> None:
    config, model = mlspl
    tuning = begin(config, model)
    assert all(each.requires_grad for each in model.parameters())
    assert all(each.training for each in model.modules())
    parameters = sum(len(group["params"]) for group in groups(tuning))
    assert parameters == len(list(model.parameters()))
    for step in (0, STEPS - 1):
        tuning.step(step)
        assert {
            (group["lr"], group["betas"], group["eps"], group["weight_decay"])
            for group in groups(tuning)
        } == {(1e-5, (0.9, 0.999), 1e-8, 0.0)}
    assert tuning.state()["average"] == {}
    assert tuning.objective.estimator is not None
    assert ESTIMATOR_LR_FACTOR == 10
    assert tuning.objective.estimator.lr.tolist() == pytest.approx([1e-4])


def test_what_else_mlspl_s_code_says() -> None:
    config = config_of("mlspl")
    assert (config.batch_size, config.epochs, config.size_px) == (16, 10, 448)
    assert (config.flip, config.rand_augment, config.cutout) == (True, False, 0)
    assert (config.head, config.val_labels, config.select_on) == ("linear", "clean", "val")
    assert (config.corruption_seed, config.split_seed, config.patience) == (1200, 1200, None)
