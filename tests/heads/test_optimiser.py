"""The optimisers of heads of tokens, against torch's own and the figures of Query2Label."""

import pytest
import torch
from torch import nn

from mlc.heads.average import MovingAverage
from mlc.heads.optimiser import make_optimiser, one_cycle, set_rate
from mlc.heads.recipe import RecipeConfig


@pytest.mark.parametrize("steps", [6, 20, 51, 640])
def test_one_cycle_is_torch_s(steps: int) -> None:
    optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-7)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=1e-4, total_steps=steps, pct_start=0.2
    )
    for step in range(steps):
        group = optimiser.param_groups[0]
        rate, beta1 = one_cycle(step, steps, 1e-4)
        assert rate == pytest.approx(group["lr"], rel=1e-9, abs=1e-18)
        assert beta1 == pytest.approx(group["betas"][0], rel=1e-9)
        optimiser.step()
        if step < steps - 1:
            schedule.step()


def test_one_cycle_has_the_figures_of_query2label() -> None:
    steps = 80 * 641
    rates = [one_cycle(step, steps, 1e-4) for step in range(steps)]
    assert rates[0] == pytest.approx((4e-6, 0.95))
    top = max(range(steps), key=lambda step: rates[step][0])
    assert top / steps == pytest.approx(0.2, abs=1e-4)
    assert rates[top] == pytest.approx((1e-4, 0.85), rel=1e-6)
    assert rates[-1] == pytest.approx((4e-10, 0.95), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_one_cycle_of_few_steps_has_a_rate(steps: int) -> None:
    for step in range(steps):
        rate, beta1 = one_cycle(step, steps, 1.0)
        assert 0 < rate <= 1
        assert 0.85 <= beta1 <= 0.95


class Small(nn.Module):
    """A matrix, a bias and a norm, and what is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 3), nn.LayerNorm(3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize(
    ("decay", "decayed"),
    [
        ("weights", {"linear.weight"}),
        ("all", {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}),
    ],
)
@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam-l2", torch.optim.Adam)]
)
def test_what_decays(decay: str, decayed: set[str], name: str, kind: type) -> None:
    head = Small()
    recipe = RecipeConfig(optimiser=name, decay=decay)
    optimiser = make_optimiser([(head, 1e-3)], recipe, 0.1)
    assert type(optimiser) is kind
    of = {id(each): name for name, each in head.named_parameters()}
    found = {
        of[id(each)]
        for group in optimiser.param_groups
        for each in group["params"]
        if group["weight_decay"]
    }
    assert found == decayed
    assert sum(len(group["params"]) for group in optimiser.param_groups) == 4


def test_a_constant_schedule_leaves_the_rate_alone() -> None:
    optimiser = make_optimiser([(Small(), 1e-3)], RecipeConfig(), 0.0)
    set_rate(optimiser, RecipeConfig(), 5, 10)
    assert {group["lr"] for group in optimiser.param_groups} == {1e-3}


def test_the_average_is_the_formula_s() -> None:
    head = Small()
    slow, fast = (MovingAverage(head, 0.9, warm_up=each) for each in (False, True))
    want = {False: head.linear.weight.detach().clone(), True: head.linear.weight.detach().clone()}
    for step in range(30):
        with torch.no_grad():
            head.linear.weight.add_(1.0)
            head.count += 1
        for warm_up, average in ((False, slow), (True, fast)):
            average.update(head, step)
            decay = min(0.9, (1 + step) / (10 + step)) if warm_up else 0.9
            want[warm_up] = decay * want[warm_up] + (1 - decay) * head.linear.weight.detach()
    torch.testing.assert_close(slow.state["linear.weight"], want[False])
    torch.testing.assert_close(fast.state["linear.weight"], want[True])
    assert slow.state["count"] == 30
