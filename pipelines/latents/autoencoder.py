"""The autoencoder that a latent dataset carries in its vae/ folder."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pyarrow import fs

from pipelines import storage

if TYPE_CHECKING:
    from meanflow_core.autoencoder import Autoencoder


def open_autoencoder(location: str, dtype: torch.dtype = torch.float32) -> "Autoencoder":
    """Loads a dataset's autoencoder on the CPU."""
    from meanflow_core.autoencoder import load_autoencoder  # slow: it imports diffusers

    filesystem, root = storage.open_storage(location)
    with tempfile.TemporaryDirectory() as folder:
        fs.copy_files(f"{root}/vae", folder, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        return load_autoencoder(folder, dtype)


def write_autoencoder(location: str, vae: "Autoencoder") -> None:
    """Writes a dataset's autoencoder."""
    filesystem, root = storage.open_storage(location)
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        for path in Path(folder).iterdir():
            storage.write_bytes(filesystem, f"{root}/vae/{path.name}", path.read_bytes())
