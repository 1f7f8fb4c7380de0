"""What the comparison trains: the methods, how long each of them runs, and one training as a plain function.

The methods differ in their objective alone: same data, same batch, same optimiser, networks of the same size, and the
same guided target of effective scale 2. Improved MeanFlow has a network of its own kind, of as many parameters as the
others' within 3 % when it samples, and is asked for that scale when it does.
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch

from meanflow_core import presets
from meanflow_core.config import (
    GuidanceConfig,
    GuidanceSamplingConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    SamplingConfig,
    TimeSamplingConfig,
    TrainingConfig,
)
from meanflow_core.generator import build_pipeline, for_sampling, save_generator
from meanflow_core.latents import LatentNormalization
from meanflow_core.networks import AnyNetwork
from meanflow_core.training import SUMS, build_train_state, train_step
from pipelines.command_line import set_up_logging
from pipelines.errors import RunError
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.latents.manifest import NetworkSizes, read_manifest
from pipelines.plan.cost import step_flops
from pipelines.progress import Progress
from pipelines.train.batches import BatchSource

logger = logging.getLogger(__name__)

Budget = Literal["steps", "flops"]
BUDGETS: tuple[Budget, ...] = ("steps", "flops")
RECORD = "training.json"
CURVE_POINTS = 50  # of a loss curve: each a mean over so much of the run that its noise is small


@dataclass(frozen=True, kw_only=True)
class Method:
    """One of the things that are compared."""

    name: str
    """As the command line and files have it."""
    title: str
    """As tables and plots have it."""
    config: TrainingConfig
    """The whole training, but for its seed."""


def methods(num_steps: int) -> dict[str, Method]:
    """The methods by name, each trained for num_steps: every number of the comparison stands here."""
    cooldown_share, fraction_r_below_t, kappa = 0.3, 0.5, 0.5
    base = replace(
        presets.demo(),
        network=NetworkConfig(patch_size=2, hidden_size=96, depth=5, num_heads=4),
        loss=LossConfig(
            times=TimeSamplingConfig(fraction_r_below_t=fraction_r_below_t),
            guidance=GuidanceConfig(omega=1.0, kappa=kappa),
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, warmup_steps=100, cooldown_steps=round(cooldown_share * num_steps)
        ),
        ema_decays=(0.99,),
        global_batch_size=64,
        num_steps=num_steps,
    )
    flow_matching = replace(base, loss=replace(base.loss, times=TimeSamplingConfig(fraction_r_below_t=0.0)))
    own_velocity = replace(base, loss=replace(base.loss, tangent="own_velocity"))
    improved = replace(
        base,
        network=replace(base.network, architecture="imf_dit", depth=7, mlp_ratio=8 / 3, aux_head_depth=1),
        loss=LossConfig(
            objective="improved_meanflow",
            tangent="own_velocity",
            times=TimeSamplingConfig(fraction_r_below_t=0.5),
            guidance_sampling=GuidanceSamplingConfig(omega_max=8.0),
        ),
        sampling=SamplingConfig(guidance_scale=base.loss.guidance.effective_scale),
    )
    named = (
        Method(name="flow_matching", title="flow matching", config=flow_matching),
        Method(name="meanflow", title="MeanFlow", config=base),
        Method(name="meanflow_own_velocity", title="MeanFlow, own velocity", config=own_velocity),
        Method(name="improved_meanflow", title="improved MeanFlow", config=improved),
    )
    return {method.name: method for method in named}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training. Budgets that ask a method for the same number of steps share it."""

    method: str
    seed: int
    num_steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{self.num_steps}-steps-seed-{self.seed}"

    @property
    def config(self) -> TrainingConfig:
        """The training, whole."""
        return replace(methods(self.num_steps)[self.method].config, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The latents that all runs learn from."""

    latents: str
    """Latent dataset: a path or URI."""
    cache_dir: str = "none"
    """Where each node keeps its copy; "none" maps mounted storage itself."""

    @property
    def network_sizes(self) -> NetworkSizes:
        """What networks take from the data."""
        return read_manifest(self.latents).network_sizes


def step_costs(sizes: NetworkSizes) -> dict[str, float]:
    """{method: floating-point operations of one of its steps}, as `meanflow_core.cost` counts them."""
    return {name: step_flops(method.config, **sizes) for name, method in methods(1).items()}


def steps_of(budget: Budget, num_steps: int, costs: dict[str, float], flops_of: str | None = None) -> dict[str, int]:
    """{method: steps that it takes} in a budget: num_steps each, or what num_steps of one method cost.

    costs: {method: operations per step}. flops_of: that method; the dearest unless named.
    """
    if budget == "steps":
        return dict.fromkeys(costs, num_steps)
    reference = num_steps * (costs[flops_of] if flops_of else max(costs.values()))
    return {name: round(reference / cost) for name, cost in costs.items()}


def planned_runs(
    steps: Iterable[dict[str, int]], names: Sequence[str], seeds: Sequence[int], costs: dict[str, float]
) -> list[Trial]:
    """The runs, each once, those of most operations first: the last to end should not be a long one.

    steps: of each budget, as `steps_of` has them.
    """
    wanted = {
        Trial(method=name, seed=seed, num_steps=by_method[name])
        for by_method in steps
        for name in names
        for seed in seeds
    }
    return sorted(wanted, key=lambda run: (-run.num_steps * costs[run.method], run.name))


def is_trained(run: Trial, output: Path) -> bool:
    """Whether a run lies whole in its folder."""
    return (output / run.name / RECORD).is_file()


def read_record(run: Trial, output: Path) -> dict[str, Any]:
    """A trained run's record."""
    return dict(json.loads((output / run.name / RECORD).read_text()))


class LossCurve:
    """Means of the squared errors over equal parts of a run."""

    def __init__(self, num_steps: int) -> None:
        self._interval = max(1, num_steps // CURVE_POINTS)
        self._num_steps = num_steps
        self._waiting: list[torch.Tensor] = []
        self.points: list[dict[str, float | None]] = []

    def add(self, step: int, sums: torch.Tensor) -> None:
        """The sums (`SUMS`) of 0-based step `step`. Reading them waits for the device, so it is done once a part."""
        self._waiting.append(sums)
        if (step + 1) % self._interval and step + 1 < self._num_steps:
            return
        total = dict(zip(SUMS, torch.stack(self._waiting).double().sum(dim=0).tolist(), strict=True))
        point: dict[str, float | None] = {"step": step + 1}
        for rows in ("r_equals_t", "r_below_t"):
            count = total[f"rows_{rows}"]
            point[f"squared_error_{rows}"] = total[f"squared_error_{rows}"] / count if count else None
        self.points.append(point)
        self._waiting.clear()


def train_run(run: Trial, data: Data, output: Path, device: torch.device | None = None) -> dict[str, Any]:
    """Trains in this process; writes output/<run's name>/ whole or not at all, and returns its record.

    The folder holds the generator, of the moving average, and training.json: the configuration, the loss curve, steps,
    seconds of training, operations per step, parameters. A run that lies there is not trained again. Raises InputError
    where the latents cannot be opened, RuntimeError where the loss is not finite.
    """
    if is_trained(run, output):
        return read_record(run, output)
    device = device or torch.device("cpu")
    config = run.config
    dataset = open_latents(data.latents, data.cache_dir)
    vae = open_autoencoder(data.latents)
    normalization = LatentNormalization.from_vae_config(vae.config)
    sizes = dataset.manifest.network_sizes
    state = build_train_state(config, **sizes, device=device)
    source = BatchSource(dataset, config, rank=0, world_size=1, device=device)
    curve = LossCurve(config.num_steps)
    progress = Progress(logger, f"{run.name}: trained", "steps", config.num_steps, interval_seconds=30.0)
    began = time.perf_counter()
    for step in range(config.num_steps):
        metrics = train_step(state, state.network, source.batches(step), normalization, config)
        curve.add(step, metrics.sums)
        error = curve.points[-1]["squared_error_r_equals_t"] if curve.points else None
        progress.update(step + 1, f"squared error {error:.2f}" if error is not None else "")
    seconds = time.perf_counter() - began
    if not all(bool(torch.isfinite(parameter).all()) for parameter in state.ema_network.parameters()):
        raise RuntimeError(f"{run.name}: the parameters are not finite after {config.num_steps} steps")
    network = for_sampling(state.ema_network).cpu()
    record = {
        "run": run.name,
        "method": run.method,
        "seed": run.seed,
        "num_steps": config.num_steps,
        "config": config.flat(),
        "data_sha256": dataset.manifest.content_sha256,
        "step_flops": step_flops(config, **sizes),
        "num_parameters": _num_parameters(state.network),
        "num_parameters_sampling": _num_parameters(network),
        "seconds": seconds,
        "device": str(device),
        "loss_curve": curve.points,
    }
    pipeline = build_pipeline(
        network,
        vae,
        dataset.manifest.class_names,
        wnids=dataset.manifest.wnids,
        is_flow_matching=config.loss.is_flow_matching,
        sampling=config.sampling,
    )
    partial = output / f"{run.name}.{uuid.uuid4().hex}.partial"
    save_generator(pipeline, partial / "generator")
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    try:
        partial.rename(output / run.name)
    except OSError:
        # A task that Ray ran twice: the other one was first, and wrote the same.
        if not is_trained(run, output):
            raise
        shutil.rmtree(partial)
    return read_record(run, output)


def _num_parameters(network: AnyNetwork) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _train_remotely(run: Trial, data: Data, output: Path) -> str:
    set_up_logging()
    torch.set_num_threads(1)
    train_run(run, data, output, torch.device("cuda" if ray.get_gpu_ids() else "cpu"))
    return run.name


def train_all(runs: Iterable[Trial], data: Data, output: Path, costs: dict[str, float], *, use_gpu: bool) -> None:
    """Trains what is not trained yet, each run a task of Ray with a thread of its own, and a GPU where asked.

    Runs begin in their order. A task whose process or machine is lost begins again.
    """
    output.mkdir(parents=True, exist_ok=True)
    for left in output.glob("*.partial"):
        shutil.rmtree(left)
    runs = list(runs)
    missing = [run for run in runs if not is_trained(run, output)]
    logger.info("%d of %d runs to train", len(missing), len(runs))
    gigaflops = {run.name: run.num_steps * costs[run.method] / 1e9 for run in missing}
    progress = Progress(logger, "trained", "gigaflop", round(sum(gigaflops.values())))
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=5)(_train_remotely)
    waiting = [task.remote(run, data, output) for run in missing]
    done: list[str] = []
    for name in as_they_finish(waiting):
        done.append(name)
        progress.update(round(sum(gigaflops[name] for name in done)), f"{len(done)} of {len(missing)} runs")


def as_they_finish(waiting: list[ray.ObjectRef]) -> Iterator[str]:
    """What tasks return, in the order in which they end. Raises RunError where one fails."""
    while waiting:
        finished, waiting = ray.wait(waiting)
        try:
            names = ray.get(finished)
        except ray.exceptions.RayError as error:
            logger.error("%s", error)
            reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            raise RunError(f"a run failed: {reason}; what is done is kept, and the same command goes on") from error
        yield from names
