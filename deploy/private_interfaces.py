"""All interfaces of Ray that the endpoint uses although they are not public.

An upgrade may change any of them without notice. tests/test_private_interfaces.py checks each one and names those that are
broken. Ray Serve also looks for `__serve_build_asgi_app__` and `reconfigure(user_config, rank)` in deploy/app.py.
"""

from typing import Any


def http_host() -> str | None:
    """The host on which Ray Serve's proxies listen. None if Ray Serve does not run."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else str(client.http_config.host)


def deploy_config(config: dict[str, Any]) -> None:
    """Deploys the applications of a Serve config, as `serve deploy` does; does not wait for them. Serve must run here."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)


def gcs_client(address: str) -> Any:
    """The client of a cluster's control service, with `get_all_node_info` and `drain_node`. address: HEAD:6379."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled module

    return GcsClient(address=address)


def preemption_reason() -> int:
    """The reason to give to `drain_node` when the cloud preempts a machine."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    return int(DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION)
