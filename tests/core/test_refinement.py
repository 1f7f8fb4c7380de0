"""A step of a refinement: the same for any number of workers and passes, and exact after a resume."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import distributed, nn

from meanflow_core.autoencoder import decode_latents
from meanflow_core.checkpoint import load_train_state, save_train_state
from meanflow_core.config import OptimizerConfig, RefineConfig
from meanflow_core.frechet import FrechetReference, RawMoments
from meanflow_core.metrics import FeatureStatistics, frechet_distance
from meanflow_core.networks.building import build_network
from meanflow_core.pixels import PixelAutoencoder
from meanflow_core.presets.demo import debug
from meanflow_core.refinement import (
    FrechetTerm,
    RefineBatch,
    Renderer,
    draw_batch,
    draw_measurement,
    measure,
    refine_step,
)
from meanflow_core.training import contiguous_share, new_train_state
from tests.support.processes import run_group
from tests.support.training_steps import parameters

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, COUNTS = (4, 8, 8), [1, 3]  # grey images of 16x16 pixels, two classes
NUM_STEPS, SAVE_STEP = 20, 9
CONFIG = RefineConfig(
    optimizer=OptimizerConfig(learning_rate=1e-4),
    ema_decays=(0.9,),
    global_batch_size=22,
    moments_decay=0.8,
    fill_steps=4,
    num_steps=NUM_STEPS,
    measure_samples=64,
)


class Extractor(nn.Module):
    """Six smooth features of an image."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh(), nn.Flatten(),
                nn.Linear(72, 6),
            ).requires_grad_(False)  # fmt: skip

    def forward(self, pixels):
        return self.layers(pixels / 127.5 - 1.0)


def new_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(debug().network, sample_size=8, in_channels=4, num_classes=2)
        for parameter in network.parameters():  # the last layer is initialised to 0
            parameter.data += 0.05 * torch.randn_like(parameter)
    return new_train_state(network, CONFIG, device=torch.device("cpu"))


RENDER = Renderer(vae=PixelAutoencoder(4, 2), num_inference_steps=1)


def real_pixels():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(40, 216, (200, 1, 16, 16), generator=generator).float().expand(-1, 3, -1, -1)


def terms_of(state):
    """Two extractors, whose moments are part of the state."""
    terms = []
    for seed in (1, 2):
        extractor = Extractor(seed)
        reference = FrechetReference.of(FeatureStatistics.of(extractor(real_pixels())))
        moments = RawMoments.zeros(6)
        mean, second = (
            state.buffers.setdefault(f"{seed}.{name}", getattr(moments, name)) for name in ("mean", "second")
        )
        terms.append(
            FrechetTerm(
                name=str(seed),
                features=extractor,
                reference=reference,
                moments=RawMoments(mean, second),
                weight=float(seed),
            )
        )
    return terms


def batches(step, rank=0, world_size=1, passes=1):
    first, last = contiguous_share(CONFIG.global_batch_size, rank, world_size)
    parts = [contiguous_share(last - first, number, passes) for number in range(passes)]
    return [draw_batch(CONFIG, COUNTS, step, first + start, first + stop, SHAPE) for start, stop in parts]


def refined(state, *, num_steps=NUM_STEPS, **options):
    terms = terms_of(state)
    while state.step < num_steps:
        metrics = refine_step(state, RENDER, terms, batches(state.step, **options), CONFIG)
    return state, metrics


def comparable(network):
    """All parameters but the biases of keys: they shift all logits of a softmax alike, so that their gradient is nothing but
    rounding errors, of which Adam makes steps."""
    network = copy.deepcopy(network)
    for name, value in network.named_parameters():
        if name.endswith("qkv.bias"):
            value.data.chunk(3)[1].zero_()
    return parameters(network)


def results_of(rank, world_size):
    state, metrics = refined(new_state(), rank=rank, world_size=world_size, passes=2)
    sums = metrics.sums.clone()
    distributed.all_reduce(sums)
    return comparable(state.network), state.buffers, sums


@pytest.fixture(scope="module")
def one_process():
    return refined(new_state())


def test_the_pixels_are_those_that_the_generator_writes(vae):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pixels = Renderer(vae=vae, num_inference_steps=1).pixels(latents)
    assert torch.equal((pixels + 0.5).permute(0, 2, 3, 1).to(torch.uint8), decode_latents(vae, latents.detach()))
    pixels.sum().backward()
    assert float(latents.grad.abs().sum()) > 0


def test_passes_do_not_change_the_result(one_process):
    state, _ = refined(new_state(), passes=5)
    torch.testing.assert_close(comparable(state.network), comparable(one_process[0].network), rtol=0, atol=1e-6)


@pytest.mark.parametrize("world_size", [4, pytest.param(2, marks=pytest.mark.soak)])
def test_workers_do_not_change_the_result(one_process, world_size):
    state, metrics = one_process
    found, buffers, sums = run_group(results_of, (world_size,), world_size, timeout_seconds=200)
    torch.testing.assert_close(found, comparable(state.network), rtol=0, atol=1e-6)
    for name, value in buffers.items():
        torch.testing.assert_close(value, state.buffers[name], rtol=1e-6, atol=1e-6)
    # The sums of the workers' metrics are means of the same distances.
    torch.testing.assert_close(sums[1::2] / sums[2::2], metrics.sums[1::2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[0], metrics.sums[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [2, SAVE_STEP])
def test_a_resumed_refinement_has_the_same_bits(one_process, tmp_path, step):
    """Also from a checkpoint within the first steps, which only fill the moments."""
    state, _ = refined(new_state(), num_steps=step)
    save_train_state(state, CONFIG, tmp_path)
    resumed = new_state()
    terms_of(resumed)
    load_train_state(resumed, tmp_path)
    assert (resumed.step, resumed.num_updates) == (step, max(0, step - CONFIG.fill_steps))
    resumed, _ = refined(resumed)
    assert torch.equal(parameters(resumed.network), parameters(one_process[0].network))
    assert torch.equal(parameters(resumed.ema_network), parameters(one_process[0].ema_network))
    for name, value in resumed.buffers.items():
        assert torch.equal(value, one_process[0].buffers[name])


def test_the_first_steps_only_fill_the_moments():
    state, metrics = refined(new_state(), num_steps=CONFIG.fill_steps)
    assert torch.equal(parameters(state.network), parameters(new_state().network))
    assert (state.step, state.num_updates, float(metrics.gradient_norm)) == (CONFIG.fill_steps, 0, 0.0)
    pixels = torch.cat([RENDER.pixels(RENDER.latents(state.network, batches(step)[0])) for step in range(4)])
    moments = RawMoments.of(FeatureStatistics.of(Extractor(1)(pixels.detach())))
    torch.testing.assert_close(state.buffers["1.mean"], moments.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state.buffers["1.second"], moments.second, rtol=1e-6, atol=1e-6)


def test_the_distance_of_fresh_samples_falls():
    config = replace(CONFIG, num_steps=60, optimizer=OptimizerConfig(learning_rate=1e-3))
    state = new_state()
    terms = terms_of(state)

    def distance():
        samples = [draw_measurement(config, COUNTS, 0, config.measure_samples, SHAPE)]
        sums = measure(state.network, RENDER, [term.features for term in terms], samples, config)
        return sum(
            frechet_distance(found, FeatureStatistics.of(term.features(real_pixels())))
            for found, term in zip(sums, terms, strict=True)
        )

    before = distance()
    while state.step < config.num_steps:
        refine_step(state, RENDER, terms, batches(state.step), config)
    assert distance() < 0.5 * before


def test_rows_are_drawn_by_seed_step_and_row():
    whole, part = draw_batch(CONFIG, COUNTS, 3, 0, 22, SHAPE), draw_batch(CONFIG, COUNTS, 3, 5, 9, SHAPE)
    assert torch.equal(part.noise, whole.noise[5:9])
    assert torch.equal(part.labels, whole.labels[5:9])
    assert not torch.equal(draw_batch(CONFIG, COUNTS, 4, 0, 22, SHAPE).noise, whole.noise)
    labels = draw_measurement(replace(CONFIG, measure_samples=4000), COUNTS, 0, 4000, SHAPE).labels
    assert float((labels == 1).double().mean()) == pytest.approx(0.75, abs=0.03)


def test_a_step_with_a_nonfinite_gradient_is_skipped():
    state = new_state()
    state, _ = refined(state, num_steps=6)
    before, moments = parameters(state.network), state.buffers["1.mean"].clone()
    terms = terms_of(state)
    weightless = [replace(terms[0], weight=float("inf")), terms[1]]
    of_nan = [replace(terms[0], features=lambda pixels: terms[0].features(pixels) * float("nan")), terms[1]]
    for number, broken in enumerate((weightless, of_nan), start=1):
        metrics = refine_step(state, RENDER, broken, batches(6), CONFIG, may_skip=True)
        assert metrics.skipped
        assert not bool(torch.isfinite(metrics.gradient_norm))
        assert torch.equal(parameters(state.network), before)
        assert torch.equal(state.buffers["1.mean"], moments)
        assert (state.step, state.num_skipped) == (6 + number, number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fill_steps": 20}, "fill_steps must be below num_steps 20"),
        ({"fill_steps": 0}, r"moving moments \(moments_decay 0.8\) need at least one of fill_steps, but got 0"),
        ({"moments_decay": 1.0}, r"moments_decay must lie in \[0, 1\)"),
        ({"frozen_precision": "float16"}, "frozen_precision must be one of float32, bfloat16"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)


def test_guidance_reaches_the_network():
    seen = []

    def network(z, conditioning):
        seen.append(conditioning)
        return type("Output", (), {"average_velocity": torch.zeros_like(z)})

    render = replace(RENDER, num_inference_steps=2, guidance_scale=4.0, guidance_interval_start=0.2)
    batch = RefineBatch(noise=torch.zeros(3, *SHAPE), labels=torch.zeros(3, dtype=torch.int64))
    render.latents(network, batch)
    assert [(float(c.t[0]), float(c.r[0])) for c in seen] == [(1.0, 0.5), (0.5, 0.0)]
    assert [float(seen[0].omega[2]), float(seen[0].guidance_interval_end[0])] == [4.0, 1.0]
    assert float(seen[0].guidance_interval_start[0]) == pytest.approx(0.2)
