"""Hears that the cloud is about to take this machine away, and tells Ray, which the cloud does not.

    python -m deploy.spot_notice --cloud aws --address HEAD:6379

Runs on every machine that may be taken away (the cluster files start it) until there is a notice: two minutes before the
end on AWS, half a minute on Google Cloud. Ray then gives the machine no more work, and a training writes a checkpoint
at once (`pipelines/train/stopping.py`).
"""

import argparse
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # of compiled code
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

logger = logging.getLogger(__name__)

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
SECONDS_LEFT = {"aws": 120, "gcp": 30}
POLL_SECONDS = 5.0  # as AWS recommends
TIMEOUT_SECONDS = 2.0


def _ask(url: str, *, method: str = "GET", **headers: str) -> str | None:
    """The answer's text; None where there is no such thing, which is AWS's way to say that there is no notice."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=names), timeout=TIMEOUT_SECONDS
        ) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def is_told(cloud: str, metadata: str) -> bool:
    """Whether the machine will be taken away. Raises OSError where its metadata service does not answer.

    metadata: that service's address.
    """
    if cloud == "gcp":
        return _ask(f"{metadata}/computeMetadata/v1/instance/preempted", Metadata_Flavor="Google") == "TRUE"
    token = _ask(f"{metadata}/latest/api/token", method="PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    action = _ask(f"{metadata}/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token or "")
    return action is not None


def drain(address: str, node_ip: str, seconds: int) -> None:
    """Has Ray drain the node at node_ip, which has so many seconds left. Raises RuntimeError where Ray does not."""
    client = GcsClient(address=address)
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
            node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "the cloud takes the machine away", deadline_ms
        )
        if not is_accepted:
            raise RuntimeError(f"Ray does not drain node {node}: {reason}")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m deploy.spot_notice", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cloud", choices=sorted(METADATA), required=True)
    parser.add_argument("--address", required=True, help="Ray's head, HEAD:6379")
    parser.add_argument("--metadata", help="the metadata service, where it is not the cloud's own address")
    return parser.parse_args(arguments)


def main() -> None:
    """The command: waits for the notice, hands it on, and ends."""
    job = parse_arguments(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    told = False
    while True:
        try:
            told = told or is_told(job.cloud, job.metadata or METADATA[job.cloud])
            if told:
                here = ray.util.get_node_ip_address(job.address)  # as `ray start` tells it
                drain(job.address, here, SECONDS_LEFT[job.cloud])
                logger.info("the cloud takes this machine away; Ray knows")
                return
        except Exception as error:  # an answer that is lost: the next one may come
            logger.warning("%s: %s", type(error).__name__, error)
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
