"""The compared methods, the training budgets, and the resulting trials.

The methods differ only in their objective. They share the data, the batch size, the optimiser, the network size and the
guided target, whose effective scale is 2. The exception is improved MeanFlow: it has its own network architecture, whose
parameter count at sampling time is within 3 % of the others', and it samples with a guidance scale of 2.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from meanflow_core.config import (
    DiTConfig,
    GuidanceConfig,
    GuidanceSamplingConfig,
    ImprovedDiTConfig,
    ImprovedMeanFlowConfig,
    MeanFlowConfig,
    OptimizerConfig,
    SamplingConfig,
    TimeSamplingConfig,
    TrainingConfig,
)
from meanflow_core.presets import demo as presets

Budget = Literal["steps", "flops"]
BUDGETS: tuple[Budget, ...] = ("steps", "flops")
BUDGET_TITLES: dict[Budget, str] = {"steps": "equal steps", "flops": "equal training FLOPs"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One of the compared methods."""

    name: str
    """Name in options and files."""
    title: str
    """Name in tables and plots."""
    config: TrainingConfig
    """Training configuration with seed 0."""


def build_methods(num_steps: int) -> dict[str, Method]:
    """All methods by name, each trained for num_steps."""
    loss = MeanFlowConfig(
        times=TimeSamplingConfig(fraction_r_below_t=0.5), guidance=GuidanceConfig(omega=1.0, kappa=0.5)
    )
    base = replace(
        presets.demo(),
        network=DiTConfig(patch_size=2, hidden_size=96, depth=5, num_heads=4),
        loss=loss,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100, cooldown_steps=round(0.3 * num_steps)),
        ema_decays=(0.99,),
        global_batch_size=64,
        num_steps=num_steps,
    )
    flow_matching = replace(base, loss=replace(loss, times=TimeSamplingConfig(fraction_r_below_t=0.0)))
    own_velocity = replace(base, loss=replace(loss, tangent="own_velocity"))
    improved = replace(
        base,
        network=ImprovedDiTConfig(patch_size=2, hidden_size=96, depth=7, num_heads=4, aux_head_depth=1),
        loss=ImprovedMeanFlowConfig(guidance_sampling=GuidanceSamplingConfig(omega_max=8.0)),
        sampling=SamplingConfig(guidance_scale=loss.guidance.effective_scale),
    )
    methods = (
        Method(name="flow_matching", title="flow matching", config=flow_matching),
        Method(name="meanflow", title="MeanFlow", config=base),
        Method(name="meanflow_own_velocity", title="MeanFlow, own velocity", config=own_velocity),
        Method(name="improved_meanflow", title="improved MeanFlow", config=improved),
    )
    return {method.name: method for method in methods}


METHODS = tuple(build_methods(1))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a method. If two budgets give the method the same number of steps, they share the trial."""

    method: str
    seed: int
    num_steps: int

    @property
    def name(self) -> str:
        """Name of the trial's folder."""
        return f"{self.method}-{self.num_steps}-steps-seed-{self.seed}"

    @property
    def config(self) -> TrainingConfig:
        """Training configuration with the trial's seed."""
        return replace(build_methods(self.num_steps)[self.method].config, seed=self.seed)


def steps_in_budget(
    budget: Budget, num_steps: int, flops_per_step: dict[str, float], flops_of: str | None = None
) -> dict[str, int]:
    """{method: steps} in a budget.

    "steps" gives every method num_steps. "flops" gives each the FLOPs that num_steps of the method flops_of cost (default:
    the most expensive method).
    """
    if budget == "steps":
        return dict.fromkeys(flops_per_step, num_steps)
    total = num_steps * (flops_per_step[flops_of] if flops_of else max(flops_per_step.values()))
    return {name: round(total / flops) for name, flops in flops_per_step.items()}


def plan_trials(
    steps: Iterable[dict[str, int]], methods: Sequence[str], seeds: Sequence[int], flops_per_step: dict[str, float]
) -> list[Trial]:
    """All distinct trials, most expensive first, so that no long trial starts last.

    steps: {method: steps} of each budget.
    """
    trials = {
        Trial(method=method, seed=seed, num_steps=by_method[method])
        for by_method in steps
        for method in methods
        for seed in seeds
    }
    return sorted(trials, key=lambda trial: (-trial.num_steps * flops_per_step[trial.method], trial.name))
