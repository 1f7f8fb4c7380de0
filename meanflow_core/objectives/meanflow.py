"""The loss of a training step as a pure function of its recorded random draws, for three objectives.

    z_t   = (1 - t) x + t e                                  noisy latent
    v_t   = e - x                                            conditional velocity of one sample
    v     = a v_t + k v(z_t, t | y) + n v(z_t, t | null)     guided velocity, a + k + n = 1
    u_tgt = stop_gradient(v - (t - r) du/dt)                 du/dt: derivative along (dz, dt, dr) = (tangent, 1, 0)
    loss  = 1/B sum over samples of w ||u - u_tgt||^2        w = stop_gradient(1 / (||u - u_tgt||^2 + c)^p)

Flow matching: r = t for every sample, and (a, k, n) = (1, 0, 0).

MeanFlow: (a, k, n) = (omega, kappa, 1 - omega - kappa) inside the guidance interval. v(z_t, t | y) is u(z_t, t, t | y).
The tangent is v, or the network's own v(z_t, t | y).

Improved MeanFlow: omega and its interval are drawn per sample and are inputs of the network; (a, k, n) =
(1, 1 - 1/omega, 1/omega - 1). The tangent is the network's own v(z_t, t | y), from its v head. A second loss term
regresses the v head onto v.

To avoid redundant forwards, one no-grad forward computes only the velocities that the training forward lacks: those of
the null class for guided samples, and those of the sample's class if r < t. If r = t, the training forward's own output,
detached, is v(z_t, t | y). The training forward computes u for all samples, and du/dt only for those with r < t, because
the others multiply it by zero. The number of forwards does not depend on the draws, so that sharded workers make the
same collective calls. The no-grad forward's batch is padded to one of a few sizes, which limits recompilation.

Source: Geng et al. 2025, arXiv 2505.13447, Eq. 6 to 11 and 19 to 22; and arXiv 2512.02012. The latter regresses
V = u + (t - r) du/dt onto v, which is equivalent: V - v = u - u_tgt.
"""

from dataclasses import dataclass

import torch

from meanflow_core.config import LossConfig
from meanflow_core.networks.interface import Conditioning, Network, NetworkOutput
from meanflow_core.objectives.draws import GUIDANCE_INPUTS, StepRecord, draw_step_record
from meanflow_core.objectives.interface import Loss, Mean, Objective


@dataclass(frozen=True, kw_only=True)
class LossOutput(Loss):
    """The loss and its parts. With p = 1 the loss is always near 1, so monitor the squared errors instead."""

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
    """(b, C, H, W): the direction of du/dt, for the samples with r < t."""
    dudt: torch.Tensor
    """(B, C, H, W): the total derivative; zero for samples with r = t, whose target does not depend on it."""


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))


def _evaluate_velocities(
    network: Network, z: torch.Tensor, labels: torch.Tensor, record: StepRecord, null_label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and null velocities (B, C, H, W) from one no-grad forward; zero for samples that need none.

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
        # The interval is [0, 1]. omega is 1 for null velocities and for samples whose t is outside their own interval.
        is_inside = (record.t >= start) & (record.t <= end)
        omega = torch.where(is_inside[rows] & is_conditional, record.omega[rows], ones)
        guidance = {"omega": omega, "guidance_interval_start": torch.zeros_like(ones), "guidance_interval_end": ones}
    classes = torch.where(is_conditional, labels[rows], null_label)
    conditioning = Conditioning(t=t, r=t, labels=classes, **guidance)
    velocities = network(z[rows], conditioning, velocity_only=True).velocity.to(z.dtype)
    # The last rows are padding.
    conditional, null = velocities[: num_conditional + num_null].split([num_conditional, num_null])
    return (
        zeros.index_copy(0, record.rows_conditional, conditional),
        zeros.index_copy(0, record.rows_null, null),
    )


def guided_velocity(
    sample: torch.Tensor, conditional: torch.Tensor, null: torch.Tensor, record: StepRecord
) -> torch.Tensor:
    """a v_t + k v(z_t, t | y) + n v(z_t, t | null), each (B, C, H, W), with the record's weights."""
    a, k, n = (_per_sample(w, sample) for w in (record.weight_sample, record.weight_conditional, record.weight_null))
    return a * sample + k * conditional + n * null


def total_derivative(
    network: Network, z: torch.Tensor, conditioning: Conditioning, tangent: torch.Tensor
) -> torch.Tensor:
    """du/dt along (dz, dt, dr) = (tangent, 1, 0), (B, C, H, W), from a separate no-grad forward.

    Runs in float32 even under autocast, because t - r multiplies the derivative's rounding error.
    Source: Geng et al. 2025, Eq. 8.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        dudt = network(z, conditioning, tangent).dudt
    assert dudt is not None, "a network must return du/dt if it gets a tangent"
    return dudt


def _forward_with_derivative(
    network: Network, z: torch.Tensor, conditioning: Conditioning, record: StepRecord, tangent: torch.Tensor
) -> NetworkOutput:
    """Computes u and v of all samples, and du/dt of those with r < t, in one forward."""
    order = record.rows_ordered  # samples with r < t first, because a tangent belongs to the first rows
    output = network(z[order], conditioning.rows(order), tangent)
    inverse = torch.argsort(order)
    u, v = (None if value is None else value[inverse] for value in (output.u, output.v))
    return NetworkOutput(u=u, v=v, dudt=output.dudt)


def _weighted_sum(error: torch.Tensor, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The adaptively weighted sum of squared errors over samples, and the squared errors (B,), detached."""
    squared = error.square().flatten(1).sum(dim=1)  # the papers' sum over C, H, W, not a mean
    weight = (squared.detach() + config.norm_eps) ** -config.norm_p
    return (weight * squared).sum(), squared.detach()


def _metrics(
    squared_error: torch.Tensor, squared_error_v: torch.Tensor | None, dudt: torch.Tensor, below: torch.Tensor
) -> dict[str, Mean]:
    """The values of `MeanFlow.metric_names` for the samples of one pass. below: int64 (b,), the rows with r < t."""
    error_below = squared_error[below].sum()
    num_below, num_rows = len(below), len(squared_error)
    metrics = {
        "squared_error_r_equals_t": Mean(squared_error.sum() - error_below, num_rows - num_below),
        "squared_error_r_below_t": Mean(error_below, num_below),
        "dudt_norm": Mean(dudt.flatten(1).norm(dim=1).sum(), num_below),  # zero on rows with r = t
    }
    if squared_error_v is not None:
        metrics["squared_error_v"] = Mean(squared_error_v.sum(), num_rows)
    return metrics


class MeanFlow(Objective[StepRecord]):
    """Flow matching, MeanFlow and improved MeanFlow, by configuration."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.metric_names = ("squared_error_r_equals_t", "squared_error_r_below_t", "dudt_norm")
        if config.objective == "improved_meanflow":
            self.metric_names += ("squared_error_v",)

    def draw(self, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]) -> StepRecord:
        """Draws times, noise, dropped labels and guidance; see `draws`."""
        return draw_step_record(self.config, seed=seed, step=step, num_rows=num_rows, latent_shape=latent_shape)

    def share(self, record: StepRecord, start: int, stop: int) -> StepRecord:
        """The record of rows start to stop - 1."""
        return record.rows(start, stop, self.config)

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
    ) -> LossOutput:
        """See `Objective.loss`. Raises ValueError also for improved MeanFlow if the network has no v head."""
        config = self.config
        if latents.shape != record.noise.shape or labels.shape != record.t.shape:
            raise ValueError(
                f"the record is for latents {tuple(record.noise.shape)} and labels {tuple(record.t.shape)}, "
                f"but got {tuple(latents.shape)} and {tuple(labels.shape)}"
            )
        t, r, below = record.t, record.r, record.rows_below  # below: rows with r < t
        z = (1.0 - _per_sample(t, latents)) * latents + _per_sample(t, latents) * record.noise
        v_sample = record.noise - latents
        y = torch.where(record.label_dropped, null_label, labels)
        conditioning = Conditioning(t=t, r=r, labels=y, **{name: getattr(record, name) for name in GUIDANCE_INPUTS})

        with torch.no_grad():
            conditional, null = _evaluate_velocities(network, z, labels, record, null_label)
            direction = (
                conditional if config.uses_own_velocity else guided_velocity(v_sample, conditional, null, record)
            )
            tangent, derivative = direction[below], None
            if separate_derivative and not config.is_flow_matching:
                # Never an empty batch: under FSDP, a rank without samples r < t must make the same calls as the others.
                rows = below if len(below) else record.rows_ordered[:1]
                derivative = total_derivative(network, z[rows], conditioning.rows(rows), direction[rows])[: len(below)]

        if derivative is None and len(below) > 0:
            output = _forward_with_derivative(training_network, z, conditioning, record, tangent)
            derivative = output.dudt
        else:
            output = training_network(z, conditioning)
        u, v = (None if value is None else value.to(z.dtype) for value in (output.u, output.v))
        assert u is not None, "a network must return u unless velocity_only is set"

        with torch.no_grad():
            # Samples outside rows_conditional have r = t, where the training forward's velocity is the conditional one, or
            # their conditional velocity has weight zero.
            own_velocity = (u if v is None else v).detach()
            conditional = own_velocity.index_copy(0, record.rows_conditional, conditional[record.rows_conditional])
            v_guided = guided_velocity(v_sample, conditional, null, record)
            dudt = torch.zeros_like(z)
            if derivative is not None:
                dudt = dudt.index_copy(0, below, derivative.to(z.dtype))
            target = v_guided - _per_sample(t - r, z) * dudt

        loss, squared_error = _weighted_sum(u - target, config)
        squared_error_v = None
        if config.objective == "improved_meanflow":
            if v is None:
                raise ValueError("improved_meanflow needs a network with a v head, but this one returned only u")
            loss_v, squared_error_v = _weighted_sum(v - v_guided, config)
            loss = loss + loss_v
        return LossOutput(
            loss=loss / global_num_rows,
            metrics=_metrics(squared_error, squared_error_v, dudt, below),
            squared_error=squared_error,
            squared_error_v=squared_error_v,
            u=u.detach(),
            v=None if v is None else v.detach(),
            v_guided=v_guided,
            tangent=tangent,
            dudt=dudt,
        )
