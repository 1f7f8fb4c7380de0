"""The README.md that training lays in every generator: what it is, what it was made of and with, and under which terms.

What a card should say, and what only its author can add, stands in docs/licences.md.
"""

import re
from pathlib import Path

from meanflow_core.config import TrainingConfig
from pipelines import storage
from pipelines.latents.manifest import Manifest
from pipelines.tracking.provenance import code_identity

IMAGENET_CLASSES = 1000

IMAGENET_TERMS = """\
The training images are ImageNet's: they were made available for non-commercial research and education, and their rights
are their owners'. Whoever uses these weights for something else has to judge for themselves whether they may."""
OTHER_TERMS = """\
What may be done with these weights depends on the rights of the training images, which are not known here: add them."""


def is_imagenet(manifest: Manifest) -> bool:
    """Whether the classes are 1,000 WordNet ids, as ImageNet's are."""
    return len(manifest.wnids) == IMAGENET_CLASSES and all(re.fullmatch(r"n\d{8}", wnid) for wnid in manifest.wnids)


def write_card(
    folder: Path,
    *,
    name: str,
    preset: str,
    step: int,
    config: TrainingConfig,
    manifest: Manifest,
    data: str,
    init_from: str | None,
    run_id: str,
) -> None:
    """Writes README.md into a generator's folder. data: where the latent dataset lies; run_id: MLflow's."""
    code = code_identity()
    names = ", ".join(manifest.class_names[:5]) + (", ..." if len(manifest.class_names) > 5 else "")
    calls = "many network calls" if config.loss.is_flow_matching else "one network call, or several"
    (folder / "README.md").write_text(f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [meanflow, one-step, class-conditional]
---
# {name}

Images of {len(manifest.class_names):,} classes ({names}) at {manifest.recipe.image_size} pixels, in {calls}.

```python
from pathlib import Path

from meanflow_core.generator import load_pipeline

pipeline = load_pipeline(Path("FOLDER"))
images = pipeline.images_from_seeds([0], [7], {
        50 if config.loss.is_flow_matching else 1
    })  # class ids, seeds, network calls -> uint8 (B, H, W, 3)
```

- **Made with** meanflow-ray {code["meanflow_ray"]} (commit {code["git_commit"]}), preset {preset}, {step:,} steps of
  {config.global_batch_size} images; the moving average of decay {config.ema_decays[0]:g}
- **Trained on** {manifest.num_samples:,} images from {storage.shown(manifest.source)}; latent dataset {
        storage.shown(data)
    }, content {manifest.content_sha256}
- **Autoencoder** {manifest.recipe.vae_id}, contained in this folder; weights {manifest.recipe.vae_sha256}
- **Begun from** {storage.shown(init_from) if init_from else "nothing"}
- **Measured** by `python -m pipelines.evaluate`: see MLflow run {run_id} and the tags of the registered version

## Terms

{IMAGENET_TERMS if is_imagenet(manifest) else OTHER_TERMS} The autoencoder keeps its publisher's licence{
        "" if init_from is None else ", and so does what the training began from"
    }.

## Limits

Not for: images of real people, evidence, medical or other decisions. The classes and their skew are the training set's. The
network may have learnt images by heart: the evaluation's nearest-train ratio says how near its samples come to them. One
call trades detail for speed.
""")
