"""The driver: checks the job, trains on Ray Train workers, completes the output."""

import logging
from dataclasses import replace

import ray
from pyarrow import fs
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from pipelines import storage
from pipelines.autoencoder.batches import ImageSource, worker_slices
from pipelines.autoencoder.job import AutoencoderJob
from pipelines.autoencoder.record import Record, Result, configuration, read_record, write_record
from pipelines.autoencoder.worker import WorkerTask, train_worker
from pipelines.cluster import choose_gpus, first_cause, num_gpus, start_ray
from pipelines.efficientnet import load_efficientnet
from pipelines.errors import InputError, RunError
from pipelines.images.sources import find_images
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.run import Run
from pipelines.tracking.server import resolve_tracking_uri

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # Ray Train's folder in the output, deleted at the end


def train_autoencoder(job: AutoencoderJob) -> Record:
    """Starts or resumes a training, writes the autoencoder to the output, and returns the record.

    Raises InputError for invalid input, RunError if training fails.
    """
    job = _with_absolute_locations(job)
    record = read_record(job)
    if record is not None and record.result is not None:
        logger.info("%s is complete: %.2f dB", job.output, record.result.psnr)
        return record
    if job.perceptual_weight > 0:
        load_efficientnet()  # fails here rather than on the workers
    images = find_images(job.images, job.format)
    held_out = find_images(job.held_out_images, job.format)
    start_ray(needed_cpus=job.num_workers or 1)
    job = _with_workers(job, images)
    parent, _, name = job.output.rstrip("/").rpartition("/")
    if record is None:
        tracking_uri = resolve_tracking_uri(parent, num_nodes=sum(node["Alive"] for node in ray.nodes()))
        run = Run.begin(tracking_uri, job.experiment, name, _parameters(job, images, held_out), code_identity())
        record = Record(
            config=configuration(job), tracking_uri=tracking_uri, mlflow_run_id=run.run_id, code=code_identity()
        )
        write_record(job, record)
    else:
        run = Run(record.tracking_uri, record.mlflow_run_id)
        run.resume()
    with run.ends():
        logger.info("MLflow run %s at %s", run.run_id, run.tracking_uri)
        logger.info("%d training images, %d held-out images", len(images[2]), len(held_out[2]))
        record = replace(record, result=_run_workers(job, images, held_out, run))
    filesystem, folder = storage.open_storage(job.output)
    write_record(job, record)
    if filesystem.get_file_info(f"{folder}/{CHECKPOINTS}").type == fs.FileType.Directory:
        filesystem.delete_dir(f"{folder}/{CHECKPOINTS}")
    return record


def _with_absolute_locations(job: AutoencoderJob) -> AutoencoderJob:
    return replace(
        job,
        images=storage.absolute(job.images),
        held_out_images=storage.absolute(job.held_out_images),
        output=storage.output_location(job.output, "--output").rstrip("/"),
    )


def _with_workers(job: AutoencoderJob, images: ImageSource) -> AutoencoderJob:
    """Replaces the defaults of device and number of workers by what the cluster has. Raises InputError for too many."""
    use_gpu = choose_gpus(job.device, job.num_workers or 1)
    num_workers = job.num_workers or (max(1, num_gpus()) if use_gpu else 1)
    if job.batch_size % num_workers:
        raise InputError(
            f"batch_size must be a multiple of the number of workers {num_workers}, but got {job.batch_size}; change "
            f"--batch-size or --num-workers"
        )
    if not worker_slices(len(images[2]), num_workers - 1, num_workers):
        raise InputError(
            f"{job.images} has {len(images[2])} images, too few for {num_workers} workers; reduce --num-workers"
        )
    return replace(job, device="gpu" if use_gpu else "cpu", num_workers=num_workers)


def _parameters(job: AutoencoderJob, images: ImageSource, held_out: ImageSource) -> dict[str, object]:
    """The MLflow run's parameters."""
    return {
        **configuration(job),
        "images": storage.redact(job.images),
        "held_out_images": storage.redact(job.held_out_images),
        "num_images": len(images[2]),
        "images_sha256": images[1].sha256,
        "held_out_sha256": held_out[1].sha256,
        "num_workers": job.workers,
        "device": job.device,
    }


def _run_workers(job: AutoencoderJob, images: ImageSource, held_out: ImageSource, run: Run) -> Result:
    """Trains, or continues from the last checkpoint. Raises RunError if training fails, InputError for invalid input."""
    filesystem, output = storage.open_storage(job.output)
    task = WorkerTask(
        job=job,
        tracking_uri=run.tracking_uri,
        run_id=run.run_id,
        images=ray.put(images),
        held_out=ray.put(held_out),
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(num_workers=job.workers, use_gpu=job.device == "gpu"),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=output,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=job.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        logger.error("training failed", exc_info=error)
        raise _as_command_error(error) from error
    except SystemExit as error:  # Ray ends the driver so on Ctrl-C
        raise RunError(
            f"interrupted; the same command resumes from the last checkpoint, if there is one (every "
            f"{job.checkpoint_interval_steps} steps)"
        ) from error
    assert isinstance(result.return_value, Result)
    return result.return_value


def _as_command_error(error: TrainingFailedError) -> InputError | RunError:
    """Converts a training failure into an error for the command line."""
    cause = first_cause(error).error
    if isinstance(cause, (InputError, RunError)):
        return type(cause)(str(cause))
    first_line = (str(cause).strip().splitlines() or [""])[0]
    return RunError(
        f"training failed: {type(cause).__name__}: {first_line}; the same command resumes from the last checkpoint"
    )
