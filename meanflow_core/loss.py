"""The step's randomness as a record, and the MeanFlow objective as a pure function of it.

    z_t   = (1 - t) x + t e                              noisy latent
    v_t   = e - x                                        conditional velocity of one sample
    v     = omega v_t + kappa u(z_t, t, t | y) + (1 - omega - kappa) u(z_t, t, t | null)     guided velocity
    u_tgt = stop_gradient(v - (t - r) du/dt),  du/dt = JVP of u(z, r, t) along (v, 0, 1)
    loss  = sum over rows of stop_gradient(1 / (||u - u_tgt||^2 + c)^p) ||u - u_tgt||^2, over B

Source: Geng et al. 2025, Eq. 6 to 11 and 19 to 22. The work is arranged so that nothing known is computed again: the
graded pass gives u with fused attention; the JVP runs without a graph and only on rows with r < t (elsewhere it is
multiplied by zero); on rows with r = t the graded u, detached, is already u(z_t, t, t | y); and rows without guidance
cause no guidance forward.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_core.config import GuidanceConfig, LossConfig
from meanflow_core.time_sampling import draw_times, rows_below
from meanflow_core.transformer import Conditioning, NetworkOutput

Network = Callable[[torch.Tensor, Conditioning], NetworkOutput]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Every random draw of one step, and the row indices that follow from them."""

    t: torch.Tensor
    """(B,) float32 in [0, 1]."""
    r: torch.Tensor
    """(B,) float32 in [0, t]."""
    noise: torch.Tensor
    """(B, C, H, W) float32, standard normal: e of z_t."""
    posterior_noise: torch.Tensor
    """(B, C, H, W) float32, standard normal: for drawing latents from moments."""
    label_dropped: torch.Tensor
    """(B,) bool: the label becomes the null class."""
    mirrored: torch.Tensor
    """(B,) bool: take the moments of the mirror image."""
    rows_below: torch.Tensor
    """int64 indices of the rows with r < t."""
    rows_guided: torch.Tensor
    """int64 indices of the rows whose velocity is guided: label kept, t inside the interval, guidance on."""
    rows_guided_below: torch.Tensor
    """int64 indices of the rows in both."""

    @classmethod
    def from_draws(
        cls,
        *,
        t: torch.Tensor,
        r: torch.Tensor,
        noise: torch.Tensor,
        label_dropped: torch.Tensor,
        guidance: GuidanceConfig,
        posterior_noise: torch.Tensor | None = None,
        mirrored: torch.Tensor | None = None,
    ) -> "StepRecord":
        """Checks given draws and derives the row indices; any placement of r < t and of dropped labels is fine.

        Call it where the values are on the CPU: it reads them. Without posterior noise and mirroring these are zero.
        Raises ValueError for times outside [0, 1], r > t, non-finite values, or shapes that do not fit.
        """
        if t.dim() != 1 or r.shape != t.shape or label_dropped.shape != t.shape or noise.shape[:1] != t.shape:
            raise ValueError(
                f"t, r and label_dropped must have shape (B,) and noise (B, C, H, W), but got {tuple(t.shape)}, "
                f"{tuple(r.shape)}, {tuple(label_dropped.shape)} and {tuple(noise.shape)}"
            )
        if not bool(((r >= 0) & (r <= t) & (t <= 1)).all()):
            raise ValueError("times must satisfy 0 <= r <= t <= 1 in every row")
        if not bool(torch.isfinite(noise).all()):
            raise ValueError("noise must be finite")
        below = r < t
        inside = (t >= guidance.t_start) & (t <= guidance.t_end)
        guided = inside & ~label_dropped & (not guidance.is_off)
        return cls(
            t=t,
            r=r,
            noise=noise,
            posterior_noise=torch.zeros_like(noise) if posterior_noise is None else posterior_noise,
            label_dropped=label_dropped,
            mirrored=torch.zeros_like(label_dropped) if mirrored is None else mirrored,
            rows_below=below.nonzero().flatten(),
            rows_guided=guided.nonzero().flatten(),
            rows_guided_below=(guided & below).nonzero().flatten(),
        )

    def rows(self, start: int, stop: int, guidance: GuidanceConfig) -> "StepRecord":
        """The record of rows start..stop-1 alone: a worker's or a micro-batch's share of the step."""
        return StepRecord.from_draws(
            t=self.t[start:stop],
            r=self.r[start:stop],
            noise=self.noise[start:stop],
            posterior_noise=self.posterior_noise[start:stop],
            label_dropped=self.label_dropped[start:stop],
            mirrored=self.mirrored[start:stop],
            guidance=guidance,
        )

    def to(self, device: torch.device) -> "StepRecord":
        """The record with every tensor on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def draw_step_record(
    config: LossConfig, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]
) -> StepRecord:
    """Draws a step's record for the *global* batch of B = num_rows, a pure function of (seed, step), on the CPU.

    latent_shape: (C, H, W). Labels are dropped on r = t rows alone, with probability p / (1 - rho), as the authors'
    code does by position; where those rows are too few, on all rows with probability p.
    """
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) % 2**63)
    t, r = draw_times(num_rows, config.times, generator)
    uniform = torch.rand(num_rows, generator=generator)
    probability, rho = config.label_drop_probability, config.times.fraction_r_below_t
    if probability <= 1.0 - rho:
        below = rows_below(num_rows, rho)
        label_dropped = ~below & (uniform * (1.0 - rho) < probability)
    else:
        label_dropped = uniform < probability
    mirrored = torch.rand(num_rows, generator=generator) < 0.5
    noise = torch.randn(num_rows, *latent_shape, generator=generator)
    posterior_noise = torch.randn(num_rows, *latent_shape, generator=generator)
    return StepRecord.from_draws(
        t=t,
        r=r,
        noise=noise,
        posterior_noise=posterior_noise,
        label_dropped=label_dropped,
        mirrored=mirrored,
        guidance=config.guidance,
    )


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The objective, and what is worth watching: with p = 1 the loss itself stays near 1 whatever happens."""

    loss: torch.Tensor
    """Scalar with a graph: the weighted sum over these rows over the global number of rows."""
    squared_error: torch.Tensor
    """(B,) detached: ||u - u_tgt||^2, summed over C, H, W."""
    u: torch.Tensor
    """(B, C, H, W) detached: the network's average velocity."""
    v_guided: torch.Tensor
    """(B, C, H, W): the guided velocity of the target."""
    dudt: torch.Tensor
    """(B, C, H, W): the total derivative; zero on rows with r = t, where it is not needed."""


def _per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))


def guided_velocity(
    network: Network,
    z: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    labels: torch.Tensor,
    record: StepRecord,
    guidance: GuidanceConfig,
    null_label: int,
) -> torch.Tensor:
    """The guided velocity (B, C, H, W), from v = e - x and the detached u; equal to v on rows without guidance.

    One network call at most, on the guided rows' null class and, where r < t, their own class.
    """
    rows = record.rows_guided
    omega, kappa = guidance.omega, guidance.kappa
    null_weight = 1.0 - omega - kappa
    conditional_rows = record.rows_guided_below if kappa != 0.0 else rows[:0]
    unconditional_rows = rows if abs(null_weight) > 1e-12 else rows[:0]  # omega + kappa = 1 needs no null class
    called = torch.cat([conditional_rows, unconditional_rows])
    if len(called) == 0:
        return v if len(rows) == 0 else v.index_copy(0, rows, omega * v[rows] + kappa * u[rows])
    t = record.t[called]
    null_labels = torch.full_like(unconditional_rows, null_label)
    asked = torch.cat([labels[conditional_rows], null_labels])
    answer = network(z[called], Conditioning(t=t, r=t, labels=asked)).u.to(v.dtype)
    conditional = u.index_copy(0, conditional_rows, answer[: len(conditional_rows)])
    mixed = omega * v[rows] + kappa * conditional[rows]
    if len(unconditional_rows):
        mixed = mixed + null_weight * answer[len(conditional_rows) :]
    return v.index_copy(0, rows, mixed)


def total_derivative(
    network: Network, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, labels: torch.Tensor, tangent: torch.Tensor
) -> torch.Tensor:
    """du/dt along (dz, dt, dr) = (tangent, 1, 0): (B, C, H, W), without a graph.

    Source: Geng et al. 2025, Eq. 8. In float32 even under autocast: t - r multiplies the rounding of a derivative.
    """

    def average_velocity(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return network(z, Conditioning(t=t, r=r, labels=labels)).u

    # Math attention: fused kernels have no forward-mode AD (pytorch#165530).
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        tangents = (tangent, torch.ones_like(t), torch.zeros_like(r))
        return torch.func.jvp(average_velocity, (z, t, r), tangents)[1]


def meanflow_loss(
    graded_network: Network,
    plain_network: Network,
    latents: torch.Tensor,
    labels: torch.Tensor,
    record: StepRecord,
    config: LossConfig,
    *,
    null_label: int,
    global_num_rows: int,
) -> LossOutput:
    """The MeanFlow loss of these rows; with fraction_r_below_t = 0 it is flow matching's.

    latents: float32 (B, C, H, W), normalised; labels: int64 (B,). Both networks are the same function: the graded one
    is called once, with a graph, and may be a wrapper that reduces gradients; the plain one, without a graph, gives
    guidance and the derivative. Raises ValueError where shapes do not fit.
    """
    if latents.shape != record.noise.shape or labels.shape != record.t.shape:
        raise ValueError(
            f"the record is for latents {tuple(record.noise.shape)} and labels {tuple(record.t.shape)}, "
            f"but got {tuple(latents.shape)} and {tuple(labels.shape)}"
        )
    t, r = record.t, record.r
    z = (1.0 - _per_row(t, latents)) * latents + _per_row(t, latents) * record.noise
    v = record.noise - latents
    labels = torch.where(record.label_dropped, null_label, labels)

    u = graded_network(z, Conditioning(t=t, r=r, labels=labels)).u.to(latents.dtype)
    with torch.no_grad():
        v_guided = guided_velocity(plain_network, z, v, u.detach(), labels, record, config.guidance, null_label)
        dudt = torch.zeros_like(v)
        rows = record.rows_below
        if len(rows):
            derivative = total_derivative(plain_network, z[rows], t[rows], r[rows], labels[rows], v_guided[rows])
            dudt = dudt.index_copy(0, rows, derivative)
        target = v_guided - _per_row(t - r, v) * dudt

    squared_error = (u - target).square().flatten(1).sum(dim=1)  # (B,), a sum over C, H, W and not a mean
    weight = (squared_error.detach() + config.norm_eps) ** -config.norm_p
    return LossOutput(
        loss=(weight * squared_error).sum() / global_num_rows,
        squared_error=squared_error.detach(),
        u=u.detach(),
        v_guided=v_guided,
        dudt=dudt,
    )
