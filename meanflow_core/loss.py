"""The step's randomness as a record, and the objective as a pure function of it: one routine for all three.

    z_t   = (1 - t) x + t e                              noisy latent
    v_t   = e - x                                        conditional velocity of one sample
    v     = a v_t + k v(z_t, t | y) + n v(z_t, t | null)     guided velocity, a + k + n = 1
    u_tgt = stop_gradient(v - (t - r) du/dt),  du/dt = derivative of u(z, r, t) along (tangent, 1, 0)
    loss  = sum over rows of stop_gradient(1 / (||u - u_tgt||^2 + c)^p) ||u - u_tgt||^2, over B

flow matching       r = t in every row; (a, k, n) = (1, 0, 0)
MeanFlow            (a, k, n) = (omega, kappa, 1 - omega - kappa) inside the guidance interval; v(z_t, t | y) is
                    u(z_t, t, t | y); the tangent is v, or the network's own v(z_t, t | y)
improved MeanFlow   omega and its interval are drawn per row and told to the network; (a, k, n) = (1, 1 - 1/omega,
                    1/omega - 1); the tangent is the network's own v(z_t, t | y), from its v head, whose own error
                    against v is a second summand of the loss

Source: Geng et al. 2025, arXiv 2505.13447, Eq. 6 to 11 and 19 to 22, and arXiv 2512.02012, whose regression of
V = u + (t - r) du/dt onto v has the same error: V - v = u - u_tgt.

The work is arranged so that nothing known is computed again. A call without a graph gives the velocities that cannot
be had otherwise: of the null class on guided rows, and of their own class on rows with r < t. Then the graded pass,
with fused attention, gives u on all rows and du/dt beside it on the rows with r < t (elsewhere it is multiplied by
zero); on rows with r = t its own answer, detached, is v(z_t, t | y). Every network is called equally often whatever
the draws are, so that sharded workers keep step, and with batch sizes from a small set, so that compiled code is kept.
"""

from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch

from meanflow_core.config import LossConfig
from meanflow_core.time_sampling import draw_guidance_interval, draw_omega, draw_times, rows_below
from meanflow_core.transformer import Conditioning, NetworkOutput

# Velocities are asked for in batches of multiples of B / 8 rows: 2 % more work on average, and few sizes to compile.
ASKED_PARTS = 8


class Network(Protocol):
    """What the objective asks of a network; `transformer` and `imf_transformer` have two of them."""

    def __call__(
        self,
        z: torch.Tensor,
        conditioning: Conditioning,
        tangent: torch.Tensor | None = None,
        velocity_only: bool = False,
    ) -> NetworkOutput:
        """Noisy latents (B, C, H, W) -> u, v where there is a head for it, and du/dt along a tangent (b, C, H, W)."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Every random draw of one step, and what follows from the draws alone: weights and row indices."""

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
    omega: torch.Tensor | None = None
    """(B,) float32, at least 1: improved MeanFlow's guidance scale."""
    guidance_interval_start: torch.Tensor | None = None
    """(B,) float32: where its interval begins."""
    guidance_interval_end: torch.Tensor | None = None
    """(B,) float32: where it ends."""

    weight_sample: torch.Tensor
    """(B,) float32: a, the weight of v_t in the guided velocity."""
    weight_conditional: torch.Tensor
    """(B,) float32: k, that of the network's velocity with the label."""
    weight_null: torch.Tensor
    """(B,) float32: n, that of the network's velocity with the null class."""
    rows_below: torch.Tensor
    """int64 (b,): the rows with r < t."""
    rows_ordered: torch.Tensor
    """int64 (B,): all rows, those with r < t first."""
    rows_conditional: torch.Tensor
    """int64: rows whose own velocity costs a forward."""
    rows_null: torch.Tensor
    """int64: rows whose null class's velocity costs a forward."""
    rows_asked: torch.Tensor
    """int64: the two above, then row 0 again up to a size of the small set. Empty only where the objective never asks."""

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
        """Checks given draws and derives the rest; any placement of r < t and of dropped labels is fine.

        Call it where the values are on the CPU: it reads them. Without posterior noise and mirroring these are zero.
        omega and its interval are improved MeanFlow's. Raises ValueError for times outside [0, 1], r > t, omega below 1,
        an interval outside [0, 1] or reversed, non-finite values, or shapes that do not fit.
        """
        vectors = {
            "t": t,
            "r": r,
            "label_dropped": label_dropped,
            "omega": omega,
            "guidance_interval_start": guidance_interval_start,
            "guidance_interval_end": guidance_interval_end,
        }
        vectors["mirrored"] = mirrored
        shapes = {name: tuple(value.shape) for name, value in vectors.items() if value is not None}
        if t.dim() != 1 or set(shapes.values()) != {tuple(t.shape)} or noise.dim() != 4 or len(noise) != len(t):
            raise ValueError(
                f"{', '.join(shapes)} must have shape (B,) and noise (B, C, H, W), but got "
                f"{', '.join(map(str, shapes.values()))} and {tuple(noise.shape)}"
            )
        if posterior_noise is not None and posterior_noise.shape != noise.shape:
            raise ValueError(
                f"posterior_noise must have noise's shape {tuple(noise.shape)}, but got {tuple(posterior_noise.shape)}"
            )
        ordered = (r >= 0) & (r <= t) & (t <= 1)
        if not bool(ordered.all()):
            row = int(ordered.int().argmin())
            raise ValueError(
                f"times must satisfy 0 <= r <= t <= 1 in every row, but row {row} has r = {r[row]:g}, t = {t[row]:g}"
            )
        if not bool(torch.isfinite(noise).all()):
            raise ValueError("noise must be finite")

        below = r < t
        if config.objective == "improved_meanflow":
            if omega is None or guidance_interval_start is None or guidance_interval_end is None:
                given = [
                    name
                    for name in ("omega", "guidance_interval_start", "guidance_interval_end")
                    if vectors[name] is not None
                ]
                raise ValueError(
                    f"improved_meanflow needs omega, guidance_interval_start and guidance_interval_end of every row, "
                    f"but got {' and '.join(given) or 'none'}"
                )
            fits = (
                (omega >= 1)
                & torch.isfinite(omega)
                & (guidance_interval_start >= 0)
                & (guidance_interval_start <= guidance_interval_end)
                & (guidance_interval_end <= 1)
            )
            if not bool(fits.all()):
                row = int(fits.int().argmin())
                raise ValueError(
                    "guidance must satisfy omega >= 1 and 0 <= guidance_interval_start <= guidance_interval_end <= 1 "
                    f"in every row, but row {row} has omega = {omega[row]:g} and "
                    f"[{guidance_interval_start[row]:g}, {guidance_interval_end[row]:g}]"
                )
            guided = (t >= guidance_interval_start) & (t <= guidance_interval_end) & ~label_dropped
            sample = torch.ones_like(t)
            conditional = torch.where(guided, 1.0 - 1.0 / omega, 0.0)
            null = -conditional
            # The graded pass gives the conditional velocity where it runs with what that is defined with.
            known = ~below & (guidance_interval_start == 0.0) & (guidance_interval_end == 1.0)
        else:
            omega = guidance_interval_start = guidance_interval_end = None
            guidance = config.guidance
            guided = (t >= guidance.guidance_interval_start) & (t <= guidance.guidance_interval_end) & ~label_dropped
            sample = torch.where(guided, guidance.omega, torch.ones_like(t))
            conditional = torch.where(guided, guidance.kappa, torch.zeros_like(t))
            null = _without_rounding(1.0 - guidance.omega - guidance.kappa) * guided.to(t.dtype)
            known = ~below
        wants_conditional = (conditional != 0.0) | (below & config.takes_own_velocity)
        rows_conditional = (wants_conditional & ~known).nonzero().flatten()
        rows_null = (null != 0.0).nonzero().flatten()
        return cls(
            t=t,
            r=r,
            noise=noise,
            posterior_noise=torch.zeros_like(noise) if posterior_noise is None else posterior_noise,
            label_dropped=label_dropped,
            mirrored=torch.zeros_like(label_dropped) if mirrored is None else mirrored,
            omega=omega,
            guidance_interval_start=guidance_interval_start,
            guidance_interval_end=guidance_interval_end,
            weight_sample=sample,
            weight_conditional=conditional,
            weight_null=null,
            rows_below=below.nonzero().flatten(),
            rows_ordered=torch.argsort(below.logical_not().to(torch.uint8), stable=True),
            rows_conditional=rows_conditional,
            rows_null=rows_null,
            rows_asked=_padded(torch.cat([rows_conditional, rows_null]), len(t), may_be_asked=_asks(config)),
        )

    def rows(self, start: int, stop: int, config: LossConfig) -> "StepRecord":
        """The record of rows start..stop-1 alone: a worker's or a micro-batch's share of the step."""
        draws = (
            "t",
            "r",
            "noise",
            "posterior_noise",
            "label_dropped",
            "mirrored",
            "omega",
            "guidance_interval_start",
            "guidance_interval_end",
        )
        given = {name: getattr(self, name) for name in draws}
        share = {name: value[start:stop] for name, value in given.items() if value is not None}
        return StepRecord.from_draws(**share, config=config)

    def to(self, device: torch.device) -> "StepRecord":
        """The record with every tensor on `device`."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: v.to(device, non_blocking=True) for n, v in given.items() if v is not None})


def _without_rounding(weight: float) -> float:
    return 0.0 if abs(weight) < 1e-12 else weight  # omega + kappa = 1 needs no null class


def _asks(config: LossConfig) -> bool:
    """Whether any draws could ask for a velocity: a function of the configuration alone."""
    if config.objective == "improved_meanflow":
        return True
    guidance, has_below = config.guidance, not config.is_flow_matching
    asks_null = _without_rounding(1.0 - guidance.omega - guidance.kappa) != 0.0
    return asks_null or (has_below and (guidance.kappa != 0.0 or config.takes_own_velocity))


def _padded(rows: torch.Tensor, num_rows: int, *, may_be_asked: bool) -> torch.Tensor:
    part = max(1, -(-num_rows // ASKED_PARTS))
    parts = -(-len(rows) // part)
    size = part * max(parts, 1 if may_be_asked else 0)
    return torch.cat([rows, rows.new_zeros(size - len(rows))])


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
    below = rows_below(num_rows, rho)
    if probability <= 1.0 - rho + 1e-9:  # 1 - 0.9 is a little below 0.1
        label_dropped = ~below & (uniform * (1.0 - rho) < probability)
    else:
        label_dropped = uniform < probability
    mirrored = torch.rand(num_rows, generator=generator) < 0.5
    noise = torch.randn(num_rows, *latent_shape, generator=generator)
    posterior_noise = torch.randn(num_rows, *latent_shape, generator=generator)
    omega = guidance_interval_start = guidance_interval_end = None
    if config.objective == "improved_meanflow":
        omega = draw_omega(num_rows, config.guidance_sampling, generator)
        guidance_interval_start, guidance_interval_end = draw_guidance_interval(
            below, config.guidance_sampling, generator
        )
    return StepRecord.from_draws(
        t=t,
        r=r,
        noise=noise,
        posterior_noise=posterior_noise,
        label_dropped=label_dropped,
        mirrored=mirrored,
        omega=omega,
        guidance_interval_start=guidance_interval_start,
        guidance_interval_end=guidance_interval_end,
        config=config,
    )


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The objective, and what is worth watching: with p = 1 the loss itself stays near 1 whatever happens."""

    loss: torch.Tensor
    """Scalar with a graph: the weighted sum over these rows over the global number of rows."""
    squared_error: torch.Tensor
    """(B,) detached: ||u - u_tgt||^2, summed over C, H, W."""
    squared_error_v: torch.Tensor | None
    """(B,) detached: ||v - guided velocity||^2 of the v head, where there is one."""
    u: torch.Tensor
    """(B, C, H, W) detached: the network's average velocity."""
    v: torch.Tensor | None
    """(B, C, H, W) detached: the v head's velocity, where there is one."""
    v_guided: torch.Tensor
    """(B, C, H, W): the guided velocity of the target."""
    tangent: torch.Tensor
    """(b, C, H, W): what du/dt was taken along, on the rows with r < t."""
    dudt: torch.Tensor
    """(B, C, H, W): the total derivative; zero on rows with r = t, where it is not needed."""


def _per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))


def _asked_velocities(
    network: Network, z: torch.Tensor, labels: torch.Tensor, record: StepRecord, null_label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocities (B, C, H, W) that only a forward gives, conditional and null; zero on rows that need none.

    One network call on all rows at once, with the true labels: a dropped label is no part of what velocity means.
    """
    nothing = torch.zeros_like(z)
    rows, num_conditional, num_null = record.rows_asked, len(record.rows_conditional), len(record.rows_null)
    if len(rows) == 0:
        return nothing, nothing
    is_conditional = torch.arange(len(rows), device=rows.device) < num_conditional
    t, ones = record.t[rows], torch.ones_like(record.t[rows])
    guidance: dict[str, torch.Tensor] = {}
    if (
        record.omega is not None
        and record.guidance_interval_start is not None
        and record.guidance_interval_end is not None
    ):
        inside = (record.t >= record.guidance_interval_start) & (record.t <= record.guidance_interval_end)
        omega = torch.where(inside[rows] & is_conditional, record.omega[rows], ones)
        guidance = {"omega": omega, "guidance_interval_start": torch.zeros_like(ones), "guidance_interval_end": ones}
    asked_labels = torch.where(is_conditional, labels[rows], null_label)
    conditioning = Conditioning(t=t, r=t, labels=asked_labels, **guidance)
    answers = network(z[rows], conditioning, velocity_only=True).velocity.to(z.dtype)
    conditional, null = answers[: num_conditional + num_null].split([num_conditional, num_null])
    return (
        nothing.index_copy(0, record.rows_conditional, conditional),
        nothing.index_copy(0, record.rows_null, null),
    )


def guided_velocity(
    sample: torch.Tensor, conditional: torch.Tensor, null: torch.Tensor, record: StepRecord
) -> torch.Tensor:
    """a v_t + k v(z_t, t | y) + n v(z_t, t | null), each (B, C, H, W), with the record's weights of each row."""
    a, k, n = (_per_row(w, sample) for w in (record.weight_sample, record.weight_conditional, record.weight_null))
    return a * sample + k * conditional + n * null


def total_derivative(
    network: Network, z: torch.Tensor, conditioning: Conditioning, tangent: torch.Tensor
) -> torch.Tensor:
    """du/dt along (dz, dt, dr) = (tangent, 1, 0): (B, C, H, W), without a graph, in a pass of its own.

    Source: Geng et al. 2025, Eq. 8. In float32 even under autocast: t - r multiplies the rounding of a derivative.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        dudt = network(z, conditioning, tangent).dudt
    assert dudt is not None, "a network that is handed a tangent gives du/dt"
    return dudt


def _graded_pass(
    network: Network, z: torch.Tensor, conditioning: Conditioning, record: StepRecord, tangent: torch.Tensor
) -> NetworkOutput:
    """u (and v) of all rows in their own order, and du/dt of the rows with r < t beside them."""
    order = record.rows_ordered  # a tangent belongs to the first rows
    answer = network(z[order], conditioning.rows(order), tangent)
    back = torch.argsort(order)
    u, v = (None if output is None else output[back] for output in (answer.u, answer.v))
    return NetworkOutput(u=u, v=v, dudt=answer.dudt)


def _adaptively_weighted(error: torch.Tensor, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over rows of the weighted squared errors, and the squared errors (B,), detached."""
    squared = error.square().flatten(1).sum(dim=1)  # a sum over C, H, W and not a mean
    weight = (squared.detach() + config.norm_eps) ** -config.norm_p
    return (weight * squared).sum(), squared.detach()


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
    separate_derivative: bool = False,
) -> LossOutput:
    """The loss of these rows, as `config` says: flow matching's, MeanFlow's or improved MeanFlow's.

    latents: float32 (B, C, H, W), normalised; labels: int64 (B,). Both networks are the same function: the graded one
    is called once, with a graph, and may be a wrapper that reduces gradients; the plain one, without a graph, gives
    velocities. separate_derivative takes du/dt in a float32 pass of the plain network instead of beside the graded
    one: for a graded pass under autocast, or one that recomputes its activations. Raises ValueError where shapes do
    not fit.
    """
    if latents.shape != record.noise.shape or labels.shape != record.t.shape:
        raise ValueError(
            f"the record is for latents {tuple(record.noise.shape)} and labels {tuple(record.t.shape)}, "
            f"but got {tuple(latents.shape)} and {tuple(labels.shape)}"
        )
    t, r, below = record.t, record.r, record.rows_below
    z = (1.0 - _per_row(t, latents)) * latents + _per_row(t, latents) * record.noise
    v_sample = record.noise - latents
    conditioning = Conditioning(
        t=t,
        r=r,
        labels=torch.where(record.label_dropped, null_label, labels),
        omega=record.omega,
        guidance_interval_start=record.guidance_interval_start,
        guidance_interval_end=record.guidance_interval_end,
    )

    with torch.no_grad():
        conditional, null = _asked_velocities(plain_network, z, labels, record, null_label)
        along = conditional if config.takes_own_velocity else guided_velocity(v_sample, conditional, null, record)
        tangent = along[below]
        derivative = None
        if separate_derivative and not config.is_flow_matching:
            # Never an empty batch: under FSDP a rank without such rows makes the same calls as the others.
            rows = below if len(below) else record.rows_ordered[:1]
            derivative = total_derivative(plain_network, z[rows], conditioning.rows(rows), along[rows])[: len(below)]

    if derivative is None and len(below):
        answer = _graded_pass(graded_network, z, conditioning, record, tangent)
        derivative = answer.dudt
    else:
        answer = graded_network(z, conditioning)
    u, v = (None if output is None else output.to(z.dtype) for output in (answer.u, answer.v))
    assert u is not None, "a network that is not asked for its velocity alone gives u"

    with torch.no_grad():
        # On rows that were not asked for it, the graded answer at r = t is the conditional velocity.
        graded_velocity = (u if v is None else v).detach()
        conditional = graded_velocity.index_copy(0, record.rows_conditional, conditional[record.rows_conditional])
        v_guided = guided_velocity(v_sample, conditional, null, record)
        dudt = torch.zeros_like(z)
        if derivative is not None:
            dudt = dudt.index_copy(0, below, derivative.to(z.dtype))
        target = v_guided - _per_row(t - r, z) * dudt

    loss, squared_error = _adaptively_weighted(u - target, config)
    squared_error_v = None
    if config.objective == "improved_meanflow":
        if v is None:
            raise ValueError("improved_meanflow needs a network with a v head, but this one gave u alone")
        loss_v, squared_error_v = _adaptively_weighted(v - v_guided, config)
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
