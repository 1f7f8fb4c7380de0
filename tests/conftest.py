"""Shared fixtures: small networks and pipelines, the shipped demo autoencoder, demo images on disk, an MLflow database."""

import os
import signal
from pathlib import Path

import pytest

# Set before Ray is imported: no token file in the home folder, no telemetry, fast health checks.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)

import mlflow
import torch

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.config import SamplingConfig
from meanflow_core.generator import build_pipeline
from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.improved_dit import ImprovedMeanFlowDiT
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.pixels import PixelAutoencoder
from pipelines.demo import images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER

SMALL = {"sample_size": 8, "in_channels": 4, "num_classes": 10, "hidden_size": 48, "num_heads": 3}


@pytest.fixture(autouse=True, scope="session")
def _enable_interrupts():
    # Shells start background jobs with SIGINT ignored. The processes that tests interrupt would inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _reset_tracking_uri():
    """Removes the tracking URI that mlflow.set_tracking_uri writes to the environment, before and after each test."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    mlflow.set_tracking_uri(None)
    # Not with monkeypatch: it would restore a value that a module's fixture has set.
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def perturbed(network):
    """Adds noise to every parameter of a network, in place, so that no zero-initialised layer hides an error."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture
def network() -> MeanFlowDiT:
    """A tiny perturbed DiT on 4x8x8 latents."""
    torch.manual_seed(0)
    return perturbed(MeanFlowDiT(**SMALL, depth=2))


@pytest.fixture
def imf_network() -> ImprovedMeanFlowDiT:
    """A tiny perturbed network of improved MeanFlow on 4x8x8 latents."""
    torch.manual_seed(0)
    return perturbed(ImprovedMeanFlowDiT(**SMALL, depth=3, aux_head_depth=1))


@pytest.fixture(scope="module")
def one_thread():
    """Limits torch to one thread: small networks gain nothing from a second one, and it changes the rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory) -> str:
    """An MLflow database that all tests share, because creating one takes seconds. Choose names that no other test uses."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="session")
def vae():
    """The shipped demo autoencoder."""
    return load_autoencoder(str(SHIPPED_AUTOENCODER))


@pytest.fixture
def pipeline(network, vae) -> MeanFlowPipeline:
    """A MeanFlow pipeline."""
    return build_pipeline(network.eval(), vae, images.CLASS_NAMES)


@pytest.fixture
def imf_pipeline(imf_network, vae) -> MeanFlowPipeline:
    """An improved MeanFlow pipeline, with guidance by default."""
    sampling = SamplingConfig(guidance_scale=4.0, guidance_interval_start=0.2, guidance_interval_end=0.7)
    return build_pipeline(imf_network.eval().for_sampling(), vae, images.CLASS_NAMES, sampling=sampling)


@pytest.fixture
def grey_pipeline(imf_network) -> MeanFlowPipeline:
    """A generator of grey images, 16x16, in pixels."""
    return build_pipeline(imf_network.eval().for_sampling(), PixelAutoencoder(4, 2), images.CLASS_NAMES)


@pytest.fixture
def flow_pipeline(network, vae) -> MeanFlowPipeline:
    """A flow matching pipeline."""
    return build_pipeline(network.eval(), vae, images.CLASS_NAMES, prediction="velocity")


@pytest.fixture(scope="session")
def image_root(tmp_path_factory) -> Path:
    """60 training and 40 held-out demo images as JPEG in ImageNet's layout."""
    root = tmp_path_factory.mktemp("images")
    images.write_folder(root, num_train=60, num_val=40, num_processes=1)
    return root
