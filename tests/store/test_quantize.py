"""Stored numbers: numpy and slow loops as oracles, and what calibration promises, in figures."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mlc.configs.errors import MlcError
from mlc.store import quantize
from mlc.store.quantize import Cost, calibrate, cost, decode, decode_numpy, encode

SHAPES = npst.array_shapes(min_dims=3, max_dims=4, max_side=5)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
SCALES = st.floats(2.0**-100, 2.0**100, width=32)
FEW = settings(max_examples=60, deadline=None)
CLIPS = [2 ** (step / 4) for step in range(-8, 9)]


def batch(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(values: torch.Tensor, dtype: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Store (n, ..., C) values and read them."""
    stored, _ = encode(values[:, None], dtype, scale)
    return decode(stored, scale)[:, 0]


def decibels(values: torch.Tensor, scale: torch.Tensor) -> float:
    """Return signal over noise of (n, C) values stored as int8, mean over the channels."""
    noise = (through(values, "int8", scale) - values).square().mean(0)
    return (10 * torch.log10(values.square().mean(0) / noise)).mean().item()


def test_the_examples_hold() -> None:
    result = doctest.testmod(quantize)
    assert (result.failed, result.attempted >= 3) == (0, True)


# Encoding.


@FEW
@given(st.data())
def test_int8_is_the_nearest_step_and_counts_what_is_clipped(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    scale = data.draw(npst.arrays(np.float32, shape[-1], elements=SCALES))
    steps = data.draw(npst.arrays(np.float32, shape, elements=st.floats(-300, 300, width=32)))
    with np.errstate(over="ignore"):
        values = steps * scale
    values = np.where(np.isfinite(values), values, np.float32(0))
    stored, clipped = encode(torch.from_numpy(values), "int8", torch.from_numpy(scale))
    assert (stored.dtype, clipped.dtype) == (torch.int8, torch.int64)
    exact = values / scale
    np.testing.assert_array_equal(stored, np.clip(np.rint(exact), -127, 127))
    beyond = np.abs(exact) > 127.5
    np.testing.assert_array_equal(clipped, beyond.reshape(*shape[:2], -1).sum(2))
    error = np.abs(decode(stored, torch.from_numpy(scale)).numpy().astype(np.float64) - values)
    assert (error <= scale.astype(np.float64) * (0.5 + 2e-5))[~beyond].all()


@FEW
@given(st.data())
def test_float16_is_numpys_and_clips_instead_of_infinity(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    edges = st.sampled_from([65504.0, 65505.0, 65519.0, 65520.0, -65504.0, -65536.0, 6e-8, 2.9e-8])
    elements = st.one_of(st.floats(-70000, 70000, width=32), FLOATS, edges.map(np.float32))
    values = data.draw(npst.arrays(np.float32, shape, elements=elements))
    stored, clipped = encode(torch.from_numpy(values), "float16")
    assert stored.dtype == torch.float16
    with np.errstate(over="ignore"):
        want = values.astype(np.float16)
    want = np.where(np.isinf(want), np.copysign(np.float16(65504), want), want)
    np.testing.assert_array_equal(stored, want)
    beyond = np.abs(values) > 65504
    np.testing.assert_array_equal(clipped, beyond.reshape(*shape[:2], -1).sum(2))


@FEW
@given(st.lists(SCALES, min_size=1, max_size=8))
def test_what_was_read_is_stored_as_it_was(scales: list[float]) -> None:
    scale = torch.tensor(scales)
    every = torch.arange(-127, 128, dtype=torch.int8)[:, None, None].expand(-1, 1, len(scales))
    again, clipped = encode(decode(every, scale), "int8", scale)
    assert torch.equal(again, every)
    assert not clipped.any()


def test_halves_round_to_even_and_127_and_a_half_is_not_clipped() -> None:
    steps = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -127.5, 127.51, -1e30])
    stored, clipped = encode(steps[None, None], "int8", torch.ones(10))
    assert stored.tolist() == [[[0, 2, 2, 0, -2, 126, 127, -127, 127, -127]]]
    assert clipped.tolist() == [[2]]


def test_a_step_is_the_quotient_not_a_product_with_the_reciprocal() -> None:
    scale = np.random.default_rng(0).uniform(0.01, 1, 5000).astype(np.float32)
    values = scale * np.float32(2.5)
    assert ((values / scale).round() != (values * (1 / scale)).round()).any()
    stored, _ = encode(torch.from_numpy(values)[None, None], "int8", torch.from_numpy(scale))
    np.testing.assert_array_equal(stored[0, 0], np.rint(values / scale))


def test_the_counts_are_those_of_each_image_and_view() -> None:
    values = torch.zeros(3, 2, 4, 5)
    values[0, 1, 2, 3] = values[2, 0, 0, :2] = -1e6
    want = [[0, 1], [0, 0], [2, 0]]
    for dtype in ("float16", "int8"):
        assert encode(values, dtype, torch.ones(5))[1].tolist() == want
    assert encode(values[:, :, 0], "int8", torch.ones(5))[1].tolist() == [[0, 0], [0, 0], [2, 0]]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("shape", [(3, 2, 400, 701), (700, 2, 1024), (2, 1, 1200, 1024)])
def test_a_batch_of_many_blocks_is_every_item_alone(dtype: str, shape: tuple[int, ...]) -> None:
    values, scale = batch(0, *shape), torch.full(shape[-1:], 0.01)
    values[-1, -1] *= 1e5
    assert values.numel() > 2**20
    stored, clipped = encode(values, dtype, scale)
    for image in (0, 1, shape[0] // 2, shape[0] - 1):
        alone, count = encode(values[image : image + 1], dtype, scale)
        assert torch.equal(stored[image], alone[0])
        assert torch.equal(clipped[image], count[0])
    assert clipped[-1, -1] > clipped[0, 0]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_values_may_lie_in_any_order_in_memory_and_stay_as_they_are(dtype: str) -> None:
    scale = torch.full((6,), 0.01)
    values = batch(1, 2, 6, 5, 3).permute(0, 3, 2, 1)
    before = values.clone()
    stored, clipped = encode(values, dtype, scale)
    want, counts = encode(values.contiguous(), dtype, scale)
    assert torch.equal(stored, want)
    assert torch.equal(clipped, counts)
    assert torch.equal(values, before)
    assert stored.is_contiguous()


def test_float32_is_kept_and_an_empty_batch_is_empty() -> None:
    values = batch(2, 2, 1, 3)
    stored, clipped = encode(values, "float32")
    assert stored is values
    assert clipped.tolist() == [[0], [0]]
    stored, clipped = encode(torch.empty(0, 2, 7, 3), "int8", torch.ones(3))
    assert (stored.shape, clipped.shape) == ((0, 2, 7, 3), (0, 2))


def test_mistakes_are_named() -> None:
    values = torch.zeros(1, 1, 3)
    with pytest.raises(MlcError, match=r"unknown dtype of features 'float61'.*'float16'"):
        encode(values, "float61")
    steps = torch.zeros(1, 3, dtype=torch.int8)
    for mistake in (
        lambda: encode(values, "int8"),
        lambda: decode(steps),
        lambda: decode_numpy(steps.numpy()),
    ):
        with pytest.raises(MlcError, match="int8: expected a scale for each channel, got none"):
            mistake()


# Decoding.


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("writable", [True, False])
def test_arrays_are_read_as_tensors_are(dtype: str, writable: bool) -> None:
    scale = calibrate(batch(3, 50, 6))
    stored, _ = encode(batch(4, 4, 2, 3, 6), dtype, scale)
    array, steps = stored.numpy().copy(), scale.numpy().copy()
    array.flags.writeable = steps.flags.writeable = writable
    values = decode_numpy(array, steps)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, decode(stored, scale))
    np.testing.assert_array_equal(array, stored)
    assert (values is array) == (dtype == "float32")


def test_reading_gives_the_dtype_that_is_asked_for() -> None:
    steps, scale = torch.tensor([[-3, 127]], dtype=torch.int8), torch.tensor([0.1, 2.0])
    want = torch.tensor([[-0.3, 254.0]])
    torch.testing.assert_close(decode(steps, scale), want, rtol=1e-7, atol=0)
    many = torch.arange(-127, 128, dtype=torch.int8)[:, None] * torch.ones(40, dtype=torch.int8)
    scale = torch.linspace(0.01, 1, 40)
    assert torch.equal(decode(many, scale, torch.float16), (many * scale).half())
    assert torch.equal(decode(want.half()), want.half().float())
    assert decode(want) is want


# Calibration.


def slow_errors(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every clip of a channel (n,) that is tried, and its error, by the docstring."""
    values = np.sort(np.abs(values.astype(np.float64)))[::-1]
    seen = sum(value > 0 for value in values)
    aside = math.ceil(seen / 10_000) if seen >= 32 else 0
    values = np.array([value for value in values if value <= 8 * values[aside]])
    count = min(max(math.ceil(seen / 8), 1), 16)
    mean = values[:count].mean() - (values[count] if count < len(values) else 0)
    clips, errors = np.array(CLIPS) * values[0], []
    for clip in clips:
        scale, error = clip / 127, 0.0
        for value in values:
            error += (min(round(value / scale), 127) * scale - value) ** 2
        if mean > 0:
            error += 2 * mean**2 * math.exp(-max(clip - values[0], 0) / mean)
        errors.append(error)
    return clips, np.array(errors)


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 90),
    sigma=st.floats(0.05, 3),
    zeros=st.sampled_from([0.0, 0.3, 0.6]),
    outlier=st.sampled_from([1.0, 3.0, 100.0, 1e4]),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
)
def test_no_other_clip_has_a_smaller_error(
    seed: int, rows: int, sigma: float, zeros: float, outlier: float, size: float
) -> None:
    generator = np.random.default_rng(seed)
    sample = np.exp(sigma * generator.standard_normal((rows, 3))) - 0.2
    sample[generator.random(sample.shape) < zeros] = 0
    sample[0] *= outlier
    sample = (size * sample).astype(np.float32)
    scale = calibrate(torch.from_numpy(sample)).double().numpy()
    for channel in np.flatnonzero((sample != 0).sum(0) >= min(rows, 32)):
        clips, errors = slow_errors(sample[:, channel])
        off = np.abs(np.log(clips / (127 * scale[channel])))
        assert off.min() < 1e-5
        assert errors[off.argmin()] <= errors.min() * 1.001


def test_the_search_leaves_either_end_of_the_clips() -> None:
    """Else the test above would hold for a search that is stuck there."""
    long_tail = torch.linspace(0, 1, 60_000)[:, None].clone()
    long_tail[0] = 7.9
    for sample, low, high in (
        (long_tail, 0.4, 0.8),
        (batch(5, 20_000, 1), 0.8, 1.1),
        (batch(6, 40, 1).exp(), 1.1, 4),
    ):
        assert low < 127 * calibrate(sample) / sample.abs().amax() < high


@pytest.mark.parametrize("rows", [256, 50_176])
def test_one_huge_value_costs_the_others_nothing(rows: int) -> None:
    clean = batch(7, rows, 16)
    spoilt = clean.clone()
    spoilt[7] = 1e4
    scale = calibrate(spoilt)
    clean = torch.cat([clean[:7], clean[8:]])
    assert decibels(clean, scale) > 39
    assert abs(decibels(clean, scale) - decibels(clean, calibrate(clean))) < 0.3
    assert decibels(clean, spoilt.abs().amax(0) / 127) < 1  # what is avoided: all is lost
    _, clipped = encode(spoilt[:, None], "int8", scale)
    assert clipped[7] == 16


def test_three_of_30_000_values_are_left_aside_and_a_fourth_is_not() -> None:
    sample = batch(8, 30_000, 2).clamp(-4, 4)
    sample[:3, 0] = sample[:4, 1] = 1000
    clip = 127 * calibrate(sample)
    assert clip[0] < 5
    assert clip[1] > 900


def test_values_eight_times_the_next_are_kept_and_beyond_are_not() -> None:
    sample = torch.linspace(0.1, 1, 100)[:, None].repeat(1, 2)
    sample[0] = torch.tensor([7.9, 8.1])
    clip = 127 * calibrate(sample)
    assert clip[0] > 6
    assert clip[1] < 2


def test_a_channel_that_seldom_fires_keeps_its_firing() -> None:
    sample = torch.zeros(50_000, 2)
    sample[:40] = 20 + batch(9, 40, 2)
    sample[40:, 1] = 0.05 * batch(10, 49_960)
    assert ((127 * calibrate(sample)) > 20).all()


def test_images_that_were_not_in_a_small_sample_are_kept_too() -> None:
    features = torch.empty(5000, 256).exponential_(generator=torch.Generator().manual_seed(0))
    sample, others = features[:100], features[100:]
    ours = cost(others, through(others, "int8", calibrate(sample)))
    plain = cost(others, through(others, "int8", sample.amax(0) / 127))
    assert ours.relative_rms < 0.03
    assert plain.relative_rms > 3 * ours.relative_rms


def test_channels_of_zeros_take_the_median_scale() -> None:
    sample = batch(11, 64, 5) * torch.tensor([1.0, 0.0, 10.0, 0.0, 100.0])
    scale = calibrate(sample)
    assert scale[1] == scale[3] == scale[2]
    assert scale[0] < scale[2] < scale[4]
    stored, _ = encode(sample[:, None], "int8", scale)
    assert not stored[..., [1, 3]].any()
    torch.testing.assert_close(calibrate(torch.zeros(4, 3)), torch.full((3,), 1 / 127))


def test_a_channel_with_few_values_is_not_taken_at_its_word() -> None:
    sample = batch(12, 1000, 4)
    sample[:, 2:] = 0
    sample[0, 2] = 1e-12  # rounding noise of a channel that other images wake
    sample[0, 3] = 50.0
    scale = calibrate(sample)
    assert scale[2] >= scale[:2].min()
    assert 127 * scale[3] >= 50
    small = calibrate(batch(13, 8, 3) * torch.tensor([1e-6, 1.0, 1e6]))
    assert small[0] < 1e-3 * small[1] < 1e-6 * small[2]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1.0, -3.0, 1e37])
def test_one_value_has_a_scale_that_holds_it(value: float) -> None:
    scale = calibrate(torch.tensor([[value]]))
    assert scale.shape == (1,)
    assert scale.dtype == torch.float32
    assert scale >= torch.finfo(torch.float32).tiny
    stored, clipped = encode(torch.tensor([[[value]]]), "int8", scale)
    assert clipped.item() == 0
    assert decode(stored, scale).item() == pytest.approx(value, rel=0.05, abs=1e-37)


def test_a_channels_scale_depends_on_its_values_only() -> None:
    sample = batch(14, 600, 4, 1000).exp()
    assert sample.numel() > 2 * 2**20
    before = sample.clone()
    scale = calibrate(sample)
    assert torch.equal(sample, before)
    rows = sample.flatten(0, 1)
    for channel in (0, 1, 436, 437, 999):
        torch.testing.assert_close(
            calibrate(rows[:, channel : channel + 1])[0], scale[channel], rtol=1e-6, atol=0
        )
    shuffled = -rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    assert (calibrate(shuffled) == scale).float().mean() > 0.99  # ties may fall either way


def test_a_sample_of_one_channel_stays_as_it_is() -> None:
    sample = batch(15, 50, 1)
    before = sample.clone()
    calibrate(sample)
    assert torch.equal(sample, before)


# Cost.


def test_the_cost_by_hand() -> None:
    original = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    restored = torch.tensor([[4.0, 3.0], [1.0, -1.5]])
    got = cost(original, restored)
    assert got.cosine_worst == pytest.approx(1 / math.sqrt(3.25), rel=1e-12)
    assert got.cosine_mean == pytest.approx((24 / 25 + 1 / math.sqrt(3.25)) / 2, rel=1e-12)
    assert got.max_difference == 1.5
    assert got.relative_rms == pytest.approx(math.sqrt(4.25 / 26), rel=1e-12)


def test_the_cost_of_nothing_and_of_everything() -> None:
    values, zeros = batch(16, 5, 3, 4), torch.zeros(5, 3, 4)
    same = cost(values, values.clone())
    assert (same.max_difference, same.relative_rms) == (0, 0)
    assert same.cosine_worst == pytest.approx(1, abs=1e-15)
    assert cost(zeros, zeros) == Cost(1, 1, 0, 0)
    assert cost(zeros, zeros + 2) == Cost(0, 0, 2, math.inf)
    assert cost(values, -values).cosine_mean == pytest.approx(-1, abs=1e-15)
    lost = cost(values, zeros)
    assert (lost.cosine_mean, lost.cosine_worst, lost.relative_rms) == (0, 0, 1)


def test_the_cost_is_numpys_over_many_blocks() -> None:
    original = batch(17, 300, 5, 1000)
    assert original.numel() > 2**20
    scale = calibrate(original)
    restored = through(original, "int8", scale)
    a, b = (each.numpy().reshape(300, -1).astype(np.float64) for each in (original, restored))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    got = cost(original, restored)
    want = Cost(
        cosine.mean(), cosine.min(), np.abs(a - b).max(), np.linalg.norm(a - b) / np.linalg.norm(a)
    )
    for name in ("cosine_mean", "cosine_worst", "max_difference", "relative_rms"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-9)
    assert got.cosine_worst < got.cosine_mean < 1


def test_float16_costs_less_than_int8() -> None:
    values = batch(18, 64, 512).relu()
    half, steps = (
        cost(values, through(values, each, calibrate(values))) for each in ("float16", "int8")
    )
    assert half.relative_rms < 3e-4 < 5e-3 < steps.relative_rms < 2e-2
    assert half.cosine_worst > steps.cosine_worst > 0.9998
