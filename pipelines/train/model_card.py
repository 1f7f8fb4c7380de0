"""The model card (README.md) of a generator: description, training data, training and terms of use.

docs/reference/licences.md explains what a model card should say and what only its author can add.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meanflow_core.config import TrainingConfig
from meanflow_core.predictions import needs_many_steps
from pipelines import storage
from pipelines.latents.manifest import Manifest
from pipelines.latents.pixels import PIXELS
from pipelines.tracking.provenance import code_identity

IMAGENET_NUM_CLASSES = 1000

IMAGENET_TERMS = """\
The training images are from ImageNet. They were made available for non-commercial research and education; their owners
hold the rights. Check whether your use of these weights is permitted."""
OTHER_TERMS = """\
The permitted use of these weights depends on the rights to the training images. The training command does not know these
rights: describe them here."""


def is_imagenet(manifest: Manifest) -> bool:
    """Whether the classes are 1,000 WordNet ids, as in ImageNet."""
    return len(manifest.wnids) == IMAGENET_NUM_CLASSES and all(re.fullmatch(r"n\d{8}", wnid) for wnid in manifest.wnids)


def write_card(
    folder: Path,
    *,
    name: str,
    config: TrainingConfig,
    manifest: Manifest,
    init_from: str | None,
    provenance: Mapping[str, Any],
) -> None:
    """Writes README.md into a generator's folder. provenance: the content of its provenance.json."""
    code = code_identity()
    classes = ", ".join(manifest.class_names[:5]) + (", ..." if len(manifest.class_names) > 5 else "")
    licences = ["The initial network keeps its publisher's licence."] if init_from is not None else []
    if manifest.recipe.vae_id == PIXELS:
        autoencoder = "none: the generator works on pixels"
    else:
        autoencoder = f"{manifest.recipe.vae_id}, included in this folder; weights {manifest.recipe.vae_sha256}"
        licences.insert(0, "The autoencoder keeps its publisher's licence.")
    num_steps, steps = (50, "many steps") if needs_many_steps(config.loss.prediction) else (1, "one or a few steps")
    (folder / "README.md").write_text(f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [meanflow, one-step, class-conditional]
---
# {name}

Generates images of {len(manifest.class_names):,} classes ({classes}) at {manifest.recipe.image_size} pixels in {steps}.

```python
from pathlib import Path

from meanflow_core.generator import load_pipeline

pipeline = load_pipeline(Path("FOLDER"))
# class ids, seeds, steps -> uint8 (B, H, W, 3)
images = pipeline.images_from_seeds([0], [7], {num_steps})
```

- **Trained with** meanflow-ray {code["meanflow_ray"]} (commit {code["git_commit"]}), preset {provenance["preset"]},
  {provenance["step"]:,} steps of {config.global_batch_size} images; moving average with decay {
        provenance["ema_decay"]:g}
- **Training data** {manifest.num_samples:,} images from {storage.redact(manifest.source)}; latent dataset
  {provenance["data"]}, content {provenance["data_sha256"]}
- **Autoencoder** {autoencoder}
- **Initial network** {storage.redact(init_from) if init_from else "random"}
- **Evaluation** by `meanflow evaluate`: see MLflow run {provenance["run_id"]} and the tags of the registered version

## Terms

{IMAGENET_TERMS if is_imagenet(manifest) else OTHER_TERMS} {" ".join(licences)}

## Limitations

Do not use the samples as images of real people, as evidence, or for medical or other decisions. The classes and their
imbalance come from the training set. The network may have memorized training images: the evaluation's nearest-train ratio
measures how close its samples come to them. One-step samples have less detail than multi-step samples.
""")
