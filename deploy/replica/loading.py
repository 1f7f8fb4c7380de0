"""A model as a replica of the generator holds it: loaded, warm, and known by its classes' names."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deploy.messages import ClassEntry, ModelHashes, ModelInfo
from deploy.models import fetched_generator
from deploy.replica.engine import Engine
from deploy.settings import Arguments
from meanflow_core.autoencoder import load_preview_decoder, weight_hash
from meanflow_core.generator import load_pipeline


@dataclass(frozen=True, eq=False)  # one of a kind, and a key of the batcher
class Loaded:
    """A model that is ready to serve."""

    model: str
    engine: Engine
    card: ModelInfo
    classes: list[ClassEntry]
    names: dict[str, list[int]]
    """{name, synonym or wnid, in lower case: class ids}."""


def name_classes(class_names: dict[int, str], wnids: dict[str, str], num_classes: int) -> list[ClassEntry]:
    """An entry per class id; a class without a name is called by its id."""
    return [
        ClassEntry(id=label, name=class_names.get(label, str(label)), wnid=wnids.get(str(label)))
        for label in range(num_classes)
    ]


def index_names(classes: Sequence[ClassEntry]) -> dict[str, list[int]]:
    """{what may be typed, in lower case: the ids that it may mean}: whole names, each of their synonyms, wnids."""
    names: dict[str, list[int]] = {}
    for entry in classes:
        typed = {entry.name, *entry.name.split(",")} | ({entry.wnid} if entry.wnid else set())
        for word in {word.strip().lower() for word in typed}:
            names.setdefault(word, []).append(entry.id)
    return names


def find_class(wanted: int | str, classes: Sequence[ClassEntry], names: dict[str, list[int]]) -> int:
    """The id of a class given by id, "class:207", wnid or name.

    Raises ValueError for an unknown one, or a name that several share.
    """
    if isinstance(wanted, str) and wanted.strip().lower().startswith("class:"):
        digits = wanted.partition(":")[2].strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise ValueError(f'wanted "class:" and an id such as "class:0", but got {wanted!r}')
        wanted = int(digits)
    if isinstance(wanted, int):
        if not 0 <= wanted < len(classes):
            raise ValueError(f"class ids lie in [0, {len(classes) - 1}], but got {wanted}")
        return wanted
    found = names.get(wanted.strip().lower(), [])
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(f"class:{label} ({classes[label].name})" for label in found)
        raise ValueError(f"class name {wanted!r} means several classes: {which}; name the id")
    raise ValueError(f"unknown class {wanted!r}; GET /classes lists the {len(classes)} known ones")


def load_model(model: str, arguments: Arguments) -> Loaded:
    """Loads a model and warms it up. Raises ValueError (or what torch says) where it cannot serve."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with fetched_generator(model, arguments.tracking_uri) as (folder, source):
        pipeline = load_pipeline(folder, device)
        hashes = ModelHashes(transformer=weight_hash(pipeline.transformer), vae=weight_hash(pipeline.vae))
    tiny = None if arguments.preview_vae is None else load_preview_decoder(arguments.preview_vae)
    engine = Engine(
        pipeline,
        precision=arguments.precision,
        preview_decoder=tiny,
        compiled=arguments.compile,
        batch_sizes=arguments.batch_sizes,
        max_batch_size=arguments.max_batch_size,
    )
    engine.warm_up()
    config = pipeline.config
    classes = name_classes(pipeline.class_names, config.wnids or {}, pipeline.transformer.config.num_classes)
    card = ModelInfo(
        id=arguments.served_name or source.name,
        created=int(time.time()),
        image_size=pipeline.image_size,
        num_classes=len(classes),
        takes_guidance=pipeline.takes_guidance,
        guidance_scale=config.guidance_scale,
        guidance_interval=[config.guidance_interval_start, config.guidance_interval_end],
        has_previews=tiny is not None,
        precision=arguments.precision,
        prediction=config.prediction,
        source=source,
        hashes=hashes,
    )
    return Loaded(model, engine, card, classes, index_names(classes))
