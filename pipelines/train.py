"""Stage 2: latents -> a generator, with Ray Train on any number of workers, tracked in MLflow.

    python -m pipelines.train xl2 --data latents --storage runs --run-name xl2-first --num-workers 8

Running the same command again resumes the run of that name from its last checkpoint. MLflow is where
MLFLOW_TRACKING_URI says, else in the storage folder. At the end stands a generator: a diffusers pipeline folder, in
the run's folder and in MLflow's model registry.
"""

import json
import logging
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
import tyro
from diffusers import AutoencoderKL
from pyarrow import fs
from ray.train import Checkpoint, CheckpointConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.autoencoder import load_autoencoder, weight_hash
from meanflow_core.config import TrainingConfig
from meanflow_core.generator import build_pipeline, for_sampling, load_network, save_generator
from meanflow_core.latents import LatentNormalization
from meanflow_core.loss import StepRecord, draw_step_record
from meanflow_core.networks import AnyNetwork, build_network, require_same_kind
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.presets import PRESETS
from meanflow_core.training import (
    TrainState,
    begin_from,
    build_train_state,
    load_train_state,
    save_train_state,
    train_step,
)
from pipelines import latent_store, storage, tracking
from pipelines.command import InputError, choose_gpus, parse_command_line, run_command, set_up_logging, start_ray
from pipelines.grids import image_grid
from pipelines.latent_cache import open_latents
from pipelines.latent_store import LatentDataset, Manifest, rows_of_step
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

GRID_CLASSES, GRID_SEEDS = 10, 8  # the grid of samples: rows and columns


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training: what to train (the preset, every number of which can be overridden), on what, and where to."""

    data: str
    """Latent dataset that pipelines.encode wrote: a path or URI."""
    storage: str
    """Folder of runs, shared by all nodes: a path or URI."""
    run_name: str
    """Name of the run; an existing one is resumed."""
    num_workers: int = 1
    """Training processes: one per GPU, or on CPUs any number."""
    vae: str | None = None
    """Autoencoder that the latents must have been made with (hub id or folder); checked if given."""
    initial: str | None = None
    """Generator's folder whose network a new run begins with, e.g. one that pipelines.convert wrote."""
    use_gpu: bool | None = None
    """Train on GPUs; where the cluster has some, unless said."""
    cache_dir: str = str(Path(tempfile.gettempdir()) / f"meanflow-ray-latents-{os.getuid()}")
    """Folder on each node's own disk for its memory-mapped copy of the latents; "none" maps mounted storage itself."""
    mirror: bool = True
    """Train on mirror images too, each with probability 1/2; without them the copy is half as large."""
    experiment: str = "meanflow-ray"
    """MLflow experiment."""
    model_name: str | None = None
    """Name in MLflow's model registry; "meanflow-" and the preset's name unless given."""
    portable: bool = False
    """Write the generator with its code, to open with diffusers alone (trust_remote_code=True)."""
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]
    """The experiment."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, but got {self.num_workers}")


def share_of_rows(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Worker `rank`'s contiguous rows [start, stop) of the global batch: kB/W to (k + 1)B/W."""
    return rank * num_rows // world_size, (rank + 1) * num_rows // world_size


class Figures:
    """Sums over the steps of a logging interval; reading them reduces over the workers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Begins an interval."""
        self._sums = torch.zeros(6, device=self._device)
        self._gradient_norm = torch.zeros((), device=self._device)
        self._steps = 0
        self._data_seconds = 0.0
        self._began = time.monotonic()

    def add(self, sums: torch.Tensor, gradient_norm: torch.Tensor, data_seconds: float) -> None:
        """Adds a step, without waiting for the device."""
        self._sums += sums
        self._gradient_norm += gradient_norm
        self._data_seconds += data_seconds
        self._steps += 1

    def read(self, global_batch_size: int, learning_rate: float) -> dict[str, float]:
        """The interval's figures, the same on every worker: every worker must call this."""
        seconds = time.monotonic() - self._began
        sums = self._sums.clone()
        torch.distributed.all_reduce(sums)
        loss, equal, num_equal, below, num_below, head = sums.tolist()
        of_head = {"squared_error_v": head / (num_equal + num_below)} if head else {}
        return {
            "loss": loss / self._steps,
            **of_head,
            "squared_error_r_equals_t": equal / max(num_equal, 1.0),
            "squared_error_r_below_t": below / max(num_below, 1.0),
            "gradient_norm": self._gradient_norm.item() / self._steps,
            "learning_rate": learning_rate,
            "images_per_second": self._steps * global_batch_size / seconds,
            "data_wait_share": self._data_seconds / seconds,
        }


def sample_grid(pipeline: MeanFlowPipeline, num_inference_steps: int = 1) -> np.ndarray:
    """A picture of samples at fixed seeds, a row per class: uint8 (H, W, 3)."""
    num_classes = min(GRID_CLASSES, pipeline.transformer.config.num_classes)
    labels = [label for label in range(num_classes) for _ in range(GRID_SEEDS)]
    seeds = [seed for _ in range(num_classes) for seed in range(GRID_SEEDS)]
    images = pipeline.images_from_seeds(labels, seeds, num_inference_steps)
    return image_grid(images.cpu().numpy(), GRID_SEEDS)


@dataclass(frozen=True)
class Batch:
    """One worker's share of a step, on its device."""

    moments: torch.Tensor
    """(b, 2C, H, W) float16, of the mirror images where the record says so."""
    labels: torch.Tensor
    """(b,) int64."""
    record: StepRecord
    """The step's draws for these rows."""


class BatchSource:
    """A worker's contiguous rows of any step: which they are depends on (seed, step) and on nothing that came before."""

    def __init__(
        self, dataset: LatentDataset, config: TrainingConfig, share: tuple[int, int], device: torch.device
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._start, self._stop = share
        self._device = device

    def batch(self, step: int) -> Batch:
        """The share of 0-based step `step`."""
        config, rows = self._config, self._config.global_batch_size
        latent_shape = self._dataset.manifest.latent_shape
        indices = rows_of_step(config.seed, step, rows, len(self._dataset))[self._start : self._stop]
        record = draw_step_record(config.loss, seed=config.seed, step=step, num_rows=rows, latent_shape=latent_shape)
        record = record.rows(self._start, self._stop, config.loss)
        moments, labels = self._dataset.rows(indices, record.mirrored.numpy())
        return Batch(
            torch.from_numpy(moments).to(self._device, non_blocking=True),
            torch.from_numpy(labels).to(self._device, non_blocking=True),
            record.to(self._device),
        )


class Prefetcher:
    """Makes the next step's batch while the device is at work on this one."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source
        self._maker = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """As BatchSource has it; begins the batch after it."""
        if self._next is not None and self._next[0] == step:
            made = self._next[1].result()
        else:
            made = self._source.batch(step)
        self._next = (step + 1, self._maker.submit(self._source.batch, step + 1))
        return made


class Observer:
    """What rank 0 shows of a training: figures and pictures in MLflow, progress in the log."""

    def __init__(self, run: tracking.Run, pipeline: MeanFlowPipeline, config: TrainingConfig, first_step: int) -> None:
        self._run = run
        self._pipeline = pipeline
        self._progress = Progress(logger, "trained", "steps", config.num_steps, start=first_step)

    def show_figures(self, figures: dict[str, float], step: int) -> None:
        """Logs an interval's figures."""
        self._run.log_metrics(figures, step)
        self._progress.update(
            step,
            f"{figures['images_per_second']:.0f} images/s, squared error {figures['squared_error_r_equals_t']:.1f} "
            f"(r = t) {figures['squared_error_r_below_t']:.1f} (r < t)",
        )

    def show_samples(self, step: int) -> None:
        """Logs one-step samples of the moving average at fixed seeds."""
        self._run.log_image(sample_grid(self._pipeline), "samples/one_step", step)

    def close(self) -> None:
        """Waits until everything is logged."""
        self._run.flush()


def train_worker(job_and_run: dict[str, Any]) -> dict[str, float]:
    """One worker's training loop; returns the last interval's figures."""
    set_up_logging()
    job: TrainJob = job_and_run["job"]
    config = job.config
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))

    dataset = open_latents(job.data, job.cache_dir, mirrored=job.mirror)
    state = _restored_state(job, dataset.manifest, device, job_and_run["tracking_uri"])
    # DDP averages over workers, and the loss is over the global batch already: hence gradient_scale below.
    graded_network = DistributedDataParallel(state.network, forward_sync_buffers=False, gradient_as_bucket_view=True)
    vae = latent_store.open_autoencoder(job.data)
    normalization = LatentNormalization.from_vae_config(vae.config)
    source = Prefetcher(BatchSource(dataset, config, share_of_rows(config.global_batch_size, rank, world_size), device))
    observer = None
    if rank == 0:
        run = tracking.Run(job_and_run["tracking_uri"], job_and_run["run_id"])
        pipeline = _pipeline(state.ema_network, vae.to(device), dataset.manifest, config)
        observer = Observer(run, pipeline, config, state.step)

    figures, last_figures = Figures(device), {}
    while state.step < config.num_steps:
        began = time.monotonic()
        batch = source.batch(state.step)
        data_seconds = time.monotonic() - began
        metrics = train_step(
            state, graded_network, batch.moments, batch.labels, batch.record, normalization, config,
            gradient_scale=float(world_size),
        )  # fmt: skip
        figures.add(metrics.sums, metrics.gradient_norm, data_seconds)

        is_last = state.step == config.num_steps
        logs = state.step % config.log_interval_steps == 0 or is_last
        if logs:
            last_figures = figures.read(config.global_batch_size, state.optimizer.param_groups[0]["lr"])
            if not np.isfinite(last_figures["loss"]):
                raise FloatingPointError(
                    f"the loss is {last_figures['loss']} by step {state.step}; the last checkpoint came before it"
                )
        if observer is not None and logs:
            observer.show_figures(last_figures, state.step)
        if observer is not None and (state.step % config.sample_interval_steps == 0 or is_last):
            observer.show_samples(state.step)
        if state.step % config.checkpoint_interval_steps == 0 or is_last:
            _report(state, config, last_figures, rank)
        if logs:
            figures.clear()  # after pictures and checkpoints, which are no part of a step's pace
    if observer is not None:
        observer.close()
    return last_figures


def _fresh_state(config: TrainingConfig, manifest: Manifest, device: torch.device) -> TrainState:
    channels, size, _ = manifest.latent_shape
    return build_train_state(
        config, sample_size=size, in_channels=channels, num_classes=len(manifest.class_names), device=device
    )


def _restored_state(job: TrainJob, manifest: Manifest, device: torch.device, tracking_uri: str) -> TrainState:
    state = _fresh_state(job.config, manifest, device)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            load_train_state(state, Path(folder))
        logger.info("resumed at step %d", state.step)
    elif job.initial is not None:
        begin_from(state, _initial_network(job.initial, tracking_uri))
    return state


def _initial_network(location: str, tracking_uri: str | None = None) -> AnyNetwork:
    return load_network(tracking.fetch_generator(location, tracking_uri) / "transformer")


def _check_initial(job: TrainJob, manifest: Manifest) -> None:
    """Raises InputError where the network to begin with is not one of the configured kind and size."""
    if job.initial is None:
        return
    channels, size, _ = manifest.latent_shape
    with torch.device("meta"):
        wanted = build_network(
            job.config.network, sample_size=size, in_channels=channels, num_classes=len(manifest.class_names)
        )
    try:
        require_same_kind(_initial_network(job.initial), wanted)
    except ValueError as error:
        raise InputError(f"--initial {job.initial}: {error}") from error


def _pipeline(network: AnyNetwork, vae: AutoencoderKL, manifest: Manifest, config: TrainingConfig) -> MeanFlowPipeline:
    return build_pipeline(
        network,
        vae,
        manifest.class_names,
        is_flow_matching=config.loss.is_flow_matching,
        sampling=config.sampling,
    )


def _report(state: TrainState, config: TrainingConfig, figures: dict[str, float], rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            save_train_state(state, config, Path(folder))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"step": state.step, **figures}, checkpoint=checkpoint)


def _check_vae(job: TrainJob, manifest: Manifest) -> None:
    """Raises InputError where the latents were made with another autoencoder than the one named."""
    if job.vae is None:
        return
    try:
        named = weight_hash(load_autoencoder(job.vae))
    except ValueError as error:
        raise InputError(str(error)) from error
    if named != manifest.recipe.vae_sha256:
        raise InputError(
            f"the latents in {job.data} were made with autoencoder {manifest.recipe.vae_id} "
            f"(sha256 {manifest.recipe.vae_sha256[:12]}), not with {job.vae} ({named[:12]}); "
            f"encode again with it, or leave out --vae"
        )


def _begin_or_resume_run(job: TrainJob, preset: str, manifest: Manifest, tracking_uri: str) -> tracking.Run:
    """The training's MLflow run; raises InputError where a run of this name was begun with another experiment."""
    filesystem, root = storage.open_storage(job.storage)
    path = f"{root}/{job.run_name}/{tracking.TRAINING_RECORD}"
    identity = json.loads(json.dumps({"config": asdict(job.config), "data_sha256": manifest.content_sha256,
                                      "vae_sha256": manifest.recipe.vae_sha256, "initial": job.initial}))  # fmt: skip
    if filesystem.get_file_info(path).type == fs.FileType.File:
        begun = json.loads(storage.read_bytes(filesystem, path))
        then, now = _flat(begun["identity"]), _flat(identity)
        different = [
            key for key in sorted({*then, *now}) if then.get(key) != now.get(key) and key != "config.num_steps"
        ]
        if different:
            changes = "; ".join(f"{key} was {then.get(key)}, is {now.get(key)}" for key in different)
            raise InputError(
                f"run {job.run_name} in {job.storage} is another experiment ({changes}); choose another --run-name"
            )
        run = tracking.Run(tracking_uri, begun["mlflow_run_id"])
        run.resume()
        return run
    parameters = {
        "preset": preset,
        **job.config.flat(),
        "data": job.data,
        "data.num_samples": manifest.num_samples,
        "data.vae": manifest.recipe.vae_id,
        "data.vae_sha256": manifest.recipe.vae_sha256,
        "num_workers": job.num_workers,
        "initial": job.initial,
    }
    run = tracking.Run.begin(tracking_uri, job.experiment, job.run_name, parameters)
    content = {"identity": identity, "preset": preset, "mlflow_run_id": run.run_id, "tracking_uri": tracking_uri}
    storage.write_bytes(filesystem, path, (json.dumps(content, indent=2) + "\n").encode())
    return run


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def build_generator(job: TrainJob, manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the generator of a checkpoint: the moving average, the autoencoder, the scheduler, the class names."""
    state = _fresh_state(job.config, manifest, torch.device("cpu"))
    with checkpoint.as_directory() as source:
        load_train_state(state, Path(source))
    network = for_sampling(state.ema_network)
    pipeline = _pipeline(network, latent_store.open_autoencoder(job.data), manifest, job.config)
    save_generator(pipeline, folder, portable=job.portable)


def _publish(job: TrainJob, folder: Path) -> str:
    """Puts a generator's files into the run's folder, model_index.json last, and returns its location."""
    filesystem, root = storage.open_storage(job.storage)
    stale = f"{root}/{job.run_name}/generator/model_index.json"
    if filesystem.get_file_info(stale).type == fs.FileType.File:
        filesystem.delete_file(stale)  # nobody may open a mixture of the old generator and the new
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == "model_index.json"
    )
    for path in files:
        relative = path.relative_to(folder).as_posix()
        storage.write_bytes(filesystem, f"{root}/{job.run_name}/generator/{relative}", path.read_bytes())
    return f"{job.storage}/{job.run_name}/generator"


def train(preset: str, job: TrainJob) -> None:
    """Trains, or goes on training, and leaves a generator. Raises InputError for input that cannot be."""
    if not job.run_name or "/" in job.run_name:
        raise InputError(f"--run-name must be a name without slashes, but got {job.run_name!r}")
    job = replace(
        job,
        data=storage.absolute(job.data),
        storage=storage.output_location(job.storage, "--storage").rstrip("/"),
        cache_dir=storage.absolute(job.cache_dir),
        initial=job.initial
        if job.initial is None or job.initial.startswith(tracking.REGISTRY_SCHEMES)
        else storage.absolute(job.initial),
    )
    manifest = latent_store.read_manifest(job.data)
    _check_vae(job, manifest)
    _check_initial(job, manifest)
    if manifest.latent_shape[1] % job.config.network.patch_size:
        raise InputError(
            f"network.patch_size {job.config.network.patch_size} does not divide the latents' side {manifest.latent_shape[1]}"
        )
    if job.config.global_batch_size < job.num_workers:
        raise InputError(f"global_batch_size {job.config.global_batch_size} is less than num_workers {job.num_workers}")
    start_ray(needed_cpus=job.num_workers)
    use_gpu = choose_gpus(job.use_gpu, job.num_workers)
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    tracking_uri = tracking.resolve_tracking_uri(job.storage, num_nodes)
    run = _begin_or_resume_run(job, preset, manifest, tracking_uri)
    logger.info("MLflow run %s at %s", run.run_id, tracking_uri)
    for key, value in job.config.flat().items():
        logger.info("  %s = %s", key, value)

    filesystem, root = storage.open_storage(job.storage)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "tracking_uri": tracking_uri, "run_id": run.run_id},
        scaling_config=ScalingConfig(num_workers=job.num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=job.run_name,
            storage_path=root,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
        assert result.checkpoint is not None, "the last step always has a checkpoint"
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "generator"
            build_generator(job, manifest, result.checkpoint, folder)
            location = _publish(job, folder)
            model = run.register_generator(folder, job.model_name or f"meanflow-{preset}")
    except BaseException as error:
        run.end("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
        raise
    run.end("FINISHED")
    print(f"generator: {location}")
    print(f"model: {model}")
    print(f"tracking: {tracking_uri}")


def parse_arguments(arguments: list[str]) -> tuple[str, TrainJob]:
    """The command line: a preset's name, then options. Raises InputError for an unknown preset."""
    listing = "\n".join(f"    {name:8s} {(preset.__doc__ or '').splitlines()[0]}" for name, preset in PRESETS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: python -m pipelines.train PRESET [OPTIONS]\n\n{__doc__}\n"
            f"Presets (PRESET --help lists the options):\n{listing}"
        )
        raise SystemExit(0 if arguments else 2)
    preset = arguments[0]
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    default = TrainJob(data=tyro.MISSING, storage=tyro.MISSING, run_name=tyro.MISSING, config=PRESETS[preset]())
    return preset, parse_command_line(
        TrainJob, None, args=arguments[1:], default=default, prog=f"python -m pipelines.train {preset}"
    )


def main() -> None:
    """The command."""
    preset, job = parse_arguments(sys.argv[1:])
    train(preset, job)


if __name__ == "__main__":
    run_command(main)
