"""Loads a generator onto the replica's device and warms it up."""

import time
from dataclasses import dataclass

import torch

from deploy.messages import ModelHashes, ModelInfo
from deploy.models import fetch_generator
from deploy.replica.class_index import ClassIndex, class_entries
from deploy.replica.engine import Engine
from deploy.settings import Arguments
from meanflow_core.autoencoder import load_preview_decoder, weight_hash
from meanflow_core.generator import load_pipeline


@dataclass(frozen=True, eq=False)  # compared by identity: two loads of one model never share a batch
class LoadedModel:
    """A model that is ready to serve."""

    model: str
    engine: Engine
    info: ModelInfo
    classes: ClassIndex


def load_model(model: str, arguments: Arguments) -> LoadedModel:
    """Loads a model and runs each batch size once. Raises ValueError or an error of torch if that fails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, source = fetch_generator(model, arguments.tracking_uri)
    pipeline = load_pipeline(folder, device)
    hashes = ModelHashes(transformer=weight_hash(pipeline.transformer), vae=weight_hash(pipeline.vae))
    preview_decoder = None if arguments.preview_vae is None else load_preview_decoder(arguments.preview_vae)
    if preview_decoder is not None and "scaling_factor" not in pipeline.vae.config:
        raise ValueError(
            "preview_vae requires a generator in an autoencoder's latents, but this one works on pixels; remove preview_vae"
        )
    engine = Engine(
        pipeline,
        precision=arguments.precision,
        preview_decoder=preview_decoder,
        compiled=arguments.compile,
        batch_sizes=arguments.batch_sizes,
        max_batch_size=arguments.max_batch_size,
    )
    engine.warm_up()
    config = pipeline.config
    entries = class_entries(pipeline.class_names, config.wnids or {}, pipeline.transformer.config.num_classes)
    info = ModelInfo(
        id=arguments.served_name or source.name,
        created=int(time.time()),
        image_size=pipeline.image_size,
        image_mode=pipeline.image_mode,
        num_classes=len(entries),
        supports_guidance=pipeline.supports_guidance,
        guidance_scale=config.guidance_scale,
        guidance_interval=[config.guidance_interval_start, config.guidance_interval_end],
        has_previews=preview_decoder is not None,
        precision=arguments.precision,
        prediction=config.prediction,
        source=source,
        hashes=hashes,
    )
    return LoadedModel(model, engine, info, ClassIndex(entries))
