"""Fixtures shared by the tests: small networks, the shipped demo autoencoder, drawn images on disk."""

import os
import signal
from pathlib import Path

import pytest

# Before Ray is imported: no token file in the home folder, no telemetry, and quick health checks.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)

import mlflow
import torch

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.generator import build_pipeline
from meanflow_core.imf_transformer import ImprovedMeanFlowDiT
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.transformer import MeanFlowDiT
from pipelines.demo import images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER


@pytest.fixture(autouse=True, scope="session")
def _interrupts_work():
    # A background job begins with interrupts ignored, and the processes that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _untouched_tracking_address():
    """MLflow's set_tracking_uri writes the environment; no test may inherit another's address, nor hand it to a stage."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    mlflow.set_tracking_uri(None)
    # Not by monkeypatch, which would put back what a fixture of the module left there, for the modules to come.
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def perturbed(network):
    """The network with every parameter moved a little, so that no zero-initialised layer hides an error."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture
def network() -> MeanFlowDiT:
    """A tiny perturbed DiT on 4x8x8 latents."""
    torch.manual_seed(0)
    return perturbed(MeanFlowDiT(sample_size=8, in_channels=4, num_classes=10, hidden_size=48, depth=2, num_heads=3))


@pytest.fixture
def imf_network() -> ImprovedMeanFlowDiT:
    """A tiny perturbed network of improved MeanFlow on 4x8x8 latents."""
    torch.manual_seed(0)
    return perturbed(
        ImprovedMeanFlowDiT(
            sample_size=8, in_channels=4, num_classes=10, hidden_size=48, depth=3, num_heads=3, aux_head_depth=1
        )
    )


@pytest.fixture(scope="session")
def vae():
    """The demo's autoencoder, as shipped."""
    return load_autoencoder(str(SHIPPED_AUTOENCODER))


@pytest.fixture
def pipeline(network, vae) -> MeanFlowPipeline:
    """A pipeline of the tiny network and the demo's autoencoder."""
    return build_pipeline(network.eval(), vae, images.CLASS_NAMES)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory) -> Path:
    """60 training and 40 held-out demo images as JPEG in ImageNet's layout."""
    root = tmp_path_factory.mktemp("images")
    images.write_folder(root, num_train=60, num_val=40, num_processes=1)
    return root
