"""Runs a comparison: trains and measures what is missing, then writes the report."""

import logging
from pathlib import Path

from meanflow_core.presets import find_preset
from pipelines import storage
from pipelines.compare.job import CompareJob
from pipelines.compare.plan import distinct_experiments, plan_entrants
from pipelines.latents.manifest import read_manifest
from pipelines.sweep.experiments import flops_of_step, train_experiments
from pipelines.sweep.parent_run import begin_or_resume
from pipelines.train.job import TrainJob

logger = logging.getLogger(__name__)


def compare(job: CompareJob) -> None:
    """Trains what is missing. Raises InputError for invalid input, RunError if a training fails."""
    output = Path(storage.output_location(str(job.output), "--output"))
    manifest = read_manifest(job.data)
    entrants = plan_entrants(job, lambda config: flops_of_step(config, manifest))
    common = TrainJob(
        data=job.data,
        storage=str(output / "runs"),
        run_name=output.name,
        model_name=output.name,
        config=find_preset(job.baseline)(),
        cpu_threads=1,
        cache_dir=job.cache_dir,
        keep_checkpoints=1,
        device=job.device,
    )
    parameters = {"data": storage.redact(job.data), "num_steps": job.num_steps, "baseline": job.baseline}
    run = begin_or_resume(str(output), common.experiment, parameters)
    train_experiments(distinct_experiments(entrants), common, run, job.max_concurrent)
