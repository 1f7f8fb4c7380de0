"""Sampling by DDIM and by consistency: against hand-written loops, closed forms on Gaussians, and saved generators."""

import itertools

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMapEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

from meanflow_core.generator import build_pipeline, load_pipeline, save_generator
from meanflow_core.networks.interface import Conditioning, NetworkModel, NetworkOutput
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets.consistency import ContinuousConsistencyConfig, DiscreteConsistencyConfig
from meanflow_core.presets.diffusion import DiffusionConfig
from meanflow_core.sampling import fresh_noise, noise_from_seeds, time_grid
from pipelines.demo import images

pytestmark = pytest.mark.usefixtures("one_thread")

S = 0.7  # standard deviation of the Gaussian latents
SCHEDULES = ("linear", "cosine")


def scheduler_for(schedule) -> DDIMScheduler:
    return build_objective(DiffusionConfig(schedule=schedule)).scheduler()


def build(network, vae, prediction, schedule=None):
    scheduler = scheduler_for(schedule) if schedule else FlowMapEulerDiscreteScheduler()
    return build_pipeline(network.eval(), vae, images.CLASS_NAMES, prediction=prediction, scheduler=scheduler)


@pytest.fixture(params=SCHEDULES)
def diffusion_pipeline(request, network, vae):
    return build(network, vae, "epsilon", request.param)


@pytest.fixture
def consistency_pipeline(network, vae):
    return build(network, vae, "consistency")


def evaluate(pipeline, z, t, r, labels):
    conditioning = Conditioning(t=torch.full((len(z),), t), r=torch.full((len(z),), r), labels=labels)
    with torch.no_grad():
        return pipeline.transformer(z, conditioning).u


class GaussianNoise(NetworkModel):
    """The expected noise of a latent x ~ N(0, S^2 I) given z_k, plus an error."""

    @register_to_config
    def __init__(self, schedule="linear", error=0.0, sample_size=2, in_channels=1, num_classes=10):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))  # gives the network a dtype and a device
        self.alphas_cumprod = scheduler_for(schedule).alphas_cumprod.double()

    def forward(self, z, conditioning, tangent=None, velocity_only=False):
        alpha = self.alphas_cumprod[(1000 * conditioning.t).round().long() - 1].view(-1, 1, 1, 1)
        noise = (1 - alpha).sqrt() * z / (alpha * S**2 + 1 - alpha)
        return NetworkOutput(u=noise + self.config.error)


def sample_gaussian(vae, schedule, steps, error=0.0):
    """The latents that DDIM makes of the noise 1."""
    pipeline = build(GaussianNoise(schedule=schedule, error=error), vae, "epsilon", schedule)
    return pipeline.sample_latents([0], torch.ones(1, 1, 2, 2), steps).double()


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_diffusion_sampling_is_diffusers_ddim(diffusion_pipeline, steps):
    noise, labels = noise_from_seeds([1, 2], (4, 8, 8)), torch.tensor([3, 4])
    sampled = diffusion_pipeline([3, 4], steps, latents=noise, output_type="latent").images
    config, z = diffusion_pipeline.scheduler.config, noise
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[0] == 999  # whatever the number of steps
    for timestep in scheduler.timesteps:
        t = (int(timestep) + 1) / 1000
        z = scheduler.step(evaluate(diffusion_pipeline, z, t, t, labels), timestep, z, eta=0.0).prev_sample
    assert float((sampled - z).norm() / z.norm()) < 1e-5


def test_diffusion_sampling_is_the_papers_ddim_for_any_number_of_steps(diffusion_pipeline):
    # DDIM, Eq. 12 with eta 0, between the noise levels that the network is given.
    noise, labels = noise_from_seeds([1, 2], (4, 8, 8)), torch.tensor([3, 4])
    alphas = diffusion_pipeline.scheduler.alphas_cumprod
    levels = [999, 856, 713, 570, 428, 285, 142]  # sevenths of 1000, rounded, minus 1
    z = noise
    for level, following in itertools.pairwise([*levels, None]):
        epsilon = evaluate(diffusion_pipeline, z, (level + 1) / 1000, (level + 1) / 1000, labels)
        a = alphas[level]
        b = torch.ones(()) if following is None else alphas[following]
        latents = (z - (1 - a).sqrt() * epsilon) / a.sqrt()
        if diffusion_pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2":
            latents = latents.clamp(-4.0, 4.0)
        z = b.sqrt() * latents + (1 - b).sqrt() * epsilon
    sampled = diffusion_pipeline.sample_latents([3, 4], noise, 7)
    assert float((sampled - z).norm() / z.norm()) < 1e-5


def test_one_step_of_ddim_multiplies_the_networks_error(vae):
    error = 1e-2
    exact, wrong = sample_gaussian(vae, "linear", 1), sample_gaussian(vae, "linear", 1, error)
    assert float((exact - wrong).mean() / error) == pytest.approx(157.4, rel=1e-3)
    assert float(scheduler_for("linear").alphas_cumprod[-1]) ** -0.5 == pytest.approx(157.4, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_cosine_schedule_does_not_turn_an_error_of_the_network_into_noise(vae, steps):
    exact, wrong = sample_gaussian(vae, "cosine", steps), sample_gaussian(vae, "cosine", steps, 1e-2)
    assert exact.abs().max() < 1.0
    assert wrong.abs().max() <= 4.0  # unclipped: 203 after one step, which the following steps keep


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_converges_to_the_flow_map_of_a_gaussian(vae, schedule):
    # z / sqrt(abar S^2 + 1 - abar) is constant along the flow.
    alpha = float(scheduler_for(schedule).alphas_cumprod[-1])
    exact = S / (alpha * S**2 + 1 - alpha) ** 0.5
    # 300 and 600 do not divide the 1000 noise levels.
    steps = (50, 100, 300, 600)
    errors = [abs(float(sample_gaussian(vae, schedule, count).mean()) / exact - 1) for count in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)  # first order
    assert errors[-1] < 5e-3


def test_diffusion_is_guided_inside_the_interval_like_flow_matching(network, vae):
    diffusion_pipeline = build(network, vae, "epsilon", "linear")
    noise, labels = noise_from_seeds([5, 6], (4, 8, 8)), torch.tensor([2, 3])
    scheduler = DDIMScheduler.from_config(diffusion_pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    z, scale = noise, torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    for timestep in scheduler.timesteps.tolist():
        t = (timestep + 1) / 1000
        epsilon = evaluate(diffusion_pipeline, z, t, t, labels)
        if t in (0.75, 0.5):
            null = evaluate(diffusion_pipeline, z, t, t, torch.full((2,), 10))
            epsilon = null + scale * (epsilon - null)
        z = scheduler.step(epsilon, timestep, z).prev_sample
    sampled = diffusion_pipeline.sample_latents(
        [2, 3], noise, 4, guidance_scale=[1.0, 3.0], guidance_interval=(0.5, 0.75)
    )
    assert float((sampled - z).norm() / z.norm()) < 1e-5
    unguided = diffusion_pipeline.sample_latents([2, 3], noise, 4)
    difference = (sampled - unguided).flatten(1).norm(dim=1) / unguided.flatten(1).norm(dim=1)
    assert difference[0] < 1e-5
    assert difference[1] > 1e-3


def test_diffusion_takes_equal_steps_only(diffusion_pipeline):
    noise = noise_from_seeds([1], (4, 8, 8))
    with pytest.raises(ValueError, match=r"must be equally spaced, but got \[1.0, 0.4, 0.0\]"):
        diffusion_pipeline.sample_latents([0], noise, timesteps=(1.0, 0.4, 0.0))
    expected = diffusion_pipeline.sample_latents([0], noise, 3)
    assert time_grid(3) != [1.0, 2 / 3, 1 / 3, 0.0]  # equal up to rounding
    sampled = diffusion_pipeline.sample_latents([0], noise, timesteps=(1.0, 2 / 3, 1 / 3, 0.0))
    assert torch.equal(sampled, expected)


@pytest.mark.parametrize("prediction", ["epsilon", "consistency", "average_velocity"])
def test_heuns_method_is_for_velocities(network, vae, prediction):
    pipeline = build(network, vae, prediction, "linear" if prediction == "epsilon" else None)
    with pytest.raises(
        ValueError, match=f"requires a generator that predicts velocity, but this predicts {prediction}"
    ):
        pipeline.sample_latents([0], noise_from_seeds([1], (4, 8, 8)), solver="heun")


def test_one_consistency_step_is_one_step_of_the_average_velocity(consistency_pipeline, pipeline):
    noise = noise_from_seeds([1, 2], (4, 8, 8))
    assert torch.equal(consistency_pipeline.sample_latents([3, 4], noise), pipeline.sample_latents([3, 4], noise))
    one, two = (consistency_pipeline.sample_latents([3, 4], noise, steps) for steps in (1, 2))
    assert not torch.allclose(one, two, atol=0.1)


@pytest.mark.parametrize("times", [(1.0, 0.5, 0.0), (1.0, 0.9, 0.15, 0.0)])
def test_consistency_steps_predict_the_image_and_add_fresh_noise(consistency_pipeline, times):
    noise, labels = noise_from_seeds([1, 2], (4, 8, 8)), torch.tensor([3, 4])
    z = noise
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        image = z - t * evaluate(consistency_pipeline, z, t, 0.0, labels)
        z = (1 - s) * image + s * fresh_noise(noise, step)
    sampled = consistency_pipeline.sample_latents([3, 4], noise, timesteps=times)
    torch.testing.assert_close(sampled, z, atol=1e-5, rtol=1e-5)


def test_fresh_noise_is_normal_and_belongs_to_its_sample_and_step():
    noise = noise_from_seeds(range(200), (4, 8, 8))
    first, second = fresh_noise(noise, 0), fresh_noise(noise, 1)
    for fresh in (first, second):
        assert float(fresh.mean()) == pytest.approx(0.0, abs=0.02)
        assert float(fresh.std()) == pytest.approx(1.0, abs=0.02)
    tensors = torch.stack([noise, first, second]).flatten(1)
    assert (torch.corrcoef(tensors) - torch.eye(3)).abs().max() < 0.02
    assert torch.corrcoef(first[:20].flatten(1)).fill_diagonal_(0.0).abs().max() < 0.3
    assert torch.equal(fresh_noise(noise[[7, 3]], 1), second[[7, 3]])


@pytest.mark.parametrize(("prediction", "schedule"), [("epsilon", "linear"), ("consistency", None)])
def test_sample_does_not_depend_on_its_batch(network, vae, prediction, schedule):
    pipeline = build(network, vae, prediction, schedule)
    noise = noise_from_seeds([7, 8, 9], (4, 8, 8))
    together = pipeline.sample_latents([1, 3, 5], noise, 3)
    for row, label in enumerate([1, 3, 5]):
        alone = pipeline.sample_latents([label], noise[row : row + 1], 3)[0]
        assert float((alone - together[row]).norm() / alone.norm()) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        DiffusionConfig(),
        DiffusionConfig(schedule="cosine", num_timesteps=500),
        ContinuousConsistencyConfig(),
        DiscreteConsistencyConfig(),
    ],
    ids=["linear", "cosine", "continuous consistency", "ECT"],
)
def test_saved_generator_keeps_its_sampler_and_its_images(network, vae, tmp_path, config):
    scheduler = build_objective(config).scheduler()
    saved = build_pipeline(network.eval(), vae, images.CLASS_NAMES, prediction=config.prediction, scheduler=scheduler)
    save_generator(saved, tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded.scheduler) is type(scheduler)
    assert type(scheduler).__module__.startswith(diffusers.__name__)
    for name, value in scheduler.config.items():
        assert name.startswith("_") or loaded.scheduler.config[name] == value
    assert loaded.config.prediction == config.prediction
    noise = noise_from_seeds([7], (4, 8, 8))
    assert torch.equal(loaded.sample_latents([3], noise, 2), saved.sample_latents([3], noise, 2))
    assert torch.equal(loaded.images_from_seeds([3], [7], 2), saved.images_from_seeds([3], [7], 2))
