import pytest

from deploy.settings import Arguments
from tests.support.api import KEY_HASHES, stub_endpoint
from tests.support.endpoint import in_process


@pytest.fixture(scope="package")
def client(generator_folder):
    """A client of an endpoint with a real model and low limits."""
    arguments = Arguments(model=str(generator_folder), max_images=4, max_steps=8, max_body_bytes=2000)
    with in_process(arguments) as test_client:
        yield test_client


@pytest.fixture
def stub():
    """An open endpoint around a stub generator."""
    with stub_endpoint() as running:
        yield running


@pytest.fixture
def locked():
    """An endpoint with API keys around a stub generator, reachable from other machines."""
    with stub_endpoint(http_host="0.0.0.0", api_keys=KEY_HASHES) as running:
        yield running
