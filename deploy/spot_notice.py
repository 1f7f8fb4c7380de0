"""Waits for the cloud's notice that this machine will be preempted, and drains its Ray node.

    python -m deploy.spot_notice --cloud aws --address HEAD:6379

The cluster files start it on every machine that may be preempted. AWS gives two minutes' notice, Google Cloud 30 seconds.
A draining node gets no new work, and training writes a checkpoint at once (`pipelines/train/stopping.py`).
"""

import argparse
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from deploy.private_interfaces import gcs_client, preemption_reason

logger = logging.getLogger(__name__)

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
NOTICE_SECONDS = {"aws": 120, "gcp": 30}
POLL_SECONDS = 5.0  # recommended by AWS
TIMEOUT_SECONDS = 2.0


def _request(url: str, headers: dict[str, str], *, method: str = "GET") -> str | None:
    """The response's text; None for 404, which AWS returns while there is no notice."""
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def has_notice(cloud: str, metadata: str) -> bool:
    """Whether this machine will be preempted.

    Args:
        cloud: aws or gcp.
        metadata: Address of the metadata service.

    Raises:
        OSError: The metadata service does not answer.
    """
    if cloud == "gcp":
        headers = {"Metadata-Flavor": "Google"}
        return _request(f"{metadata}/computeMetadata/v1/instance/preempted", headers) == "TRUE"
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _request(f"{metadata}/latest/api/token", lifetime, method="PUT")
    headers = {"X-aws-ec2-metadata-token": token or ""}
    return _request(f"{metadata}/latest/meta-data/spot/instance-action", headers) is not None


def drain(address: str, node_ip: str, seconds: int) -> None:
    """Drains the Ray nodes of a machine.

    Args:
        address: Address of Ray's head node, HEAD:6379.
        node_ip: IP address of the machine.
        seconds: Time until the cloud stops the machine.

    Raises:
        RuntimeError: The cluster has no such node, or refuses to drain it.
    """
    client = gcs_client(address)
    nodes = [
        node.hex()
        for node, info in client.get_all_node_info().items()
        if info.node_manager_address == node_ip and info.state == info.ALIVE
    ]
    if not nodes:
        raise RuntimeError(f"the cluster at {address} has no node {node_ip}")
    deadline_ms = int((time.time() + seconds) * 1000)
    for node in nodes:
        is_accepted, reason = client.drain_node(
            node, preemption_reason(), "the cloud is preempting the machine", deadline_ms
        )
        if not is_accepted:
            raise RuntimeError(f"Ray refused to drain node {node}: {reason}")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m deploy.spot_notice", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cloud", choices=sorted(METADATA), required=True)
    parser.add_argument("--address", required=True, help="address of Ray's head node, HEAD:6379")
    parser.add_argument("--metadata", help="address of the metadata service (default: the cloud's)")
    return parser.parse_args(arguments)


def main() -> None:
    """Polls for the notice, drains the node when it arrives, and exits."""
    job = parse_arguments(sys.argv[1:])
    from ray.util import get_node_ip_address

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    is_preempted = False
    while True:
        try:
            is_preempted = is_preempted or has_notice(job.cloud, job.metadata or METADATA[job.cloud])
            if is_preempted:
                drain(job.address, get_node_ip_address(job.address), NOTICE_SECONDS[job.cloud])
                logger.info("the cloud is preempting this machine; its Ray node is draining")
                return
        except Exception as error:  # retried at the next poll
            logger.warning("%s: %s", type(error).__name__, error)
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
