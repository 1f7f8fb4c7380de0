"""The random draws of a training step as a record, and the loss as a pure function of it, for three objectives.

    z_t   = (1 - t) x + t e                                  noisy latent
    v_t   = e - x                                            conditional velocity of one sample
    v     = a v_t + k v(z_t, t | y) + n v(z_t, t | null)     guided velocity, a + k + n = 1
    u_tgt = stop_gradient(v - (t - r) du/dt)                 du/dt: derivative of u(z, r, t) along (tangent, 1, 0)
    loss  = sum over rows of w ||u - u_tgt||^2, over B       w = stop_gradient(1 / (||u - u_tgt||^2 + c)^p)

Flow matching: r = t in every row, and (a, k, n) = (1, 0, 0).

MeanFlow: (a, k, n) = (omega, kappa, 1 - omega - kappa) inside the guidance interval. v(z_t, t | y) is u(z_t, t, t | y).
The tangent is v, or the network's own v(z_t, t | y).

Improved MeanFlow: omega and its interval are drawn per row and are inputs of the network; (a, k, n) =
(1, 1 - 1/omega, 1/omega - 1). The tangent is the network's own v(z_t, t | y), from its v head, whose error against v is
a second term of the loss.

To avoid redundant forwards, one no-grad forward computes only the velocities that the training forward lacks: those of
the null class on guided rows, and those of the row's class on rows with r < t. On rows with r = t, the training
forward's own output, detached, is v(z_t, t | y). The training forward gives u on all rows, and du/dt on the rows with
r < t; elsewhere du/dt is multiplied by zero. The number of forwards does not depend on the draws, which keeps sharded
workers in step, and batch sizes come from a small set, which limits compilation.

Source: Geng et al. 2025, arXiv 2505.13447, Eq. 6 to 11 and 19 to 22; and arXiv 2512.02012, which regresses
V = u + (t - r) du/dt onto v, with the same error: V - v = u - u_tgt.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from meanflow_core.config import GuidanceConfig, LossConfig
from meanflow_core.time_sampling import draw_guidance_interval, draw_omega, draw_times, rows_below
from meanflow_core.transformer import Conditioning, NetworkOutput

# The no-grad forward's batch is padded to a multiple of B / 8 rows: 2 % more work on average, few sizes to compile.
VELOCITY_BATCH_PARTS = 8


class Network(Protocol):
    """The network interface that the loss requires; `transformer` and `imf_transformer` implement it."""

    def __call__(
        self,
        z: torch.Tensor,
        conditioning: Conditioning,
        tangent: torch.Tensor | None = None,
        velocity_only: bool = False,
    ) -> NetworkOutput:
        """Maps noisy latents (B, C, H, W) to u, to v if there is a v head, and to du/dt along a tangent (b, C, H, W)."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Every random draw of one step, and the weights and row indices that follow from the draws alone."""

    t: torch.Tensor
    """(B,) float32 in [0, 1]."""
    r: torch.Tensor
    """(B,) float32 in [0, t]."""
    noise: torch.Tensor
    """(B, C, H, W) float32, standard normal: e in z_t."""
    posterior_noise: torch.Tensor
    """(B, C, H, W) float32, standard normal: for sampling latents from moments."""
    label_dropped: torch.Tensor
    """(B,) bool: whether the null class replaces the label."""
    mirrored: torch.Tensor
    """(B,) bool: whether to use the moments of the mirror image."""
    omega: torch.Tensor | None = None
    """(B,) float32, at least 1: guidance scale, for improved MeanFlow."""
    guidance_interval_start: torch.Tensor | None = None
    """(B,) float32 in [0, 1], for improved MeanFlow."""
    guidance_interval_end: torch.Tensor | None = None
    """(B,) float32 in [guidance_interval_start, 1], for improved MeanFlow."""

    weight_sample: torch.Tensor
    """(B,) float32: a, the weight of v_t in the guided velocity."""
    weight_conditional: torch.Tensor
    """(B,) float32: k, the weight of the network's velocity given the label."""
    weight_null: torch.Tensor
    """(B,) float32: n, the weight of the network's velocity given the null class."""
    rows_below: torch.Tensor
    """int64 (b,): rows with r < t."""
    rows_ordered: torch.Tensor
    """int64 (B,): all rows, those with r < t first."""
    rows_conditional: torch.Tensor
    """int64: rows whose conditional velocity requires a forward."""
    rows_null: torch.Tensor
    """int64: rows whose null velocity requires a forward."""
    rows_velocity: torch.Tensor
    """int64: rows of the no-grad forward: rows_conditional, rows_null, then padding with row 0. Empty only if the
    objective never needs that forward."""

    @classmethod
    def from_draws(
        cls,
        *,
        t: torch.Tensor,
        r: torch.Tensor,
        noise: torch.Tensor,
        label_dropped: torch.Tensor,
        config: LossConfig,
        posterior_noise: torch.Tensor | None = None,
        mirrored: torch.Tensor | None = None,
        omega: torch.Tensor | None = None,
        guidance_interval_start: torch.Tensor | None = None,
        guidance_interval_end: torch.Tensor | None = None,
    ) -> "StepRecord":
        """Checks given draws and derives the weights and row indices, on the CPU, since it reads the values.

        Rows with r < t and dropped labels may be anywhere. posterior_noise and mirrored default to zeros. omega and its
        interval are for improved MeanFlow. Raises ValueError for mismatched shapes, non-finite noise, times that violate
        0 <= r <= t <= 1, omega below 1, or an invalid interval.
        """
        guidance = [omega, guidance_interval_start, guidance_interval_end]
        vectors = {"t": t, "r": r, "label_dropped": label_dropped, "mirrored": mirrored}
        _check_draws(vectors | dict(zip(_GUIDANCE, guidance, strict=True)), noise, posterior_noise)
        below = r < t
        if config.objective == "improved_meanflow":
            weights, known = _improved_weights(t, label_dropped, *guidance)
        else:
            weights, known = _meanflow_weights(t, label_dropped, config.guidance), torch.ones_like(below)
            guidance = [None, None, None]
        needs_conditional = (weights.conditional != 0.0) | (below & config.takes_own_velocity)
        rows_conditional = (needs_conditional & (below | ~known)).nonzero().flatten()
        rows_null = (weights.null != 0.0).nonzero().flatten()
        return cls(
            t=t,
            r=r,
            noise=noise,
            posterior_noise=torch.zeros_like(noise) if posterior_noise is None else posterior_noise,
            label_dropped=label_dropped,
            mirrored=torch.zeros_like(label_dropped) if mirrored is None else mirrored,
            **dict(zip(_GUIDANCE, guidance, strict=True)),
            weight_sample=weights.sample,
            weight_conditional=weights.conditional,
            weight_null=weights.null,
            rows_below=below.nonzero().flatten(),
            rows_ordered=torch.argsort(below.logical_not().to(torch.uint8), stable=True),
            rows_conditional=rows_conditional,
            rows_null=rows_null,
            rows_velocity=_padded(torch.cat([rows_conditional, rows_null]), len(t), config),
        )

    def rows(self, start: int, stop: int, config: LossConfig) -> "StepRecord":
        """The record of rows start to stop - 1: the share of a worker or of a micro-batch."""
        draws = {name: getattr(self, name) for name in _DRAWS}
        share = {name: value[start:stop] for name, value in draws.items() if value is not None}
        return StepRecord.from_draws(**share, config=config)

    def to(self, device: torch.device) -> "StepRecord":
        """Copies every tensor to `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: v.to(device, non_blocking=True) for n, v in tensors.items() if v is not None})


_GUIDANCE = ("omega", "guidance_interval_start", "guidance_interval_end")
_DRAWS = ("t", "r", "noise", "posterior_noise", "label_dropped", "mirrored", *_GUIDANCE)


def _check_draws(
    vectors: dict[str, torch.Tensor | None], noise: torch.Tensor, posterior_noise: torch.Tensor | None
) -> None:
    given = {name: value for name, value in vectors.items() if value is not None}
    t, r = given["t"], given["r"]
    shapes = [tuple(value.shape) for value in given.values()]
    if t.dim() != 1 or set(shapes) != {tuple(t.shape)} or noise.dim() != 4 or len(noise) != len(t):
        raise ValueError(
            f"{', '.join(given)} must have shape (B,) and noise (B, C, H, W), but got "
            f"{', '.join(map(str, shapes))} and {tuple(noise.shape)}"
        )
    if posterior_noise is not None and posterior_noise.shape != noise.shape:
        raise ValueError(
            f"posterior_noise must have noise's shape {tuple(noise.shape)}, but got {tuple(posterior_noise.shape)}"
        )
    is_valid = (r >= 0) & (r <= t) & (t <= 1)
    if not bool(is_valid.all()):
        row = int(is_valid.int().argmin())
        raise ValueError(
            f"times must satisfy 0 <= r <= t <= 1 in every row, but row {row} has r = {r[row]:g}, t = {t[row]:g}"
        )
    if not bool(torch.isfinite(noise).all()):
        raise ValueError("noise must be finite")


class _Weights(NamedTuple):
    sample: torch.Tensor
    conditional: torch.Tensor
    null: torch.Tensor


def _meanflow_weights(t: torch.Tensor, label_dropped: torch.Tensor, config: GuidanceConfig) -> _Weights:
    is_guided = (t >= config.guidance_interval_start) & (t <= config.guidance_interval_end) & ~label_dropped
    return _Weights(
        sample=torch.where(is_guided, config.omega, torch.ones_like(t)),
        conditional=torch.where(is_guided, config.kappa, torch.zeros_like(t)),
        null=_null_weight(config) * is_guided.to(t.dtype),
    )


def _null_weight(config: GuidanceConfig) -> float:
    weight = 1.0 - config.omega - config.kappa
    return 0.0 if abs(weight) < 1e-12 else weight  # rounding must not cost a forward if omega + kappa = 1


def _improved_weights(
    t: torch.Tensor,
    label_dropped: torch.Tensor,
    omega: torch.Tensor | None,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
) -> tuple[_Weights, torch.Tensor]:
    """The weights, and the rows (B,) whose conditional velocity is that of the training forward at r = t."""
    if omega is None or start is None or end is None:
        given = [name for name, value in zip(_GUIDANCE, (omega, start, end), strict=True) if value is not None]
        raise ValueError(
            f"improved_meanflow needs {', '.join(_GUIDANCE)} of every row, but got {' and '.join(given) or 'none'}"
        )
    is_valid = (omega >= 1) & torch.isfinite(omega) & (start >= 0) & (start <= end) & (end <= 1)
    if not bool(is_valid.all()):
        row = int(is_valid.int().argmin())
        raise ValueError(
            "guidance must satisfy omega >= 1 and 0 <= guidance_interval_start <= guidance_interval_end <= 1 in every row, "
            f"but row {row} has omega = {omega[row]:g} and [{start[row]:g}, {end[row]:g}]"
        )
    is_guided = (t >= start) & (t <= end) & ~label_dropped
    conditional = torch.where(is_guided, 1.0 - 1.0 / omega, 0.0)
    # The conditional velocity is defined with the interval [0, 1].
    return _Weights(torch.ones_like(t), conditional, -conditional), (start == 0.0) & (end == 1.0)


def _padded(rows: torch.Tensor, batch_size: int, config: LossConfig) -> torch.Tensor:
    """Appends row 0 up to a size from the small set; never empty if any draws could need the forward."""
    if config.objective == "improved_meanflow":
        may_need_forward = True
    else:
        needs_own = config.guidance.kappa != 0.0 or config.takes_own_velocity
        may_need_forward = _null_weight(config.guidance) != 0.0 or (not config.is_flow_matching and needs_own)
    part = max(1, -(-batch_size // VELOCITY_BATCH_PARTS))
    size = part * max(-(-len(rows) // part), int(may_need_forward))
    return torch.cat([rows, rows.new_zeros(size - len(rows))])


def draw_step_record(
    config: LossConfig, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]
) -> StepRecord:
    """Draws a step's record for the *global* batch of B = num_rows, a pure function of (seed, step), on the CPU.

    latent_shape: (C, H, W). Labels are dropped only on rows with r = t, with probability p / (1 - rho), as in the
    authors' code; if there are too few such rows, on all rows with probability p.
    """
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) % 2**63)
    t, r = draw_times(num_rows, config.times, generator)
    uniform = torch.rand(num_rows, generator=generator)
    probability, rho = config.label_drop_probability, config.times.fraction_r_below_t
    below = rows_below(num_rows, rho)
    if probability <= 1.0 - rho + 1e-9:  # 1 - 0.9 is rounded below 0.1
        label_dropped = ~below & (uniform * (1.0 - rho) < probability)
    else:
        label_dropped = uniform < probability
    mirrored = torch.rand(num_rows, generator=generator) < 0.5
    noise = torch.randn(num_rows, *latent_shape, generator=generator)
    posterior_noise = torch.randn(num_rows, *latent_shape, generator=generator)
    omega = start = end = None
    if config.objective == "improved_meanflow":
        omega = draw_omega(num_rows, config.guidance_sampling, generator)
        start, end = draw_guidance_interval(below, config.guidance_sampling, generator)
    return StepRecord.from_draws(
        t=t,
        r=r,
        noise=noise,
        posterior_noise=posterior_noise,
        label_dropped=label_dropped,
        mirrored=mirrored,
        omega=omega,
        guidance_interval_start=start,
        guidance_interval_end=end,
        config=config,
    )


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The loss and its parts. With p = 1 the loss stays near 1, so watch the squared errors instead."""

    loss: torch.Tensor
    """Scalar with a graph: the weighted sum over these rows, divided by the global number of rows."""
    squared_error: torch.Tensor
    """(B,) detached: ||u - u_tgt||^2, summed over C, H, W."""
    squared_error_v: torch.Tensor | None
    """(B,) detached: ||v - guided velocity||^2 of the v head, if there is one."""
    u: torch.Tensor
    """(B, C, H, W) detached: the network's average velocity."""
    v: torch.Tensor | None
    """(B, C, H, W) detached: the v head's velocity, if there is one."""
    v_guided: torch.Tensor
    """(B, C, H, W): the guided velocity."""
    tangent: torch.Tensor
    """(b, C, H, W): the direction of du/dt, on the rows with r < t."""
    dudt: torch.Tensor
    """(B, C, H, W): the total derivative; zero on rows with r = t, where it is not needed."""


def _per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))


def _evaluate_velocities(
    network: Network, z: torch.Tensor, labels: torch.Tensor, record: StepRecord, null_label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and null velocities (B, C, H, W) from one no-grad forward; zero on rows that need none.

    Conditional velocities use the true labels, even where a label is dropped.
    """
    zeros = torch.zeros_like(z)
    rows, num_conditional, num_null = record.rows_velocity, len(record.rows_conditional), len(record.rows_null)
    if len(rows) == 0:
        return zeros, zeros
    is_conditional = torch.arange(len(rows), device=rows.device) < num_conditional
    t, ones = record.t[rows], torch.ones_like(record.t[rows])
    guidance: dict[str, torch.Tensor] = {}
    start, end = record.guidance_interval_start, record.guidance_interval_end
    if record.omega is not None and start is not None and end is not None:
        is_inside = (record.t >= start) & (record.t <= end)
        omega = torch.where(is_inside[rows] & is_conditional, record.omega[rows], ones)
        guidance = {"omega": omega, "guidance_interval_start": torch.zeros_like(ones), "guidance_interval_end": ones}
    classes = torch.where(is_conditional, labels[rows], null_label)
    conditioning = Conditioning(t=t, r=t, labels=classes, **guidance)
    velocities = network(z[rows], conditioning, velocity_only=True).velocity.to(z.dtype)
    conditional, null = velocities[: num_conditional + num_null].split([num_conditional, num_null])
    return (
        zeros.index_copy(0, record.rows_conditional, conditional),
        zeros.index_copy(0, record.rows_null, null),
    )


def guided_velocity(
    sample: torch.Tensor, conditional: torch.Tensor, null: torch.Tensor, record: StepRecord
) -> torch.Tensor:
    """a v_t + k v(z_t, t | y) + n v(z_t, t | null), each (B, C, H, W), with the record's weights."""
    a, k, n = (_per_row(w, sample) for w in (record.weight_sample, record.weight_conditional, record.weight_null))
    return a * sample + k * conditional + n * null


def total_derivative(
    network: Network, z: torch.Tensor, conditioning: Conditioning, tangent: torch.Tensor
) -> torch.Tensor:
    """du/dt along (dz, dt, dr) = (tangent, 1, 0), (B, C, H, W), in a no-grad forward of its own.

    In float32 even under autocast, because t - r multiplies the derivative's rounding error.
    Source: Geng et al. 2025, Eq. 8.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        dudt = network(z, conditioning, tangent).dudt
    assert dudt is not None, "a network returns du/dt if it is given a tangent"
    return dudt


def _training_forward(
    network: Network, z: torch.Tensor, conditioning: Conditioning, record: StepRecord, tangent: torch.Tensor | None
) -> NetworkOutput:
    """u and v of all rows, and du/dt of the rows with r < t if a tangent is given."""
    if tangent is None:
        return network(z, conditioning)
    order = record.rows_ordered  # a tangent belongs to the first rows
    output = network(z[order], conditioning.rows(order), tangent)
    inverse = torch.argsort(order)
    u, v = (None if value is None else value[inverse] for value in (output.u, output.v))
    return NetworkOutput(u=u, v=v, dudt=output.dudt)


def _weighted_sum(error: torch.Tensor, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The adaptively weighted sum of squared errors over rows, and the squared errors (B,), detached."""
    squared = error.square().flatten(1).sum(dim=1)  # a sum over C, H, W, not a mean
    weight = (squared.detach() + config.norm_eps) ** -config.norm_p
    return (weight * squared).sum(), squared.detach()


def meanflow_loss(
    training_network: Network,
    network: Network,
    latents: torch.Tensor,
    labels: torch.Tensor,
    record: StepRecord,
    config: LossConfig,
    *,
    null_label: int,
    global_num_rows: int,
    separate_derivative: bool = False,
) -> LossOutput:
    """The loss of these rows for the objective of `config`: flow matching, MeanFlow or improved MeanFlow.

    Args:
        training_network: called once, with a graph; may be a wrapper that reduces gradients, such as DDP.
        network: the same function without the wrapper, called without a graph.
        latents: float32 (B, C, H, W), normalised.
        labels: int64 (B,).
        separate_derivative: compute du/dt in a float32 forward of its own instead of the training forward. Use it if
            the training forward runs under autocast or recomputes its activations.

    Raises ValueError for mismatched shapes.
    """
    if latents.shape != record.noise.shape or labels.shape != record.t.shape:
        raise ValueError(
            f"the record is for latents {tuple(record.noise.shape)} and labels {tuple(record.t.shape)}, "
            f"but got {tuple(latents.shape)} and {tuple(labels.shape)}"
        )
    t, r, below = record.t, record.r, record.rows_below
    z = (1.0 - _per_row(t, latents)) * latents + _per_row(t, latents) * record.noise
    v_sample = record.noise - latents
    y = torch.where(record.label_dropped, null_label, labels)
    conditioning = Conditioning(t=t, r=r, labels=y, **{name: getattr(record, name) for name in _GUIDANCE})

    with torch.no_grad():
        conditional, null = _evaluate_velocities(network, z, labels, record, null_label)
        along = conditional if config.takes_own_velocity else guided_velocity(v_sample, conditional, null, record)
        tangent, derivative = along[below], None
        if separate_derivative and not config.is_flow_matching:
            # Never an empty batch: under FSDP, a rank without rows r < t must make the same calls as the others.
            rows = below if len(below) else record.rows_ordered[:1]
            derivative = total_derivative(network, z[rows], conditioning.rows(rows), along[rows])[: len(below)]

    is_shared = derivative is None and len(below) > 0
    output = _training_forward(training_network, z, conditioning, record, tangent if is_shared else None)
    derivative = output.dudt if is_shared else derivative
    u, v = (None if value is None else value.to(z.dtype) for value in (output.u, output.v))
    assert u is not None, "a network returns u unless velocity_only is set"

    with torch.no_grad():
        # On the other rows, r = t, and the training forward's velocity is the conditional one.
        own_velocity = (u if v is None else v).detach()
        conditional = own_velocity.index_copy(0, record.rows_conditional, conditional[record.rows_conditional])
        v_guided = guided_velocity(v_sample, conditional, null, record)
        dudt = torch.zeros_like(z)
        if derivative is not None:
            dudt = dudt.index_copy(0, below, derivative.to(z.dtype))
        target = v_guided - _per_row(t - r, z) * dudt

    loss, squared_error = _weighted_sum(u - target, config)
    squared_error_v = None
    if config.objective == "improved_meanflow":
        if v is None:
            raise ValueError("improved_meanflow needs a network with a v head, but this one returned u only")
        loss_v, squared_error_v = _weighted_sum(v - v_guided, config)
        loss = loss + loss_v
    return LossOutput(
        loss=loss / global_num_rows,
        squared_error=squared_error,
        squared_error_v=squared_error_v,
        u=u.detach(),
        v=None if v is None else v.detach(),
        v_guided=v_guided,
        tangent=tangent,
        dudt=dudt,
    )
