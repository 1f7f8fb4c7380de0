"""Autoencoders: the one that a latent dataset carries in its vae/ folder, and those that users name."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError

if TYPE_CHECKING:
    from meanflow_core.autoencoder import Autoencoder


def open_autoencoder(dataset: str, dtype: torch.dtype = torch.float32) -> "Autoencoder":
    """Loads a dataset's autoencoder on the CPU. dataset: its path or URI."""
    return _load(f"{dataset.rstrip('/')}/vae", dtype)


def load_named_autoencoder(name: str) -> "Autoencoder":
    """Loads the autoencoder that a user named by --vae: a folder's path or URI, or a hub id. On the CPU, in float32.

    Raises InputError if it cannot be loaded.
    """
    from meanflow_core.autoencoder import load_autoencoder  # slow: it imports diffusers

    try:
        return _load(name) if "://" in name else load_autoencoder(name)
    except ValueError as error:
        raise InputError(str(error)) from error


def absolute_autoencoder(name: str) -> str:
    """Makes the path of an autoencoder's folder absolute. URIs, hub ids and other names stay as they are."""
    return storage.absolute(name) if Path(name).expanduser().exists() else name


def _load(location: str, dtype: torch.dtype = torch.float32) -> "Autoencoder":
    from meanflow_core.autoencoder import load_autoencoder  # slow: it imports diffusers

    filesystem, root = storage.require_folder(location, "autoencoder")
    with tempfile.TemporaryDirectory() as folder:
        fs.copy_files(root, folder, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        return load_autoencoder(folder, dtype)


def write_autoencoder(location: str, vae: "Autoencoder") -> None:
    """Writes a dataset's autoencoder."""
    filesystem, root = storage.open_storage(location)
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        for path in Path(folder).iterdir():
            storage.write_bytes(filesystem, f"{root}/vae/{path.name}", path.read_bytes())
