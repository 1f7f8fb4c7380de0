"""Validates a job and loads its inputs before training starts. Nothing here writes to storage."""

from dataclasses import dataclass, replace

import torch

from meanflow_core.autoencoder import weight_hash
from meanflow_core.networks.building import build_network
from meanflow_core.optimizers import build_optimizers
from meanflow_core.portable import network_source
from meanflow_core.references import reference_of
from pipelines import storage
from pipelines.errors import InputError
from pipelines.latents.autoencoder import load_named_autoencoder
from pipelines.latents.cache import NO_CACHE
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.plan.cost import try_step
from pipelines.tracking.registry import REGISTRY_SCHEMES
from pipelines.train import validation
from pipelines.train.job import TrainJob
from pipelines.train.record import identity
from pipelines.train.warm_start import InitialNetwork, delay_guidance, load_initial_network
from pipelines.training import checkpoints
from pipelines.training.record import TrainingRecord, read_record, require_run_name, require_same_experiment


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Validated inputs of a run that is ready to start or resume."""

    job: TrainJob
    """The job with absolute locations and its final `guidance_after_steps`."""
    manifest: Manifest
    """Manifest of the latent dataset."""
    record: TrainingRecord | None
    """Record of the run to resume; None for a new run."""
    initial: InitialNetwork | None
    """Initial network of a new run with a warm start; None otherwise."""


def prepare(job: TrainJob) -> Preparation:
    """Resolves locations, reads manifest and record, and loads the initial network of a new run.

    Raises InputError for invalid input.
    """
    require_run_name(job.run_name)
    job = with_absolute_locations(job)
    manifest = read_manifest(job.data)
    _require_compatible_data(job, manifest)
    record = read_record(job)
    if record is None:
        initial = load_initial_network(job, manifest)
        if initial is not None and initial.is_flow_matching:
            job = replace(job, config=delay_guidance(job.config, manifest))
        return Preparation(job=job, manifest=manifest, record=None, initial=initial)
    if job.config.guidance_after_steps is None:  # the warm start may have set it
        recorded = record.identity["config"].get("guidance_after_steps")
        job = replace(job, config=replace(job.config, guidance_after_steps=recorded))
    require_same_experiment(job, job.config, identity(job, manifest), record)
    return Preparation(job=job, manifest=manifest, record=record, initial=None)


def reload_initial_network(job: TrainJob, manifest: Manifest, record: TrainingRecord) -> InitialNetwork | None:
    """Loads the initial network of a resumed run that has no checkpoint yet; None if it has one.

    Raises InputError if the initial network has changed.
    """
    if checkpoints.committed(*storage.open_storage(job.run_location)) is not None:
        return None
    initial = load_initial_network(job, manifest)
    if initial is not None and weight_hash(initial.network) != record.init_sha256:
        raise InputError(
            f"the weights of --init-from {job.init_from} have changed since run {job.run_name} was started; choose another "
            f"--run-name"
        )
    return initial


def with_absolute_locations(job: TrainJob) -> TrainJob:
    """Returns the job with absolute locations, because Ray's processes run in other working directories."""
    init_from = job.init_from
    if init_from is not None and not init_from.startswith(REGISTRY_SCHEMES):
        init_from = storage.absolute(init_from)
    return replace(
        job,
        data=storage.absolute(job.data),
        storage=storage.output_location(job.storage, "--storage").rstrip("/"),
        cache_dir=job.cache_dir if job.cache_dir == NO_CACHE else storage.absolute(job.cache_dir),
        validation_data=job.validation_data and storage.absolute(job.validation_data),
        init_from=init_from,
    )


def _require_compatible_data(job: TrainJob, manifest: Manifest) -> None:
    """Raises InputError if the datasets do not match each other, the autoencoder, the network or the workers."""
    if job.vae is not None:
        _require_autoencoder(job.vae, job.data, manifest)
    if job.validation_data is not None:
        validation.require_comparable(job.validation_data, manifest)
    try:
        with torch.device("meta"):
            network = build_network(job.config.network, **manifest.network_sizes)
            if job.config.activation_checkpointing:
                network.enable_gradient_checkpointing()
            build_optimizers(network, job.config.optimizer)
        if job.portable:
            network_source(reference_of(type(network)), network.config.get("module_class"))
        try_step(job.config, **manifest.network_sizes)
    except ValueError as error:
        raise InputError(str(error)) from error


def _require_autoencoder(vae: str, data: str, manifest: Manifest) -> None:
    sha256 = weight_hash(load_named_autoencoder(vae))
    if sha256 != manifest.recipe.vae_sha256:
        raise InputError(
            f"the latents in {data} were encoded with autoencoder {manifest.recipe.vae_id} (sha256 "
            f"{manifest.recipe.vae_sha256[:12]}), not with {vae} ({sha256[:12]}); encode again with it, or omit --vae"
        )
