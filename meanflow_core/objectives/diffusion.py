"""Diffusion with noise prediction (DDPM), sampled by DDIM.

    z_k  = sqrt(abar_k) x + sqrt(1 - abar_k) e          k uniform in 0 .. K - 1; the network gets t = (k + 1) / K and r = t
    e*   = stop_gradient(a e + b eps(z_k | y) + n eps(z_k | null))      guided noise; (a, b, n) are `guidance`'s (a, k, n)
    loss = 1/B sum over samples of mean((eps - e*)^2)

Source: Ho et al. 2020, arXiv 2006.11239; DDIM: Song et al. 2020, arXiv 2010.02502.

    # B batch, C channels, H W latent size
"""

from functools import lru_cache

import torch
from diffusers import DDIMScheduler

from meanflow_core.networks.interface import Network
from meanflow_core.objectives import guidance
from meanflow_core.objectives.draws import DrawnStep, draw_step
from meanflow_core.objectives.flow import PlannedObjective
from meanflow_core.objectives.guidance import per_sample
from meanflow_core.objectives.interface import Loss, Mean
from meanflow_core.objectives.row_plan import StepRecord
from meanflow_core.presets.diffusion import DiffusionConfig

# In standard deviations. abar is 2e-9 at the cosine schedule's last level: unclipped, the predicted latents are an error of
# eps times 20,000, and all later steps keep it. What else was tried: docs/explanation/objectives.md.
COSINE_CLIP_RANGE = 4.0
_BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # diffusers' names


@lru_cache(maxsize=16)
def _alphas_cumprod(config: DiffusionConfig) -> torch.Tensor:
    """abar_k, float32 (K,)."""
    with torch.device("cpu"):
        return Diffusion(config).scheduler().alphas_cumprod


class Diffusion(PlannedObjective[DiffusionConfig]):
    """DDPM with a linear or a cosine schedule."""

    metric_names = ("squared_error", *guidance.bin_names("squared_error"))

    def scheduler(self) -> DDIMScheduler:
        """DDIM with eta 0. The first step starts at the last noise level ("trailing"), whatever the number of steps.

        With the cosine schedule, each step clips the latents that it predicts.
        """
        return DDIMScheduler(
            num_train_timesteps=self.config.num_timesteps,
            beta_schedule=_BETA_SCHEDULES[self.config.schedule],
            prediction_type="epsilon",
            clip_sample=self.config.schedule == "cosine",
            clip_sample_range=COSINE_CLIP_RANGE,
            timestep_spacing="trailing",
        )

    def draw(self, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]) -> DrawnStep:
        """Draws noise levels, noise and dropped labels."""

        def draw_times(num_rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            level = torch.randint(self.config.num_timesteps, (num_rows,), generator=generator)
            t = (level + 1).float() / self.config.num_timesteps
            return t, t

        return draw_step(
            self.config,
            draw_times,
            fraction_r_below_t=0.0,
            seed=seed,
            step=step,
            num_rows=num_rows,
            latent_shape=latent_shape,
        )

    def loss(
        self,
        training_network: Network,
        network: Network,
        latents: torch.Tensor,
        labels: torch.Tensor,
        record: StepRecord,
        *,
        null_label: int,
        global_num_rows: int,
        separate_derivative: bool = False,
    ) -> Loss:
        """See `Objective.loss`."""
        guidance.check_batch(latents, labels, record)
        draws = record.draws
        level = (draws.t * self.config.num_timesteps).round().long() - 1
        alpha = per_sample(_alphas_cumprod(self.config).to(latents.device)[level], latents).to(latents.dtype)
        z = alpha.sqrt() * latents + (1.0 - alpha).sqrt() * draws.noise
        missing = guidance.missing_velocities(network, z, labels, record, null_label)
        output = training_network(z, draws.conditioning(labels, null_label))
        target = guidance.guided_velocity(draws.noise, missing, record, output)
        squared_error = guidance.squared_norm(output.average_velocity.to(z.dtype) - target)
        detached = squared_error.detach()
        return Loss(
            loss=squared_error.sum() / (global_num_rows * latents[0].numel()),
            metrics={
                "squared_error": Mean(detached.sum(), len(detached)),
                **guidance.means_by_time("squared_error", detached, draws.t),
            },
        )
