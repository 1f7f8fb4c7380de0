"""Plans a comparison: the experiments that give every method the same budget.

The shipped methods share the data, the batch size, the optimiser, the network's size and a guided target of scale 2.
Improved MeanFlow has its own network, whose parameter count at sampling time is within 3 % of the others', and samples
with a guidance scale of 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from meanflow_core.config import TrainingConfig
from meanflow_core.presets import preset_config
from meanflow_core.references import resolve
from pipelines.compare.job import Budget, CompareJob
from pipelines.errors import InputError
from pipelines.sweep.experiments import Experiment

FlopsOf = Callable[[TrainingConfig], float]  # FLOPs of one step of a configuration
FLOPS_TOLERANCE = 0.005  # FLOPs of a step are estimates, within 0.2 %


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A method with a budget and a seed."""

    budget: Budget
    method: str
    seed: int
    stages: tuple[Experiment, ...]
    """Its trainings, one after another. The last one's generator is measured."""

    @property
    def experiment(self) -> Experiment:
        """The last training."""
        return self.stages[-1]

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.config.num_steps for stage in self.stages)


def plan_entrants(job: CompareJob, flops_of: FlopsOf) -> list[Entrant]:
    """All methods with each budget and seed. Raises InputError for an unknown preset or function."""
    try:
        configs = {name: _adapted(preset_config(name), job.adapt) for name in (*job.methods, job.baseline)}
    except ValueError as error:
        raise InputError(str(error)) from error
    total_flops = job.num_steps * flops_of(configs[job.baseline])

    def share_of(method: str, budget: Budget, share: float) -> int:
        """The number of the method's steps in a share of the budget."""
        num_steps = job.num_steps if budget == "steps" else total_flops / flops_of(configs[method])
        if abs(num_steps - job.num_steps) < FLOPS_TOLERANCE * job.num_steps:
            num_steps = job.num_steps  # the same training serves both budgets
        return max(1, round(share * num_steps))

    def stages(method: str, budget: Budget, seed: int) -> tuple[Experiment, ...]:
        if method not in job.from_baseline:
            return (_experiment(method, configs[method], share_of(method, budget, 1.0), seed),)
        first = _experiment(job.baseline, configs[job.baseline], share_of(job.baseline, budget, 0.5), seed)
        return first, _experiment(method, configs[method], share_of(method, budget, 0.5), seed, first)

    return [
        Entrant(budget=budget, method=method, seed=seed, stages=stages(method, budget, seed))
        for budget in job.budgets
        for method in job.methods
        for seed in job.seeds
    ]


def _adapted(config: TrainingConfig, reference: str | None) -> TrainingConfig:
    """The configuration after `CompareJob.adapt`. Raises ValueError unless that maps configurations to configurations."""
    if reference is None:
        return config
    function = resolve(reference)
    adapted = function(config) if callable(function) else function
    if not isinstance(adapted, TrainingConfig):
        raise ValueError(
            f"adapt must be a function that takes and returns a TrainingConfig, but {reference} gives {adapted!r}"
        )
    return adapted


def distinct_experiments(entrants: list[Entrant]) -> list[Experiment]:
    """The trainings of all entrants. Equal ones, for example of two budgets, are shared."""
    return list({stage.name: stage for entrant in entrants for stage in entrant.stages}.values())


def with_num_steps(config: TrainingConfig, num_steps: int) -> TrainingConfig:
    """The configuration with another length. The cool-down keeps its fraction of the run."""
    cooldown_steps = round(config.optimizer.cooldown_steps * num_steps / config.num_steps)
    return replace(config, num_steps=num_steps, optimizer=replace(config.optimizer, cooldown_steps=cooldown_steps))


def _experiment(
    preset: str, config: TrainingConfig, num_steps: int, seed: int, start: Experiment | None = None
) -> Experiment:
    config = replace(with_num_steps(config, num_steps), seed=seed)
    # Only at the end, because the comparison measures no samples of earlier steps.
    config = replace(config, sample_interval_steps=num_steps)
    name = f"{preset.rpartition(':')[2]}-{num_steps}-steps"
    if start is not None:
        name += f"-after-{start.config.num_steps}"
        config = replace(config, guidance_after_steps=0)  # the baseline's velocities are guided already
    return Experiment(
        name=f"{name}-seed-{seed}", preset=preset, config=config, init_from=None if start is None else start.name
    )
