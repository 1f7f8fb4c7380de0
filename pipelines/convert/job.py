"""Options of a conversion."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ConvertJob:
    """Convert a published checkpoint to a generator."""

    source: str
    """Origin of the checkpoint: official-meanflow, official-imf, imf-torch, sit, repa or zhuyu-cs."""
    checkpoint: Path
    """Checkpoint file: .npz, .safetensors, .pt, .pth, .ckpt or .bin; any other suffix is read as Flax's msgpack."""
    output: str
    """Folder for the generator; must not exist."""
    vae: str
    """Autoencoder of the latents that the network was trained on: a hub id or a folder."""
    class_names: Path | None = None
    """Text file with one class name per line, in the order of the ids. A line may begin with a WordNet id, as in
    ImageNet's LOC_synset_mapping.txt. Default: "class 0", "class 1", ..."""
    use_ema: bool = True
    """If the file is a full training state, convert its moving average instead of the raw parameters."""
    sample_size: int | None = None
    """Side of the latents, if the file does not determine it. Default: 32."""
    num_heads: int | None = None
    """Number of attention heads, which no file contains. Default: that of the published network of this size."""
    portable: bool = False
    """Include the code, so that diffusers alone can open the generator (trust_remote_code=True)."""
