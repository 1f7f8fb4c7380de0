"""Fixtures for the deployment tests: generators on disk, and Kubernetes manifests."""

from pathlib import Path

import pytest

from tests.support.endpoint import write_generator
from tests.support.kubernetes import KUBERAY, render


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory) -> Path:
    """A tiny generator of 64x64 images in 10 classes with WordNet ids."""
    return write_generator(tmp_path_factory.mktemp("models") / "first")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory) -> Path:
    """A generator of the same size with different weights."""
    return write_generator(tmp_path_factory.mktemp("models") / "second", seed=1)


@pytest.fixture(scope="session")
def guided_folder(tmp_path_factory) -> Path:
    """A generator that supports guidance options."""
    return write_generator(tmp_path_factory.mktemp("models") / "guided", supports_guidance=True)


@pytest.fixture(scope="session", params=("base", "overlays/small", "overlays/eight-nodes"))
def overlay(request) -> list[dict]:
    """The rendered manifests of the base and of each overlay."""
    return render(KUBERAY / request.param)
