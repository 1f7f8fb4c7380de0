"""Where MLflow is, which of its errors are temporary, and how to report them."""

import os
from pathlib import Path

import requests
from mlflow.exceptions import MlflowException

from pipelines import storage
from pipelines.errors import InputError

FINAL_ERROR_CODES = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
# HTTP statuses to retry in addition to 5xx: an expired token can be renewed; a conflict, timeout or rate limit passes.
RETRYABLE_STATUS = (401, 403, 408, 409, 425, 429)


def resolve_tracking_uri(storage_location: str, num_nodes: int) -> str:
    """MLFLOW_TRACKING_URI if set, otherwise a SQLite database in the local storage folder, by its absolute path.

    The path is absolute because a cluster job runs in a temporary copy of its working directory. MLflow's relative
    default would be lost with that copy. Raises InputError if several machines would have to share one database file.
    """
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return configured
    if not storage.is_local(storage_location) or num_nodes > 1:
        raise InputError(
            f"storage {storage_location} on {num_nodes} node(s) cannot hold a local MLflow database, so tracking needs an "
            f"MLflow server; set MLFLOW_TRACKING_URI, for example to http://mlflow.example:5000"
        )
    folder = Path(storage.absolute(storage_location))
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder}/mlflow.db"


def disable_http_retries() -> None:
    """Turns off MLflow's own HTTP retries and its progress bars for this process, unless the user configured them.

    MLflow retries 7 times by default, which takes 4 minutes and fills the log. Its retries can be configured only for a
    whole process.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def is_retryable(error: Exception) -> bool:
    """Whether the same request may succeed later: True for an unreachable or failing server, False for a refused value."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        if status == 404:  # other codes mean that the endpoint itself is missing, for example behind a proxy
            return error.error_code not in FINAL_ERROR_CODES
        return status in RETRYABLE_STATUS or (status >= 500 and status != 501)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in RETRYABLE_STATUS or error.response.status_code >= 500
    if isinstance(error, requests.RequestException):
        return True
    return not isinstance(error, (ValueError, TypeError, FileNotFoundError, IsADirectoryError, PermissionError))


def one_line(error: Exception) -> str:
    """An error as one line of at most 300 characters: its beginning and its end, because MLflow names the cause last."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-195:]}"


def explain_failure(tracking_uri: str, error: Exception) -> str:
    """A message for a retryable error, with its remedy."""
    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    if status == 401:
        message = (
            f"MLflow at {tracking_uri} requires a login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    elif status == 403:
        message = (
            f"MLflow at {tracking_uri} refuses this host name or this user; add the host to the server's --allowed-hosts, "
            f"or give the user the permission"
        )
    else:
        message = f"cannot reach MLflow at {tracking_uri}; start it, or set MLFLOW_TRACKING_URI"
    return f"{message} ({one_line(error)})"
