"""Stage 2: latents -> a generator, with Ray Train on any number of workers, tracked in MLflow.

    python -m pipelines.train xl2 --data latents --storage runs --run-name xl2-first --num-workers 8

Running the same command again resumes the run of that name from its last checkpoint; workers that fail are started
again without it. SIGTERM (`ray job stop`) makes a checkpoint and ends. MLflow is where MLFLOW_TRACKING_URI says, else
in the storage folder. At the end stands a generator: a diffusers pipeline folder, in the run's folder and in MLflow's
model registry.
"""

import logging
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import tyro
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer

from meanflow_core.autoencoder import load_autoencoder, weight_hash
from meanflow_core.networks import AnyNetwork
from pipelines import storage
from pipelines.cluster import choose_gpus, start_ray
from pipelines.command_line import parse_preset_command_line
from pipelines.errors import InputError, RunError
from pipelines.latents.cache import NO_CACHE
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.plan.cost import step_flops
from pipelines.plan.estimate import Workload
from pipelines.plan.report import describe
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.registry import REGISTRY_SCHEMES, register_generator
from pipelines.tracking.run import Run
from pipelines.tracking.server import resolve_tracking_uri
from pipelines.train import checkpoints, stopping, validation, warm_start
from pipelines.train.job import TrainJob
from pipelines.train.model_card import write_card
from pipelines.train.publishing import _publish, build_generator
from pipelines.train.record import begin_or_resume_run, read_record, require_same, write_record
from pipelines.train.worker import Outcome, WorkerTask, train_worker

logger = logging.getLogger(__name__)


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


def prepared(job: TrainJob) -> tuple[TrainJob, Manifest, dict[str, Any] | None]:
    """The job with absolute places, the data's manifest, and the record of the run where it was begun before.

    Reads, and writes nothing. Raises InputError for input that cannot be.
    """
    if not job.run_name.strip() or "/" in job.run_name or job.run_name.startswith("."):
        raise InputError(f"--run-name must be a name without slashes and no dot first, but got {job.run_name!r}")
    job = replace(
        job,
        data=storage.absolute(job.data),
        storage=storage.output_location(job.storage, "--storage").rstrip("/"),
        cache_dir=job.cache_dir if job.cache_dir == NO_CACHE else storage.absolute(job.cache_dir),
        validation_data=job.validation_data and storage.absolute(job.validation_data),
        init_from=job.init_from
        if job.init_from is None or job.init_from.startswith(REGISTRY_SCHEMES)
        else storage.absolute(job.init_from),
    )
    manifest = read_manifest(job.data)
    _check_vae(job, manifest)
    if job.validation_data is not None:
        validation.check(job.validation_data, manifest)
    if manifest.latent_shape[1] % job.config.network.patch_size:
        raise InputError(
            f"network.patch_size {job.config.network.patch_size} does not divide the latents' side {manifest.latent_shape[1]}"
        )
    if job.config.global_batch_size < job.num_workers:
        raise InputError(f"global_batch_size {job.config.global_batch_size} is less than num_workers {job.num_workers}")
    begun = read_record(job)
    if begun is not None and job.config.guidance_after_steps is None:  # decided when it began
        decided = begun["identity"]["config"].get("guidance_after_steps")
        job = replace(job, config=replace(job.config, guidance_after_steps=decided))
    if begun is not None:
        require_same(job, manifest, begun)
    return job, manifest, begun


def warmed(job: TrainJob, manifest: Manifest) -> tuple[TrainJob, AnyNetwork | None]:
    """The job with its guidance staged, and the network to begin with; as it is, and None, without --init-from."""
    if job.init_from is None:
        return job, None
    initial = warm_start.initial_network(job.init_from, job.init_source, job.config.network, job.data, manifest)
    config = warm_start.staged(job.config, manifest, is_flow_matching=initial.is_flow_matching)
    return replace(job, config=config), initial.network


def train(preset: str, job: TrainJob) -> None:
    """Trains, or goes on training, and leaves a generator.

    Raises InputError for input that cannot be, RunError where training failed, SystemExit where it was asked to stop.
    """
    job, manifest, begun = prepared(job)
    initial = None
    if begun is None:
        job, initial = warmed(job, manifest)
    start_ray(needed_cpus=job.num_workers)
    device = begun["device"] if begun is not None and job.device == "auto" else job.device
    use_gpu = choose_gpus(device, job.min_workers or job.num_workers)
    job = replace(job, device="gpu" if use_gpu else "cpu")
    tracking_uri = resolve_tracking_uri(job.storage, num_nodes=sum(node["Alive"] for node in ray.nodes()))
    filesystem, run_path = storage.open_storage(job.run_location)
    request = stopping.claim_run(job.run_location)
    if begun is not None:
        checkpoints.mend_record(filesystem, run_path)
        checkpoints.delete_orphans(filesystem, run_path)
        initial = _require_resumable(job, manifest, begun)
    init_sha256 = None if initial is None else weight_hash(initial)
    run, record = begin_or_resume_run(job, preset, manifest, tracking_uri, begun, init_sha256)
    try:
        logger.info("MLflow run %s at %s", run.run_id, tracking_uri)
        for key, value in job.config.flat().items():
            logger.info("  %s = %s", key, value)
        validates = validation.validates_beside(job, use_gpu=use_gpu)
        result = _fit(job, manifest, run, request, initial, validates=validates)
        checkpoints.delete_orphans(filesystem, run_path)
        outcome: Outcome = result.return_value
        if outcome.nonfinite_step is not None:
            raise RunError(_about_nonfinite(job, outcome.nonfinite_step))
        if outcome.was_asked_to_stop:
            print(f"stopped at step {outcome.step} with a checkpoint; the same command goes on from there", flush=True)
            raise SystemExit(128 + signal.SIGTERM)
        location, model = _finish(job, preset, manifest, result, run, record, validates=validates)
    except BaseException as error:
        run.end("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
        raise
    run.end("FINISHED")
    print(f"generator: {location}")
    print(f"model: {model}")
    print(f"tracking: {tracking_uri}")


def _require_resumable(job: TrainJob, manifest: Manifest, begun: dict[str, Any]) -> AnyNetwork | None:
    """The network to begin with where a run that was begun has no checkpoint yet.

    Raises InputError where the run is past its end, or that network is not the one that it was begun with.
    """
    reached = checkpoints.committed(*storage.open_storage(job.run_location))
    if reached is not None:
        if reached.step > job.config.num_steps:
            raise InputError(
                f"run {job.run_name} has taken {reached.step} steps already, more than num_steps {job.config.num_steps}; "
                f"choose another --run-name, or as many steps at least"
            )
        return None
    _, initial = warmed(job, manifest)
    if initial is not None and weight_hash(initial) != begun.get("init_sha256"):
        raise InputError(
            f"--init-from {job.init_from} is not the network that run {job.run_name} was begun with (its weights have "
            f"changed); choose another --run-name"
        )
    return initial


def _fit(
    job: TrainJob,
    manifest: Manifest,
    run: Run,
    request: ActorHandle,
    initial: AnyNetwork | None,
    *,
    validates: bool,
) -> Result:
    """Runs the workers to their end. Raises RunError where they failed too often, InputError where input was at fault."""
    assert job.device != "auto"
    use_gpu = job.device == "gpu"
    filesystem, root = storage.open_storage(job.storage)
    task = WorkerTask(
        job=job,
        tracking_uri=run.tracking_uri,
        run_id=run.run_id,
        stop_request=request,
        initial=None if initial is None else ray.put(initial),
        step_flops=step_flops(job.config, **manifest.network_sizes),
        code=code_identity(),
        validates=validates,
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=job.num_workers if job.min_workers is None else (job.min_workers, job.num_workers),
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=job.resize_interval_seconds,
        ),
        run_config=RunConfig(
            name=job.run_name,
            storage_path=root,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=job.keep_checkpoints),
            failure_config=FailureConfig(max_failures=job.max_failures),
            callbacks=[checkpoints.SpareRecord(job.run_location)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        validation_config=validation.config(job, run.tracking_uri, run.run_id, use_gpu=use_gpu) if validates else None,
    )
    try:
        with stopping.stop_on_sigterm(request):
            return trainer.fit()
    except TrainingFailedError as error:
        logger.error("training failed", exc_info=error)
        rank, cause = _first_cause(error)
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from error
        first_line = (str(cause).strip().splitlines() or [""])[0]
        where = "" if rank is None else f"worker {rank}: "
        raise RunError(f"training failed: {where}{type(cause).__name__}: {first_line}; {_way_on(job)}") from error


def _way_on(job: TrainJob) -> str:
    """Where the same command would begin; never an error of its own."""
    try:
        last = checkpoints.committed(*storage.open_storage(job.run_location))
    except (InputError, OSError) as error:
        return f"its checkpoints cannot be read now ({error})"
    if last is None:
        return "there is no checkpoint yet: the same command begins anew"
    return f"the last good checkpoint is of step {last.step}, {last.latest.path}: the same command goes on from there"


def _about_nonfinite(job: TrainJob, step: int) -> str:
    return (
        f"the gradient of step {step} is not finite; {_way_on(job)}, and would end the same. --skip-nonfinite "
        f"{job.skip_nonfinite + 1} skips such a step; else begin a run with a smaller optimizer.learning_rate or with "
        f"optimizer.max_gradient_norm"
    )


def _first_cause(error: TrainingFailedError) -> tuple[int | None, BaseException]:
    """The worker whose error was the cause and not its echo, and the error; else the controller's."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return None, getattr(error, "controller_failure", error)
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
    # A worker that dies breaks the others' connections.
    echoes = ("connection", "nccl", "gloo", "timed out")
    own = {
        rank: cause
        for rank, cause in causes.items()
        if isinstance(cause, RayError) or not any(word in str(cause).lower() for word in echoes)
    }
    return next(iter((own or causes).items()))


def _finish(
    job: TrainJob,
    preset: str,
    manifest: Manifest,
    result: Result,
    run: Run,
    record: dict[str, Any],
    *,
    validates: bool,
) -> tuple[str, str]:
    """Writes and registers the generator, once for a step; its location and the model's name."""
    assert result.checkpoint is not None, "the last step always has a checkpoint"
    step = int((result.metrics or {})["step"])
    published = record.get("published", {})
    if published.get("step") == step:
        logger.info("the generator of step %d was made and registered before", step)
        return published["generator"], published["model"]
    if job.validation_data is not None and not validates:
        logger.info("no spare resources to validate on during training: validating the last checkpoint now")
        validation.validate(result.checkpoint, job, run.tracking_uri, run.run_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "generator"
        hashes = build_generator(job, manifest, result.checkpoint, folder)
        write_card(
            folder,
            name=job.model_name or f"meanflow-{preset}",
            preset=preset,
            step=step,
            config=job.config,
            manifest=manifest,
            data=job.data,
            init_from=job.init_from,
            run_id=run.run_id,
        )
        location = _publish(job, folder)
        tags = {
            **hashes,
            "data": storage.shown(job.data),
            "data.sha256": manifest.content_sha256,
            "preset": preset,
            "step": str(step),
            "generator": storage.shown(location),
        }
        try:
            model = register_generator(run, folder, job.model_name or f"meanflow-{preset}", tags)
        except Exception as error:
            raise RunError(
                f"training is done and the generator lies in {location}, but MLflow did not take it: {error}; the same "
                f"command registers it"
            ) from error
    write_record(job, {**record, "published": {"step": step, "generator": location, "model": model}})
    return location, model


def dry_run(preset: str, job: TrainJob) -> str:
    """What would be trained, and what it costs. Raises InputError as training would."""
    job, manifest, begun = prepared(job)
    if begun is None:
        job, _ = warmed(job, manifest)
    workload = Workload(
        config=job.config,
        num_images=manifest.num_samples,
        latent_shape=manifest.latent_shape,
        num_classes=len(manifest.class_names),
        mirrored=job.mirror,
        parallelism=job.parallelism,
        rows_per_pass=job.rows_per_pass,
    )
    try:
        return describe(preset, workload, job.num_workers, job.min_workers)
    except ValueError as error:
        raise InputError(str(error)) from error


def parse_arguments(arguments: list[str]) -> tuple[str, TrainJob]:
    """The command line: a preset's name, then options. Raises InputError for an unknown preset."""
    return parse_preset_command_line(
        TrainJob,
        arguments,
        "pipelines.train",
        __doc__ or "",
        lambda config: TrainJob(data=tyro.MISSING, storage=tyro.MISSING, run_name=tyro.MISSING, config=config),
    )


def main() -> None:
    """The command."""
    preset, job = parse_arguments(sys.argv[1:])
    if job.dry_run:
        print(dry_run(preset, job))
    else:
        train(preset, job)
