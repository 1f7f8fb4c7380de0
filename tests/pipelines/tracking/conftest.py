import pytest


@pytest.fixture(scope="session")
def database(tmp_path_factory) -> str:
    """Tracking URI of a local database, which takes seconds to create."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"
