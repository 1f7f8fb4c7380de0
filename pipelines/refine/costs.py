"""Costs of a refinement, before it starts: one image's step is run on the CPU, and its FLOPs and memory are counted."""

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meanflow_core.refinement import draw_batch
from meanflow_core.training import num_passes
from pipelines.errors import InputError
from pipelines.plan.hardware import Cluster
from pipelines.refine.inputs import Generator, Metric
from pipelines.refine.job import RefineJob

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
# The moments, the batch's, the blended ones, their product and its eigenvectors, the root and the gradient.
MATRICES_PER_METRIC = 8


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of one image in a step."""

    forward_flops: int
    """From noise to the features of the extractors that are trained on."""
    backward_flops: int
    saved_bytes: int
    """Tensors that backward needs, in float32."""


def image_cost(job: RefineJob, generator: Generator, metrics: list[Metric]) -> StepCost:
    """Counts the cost of one image, by running it on the CPU."""
    render = generator.renderer(job.config.num_inference_steps)
    network = generator.network.requires_grad_(True)
    if job.config.activation_checkpointing:
        network.enable_gradient_checkpointing()
    if job.config.decoder_checkpointing:
        generator.pipeline.vae.enable_gradient_checkpointing()
    batch = draw_batch(job.config, [1], 0, 0, 1, generator.pipeline.latent_shape)
    saved: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in _frozen(generator, metrics)}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            pixels = render.pixels(render.latents(network, batch))
            features = [metric.extractor.pooled(pixels) for metric in metrics if metric.weight is not None]
        forward = counter.get_total_flops()
        torch.autograd.backward(features, [torch.ones_like(value) for value in features])
        total = counter.get_total_flops()
    network.zero_grad(set_to_none=True)
    return StepCost(forward_flops=forward, backward_flops=total - forward, saved_bytes=sum(saved.values()))


def _frozen(generator: Generator, metrics: list[Metric]) -> list[torch.Tensor]:
    """All weights, which are not counted as activations."""
    extractors = [value for metric in metrics for value in vars(metric.extractor).values()]
    modules = [generator.network, generator.pipeline.vae, *extractors]
    modules = [module for module in modules if isinstance(module, torch.nn.Module)]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def describe(preset: str, job: RefineJob, generator: Generator, metrics: list[Metric]) -> str:
    """The configuration and its costs, as text."""
    config, cost = job.config, image_cost(job, generator, metrics)
    num_workers = job.num_workers or torch.cuda.device_count() or 1
    if config.global_batch_size < num_workers:
        raise InputError(
            f"global_batch_size {config.global_batch_size} must be at least the number of workers, {num_workers}"
        )
    passes = num_passes(config.global_batch_size, num_workers, job.samples_per_pass)
    share = -(-config.global_batch_size // num_workers)
    rows = -(-share // passes)
    # With several passes, every image is generated twice.
    flops = cost.forward_flops * (2 if passes > 1 else 1) + cost.backward_flops
    parameters = sum(value.numel() for value in generator.network.parameters())
    copies = 5 + len(config.ema_decays)  # with the gradient, its copy for the all-reduce, and Adam's two moments
    matrices = sum(
        MATRICES_PER_METRIC * FLOAT64_BYTES * len(metric.reference.moments.mean) ** 2
        for metric in metrics
        if metric.weight is not None
    )
    state = FLOAT32_BYTES * copies * parameters
    seconds = flops * share / (Cluster().sustained_teraflops(config.precision) * 1e12)
    lines = [f"preset {preset}", *(f"  {key} = {value}" for key, value in config.flat().items()), ""]
    lines += [
        f"generator     {parameters:,} parameters, {generator.pipeline.image_size} pixels, from {job.model}",
        *(
            f"{'held out' if metric.weight is None else 'trained on':13s} {metric.label}, "
            f"{len(metric.reference.moments.mean):,} features"
            for metric in metrics
        ),
        f"an image      {cost.forward_flops / 1e9:,.2f} GFLOPs forward, {cost.backward_flops / 1e9:,.2f} GFLOPs backward",
        f"a step        {config.global_batch_size:,} images on {num_workers} workers, {passes} "
        f"{'pass' if passes == 1 else 'passes'} of {rows:,}: {flops * config.global_batch_size / 1e12:,.2f} TFLOPs",
        f"              {seconds:.2g} s on {num_workers} H100, at an assumed rate",
        f"memory        {state / 1e9:,.2f} GB of parameters, gradient, optimizer and averages",
        f"              {matrices / 1e9:,.2f} GB of moments in float64",
        f"              {cost.saved_bytes * rows / 1e9:,.2f} GB of activations in a pass "
        f"({cost.saved_bytes / 1e6:,.1f} MB an image in float32; half in bfloat16)",
        f"the run       {config.num_steps:,} steps, of which {config.fill_steps:,} fill the moments "
        f"({config.fill_steps * config.global_batch_size:,} images): {seconds * config.num_steps / 3600:,.2g} h on H100",
    ]
    return "\n".join(lines)
