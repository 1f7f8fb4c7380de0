"""Tests the handling of preemption notices with a fake metadata service and a real Ray cluster."""

import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from ray._raylet import GcsClient

from deploy import spot_notice
from deploy.spot_notice import drain, has_notice
from tests.support.clusters import cluster_of_two
from tests.support.waiting import wait_until

TOKEN = "session-token"


class FakeMetadataService:
    """Fakes the metadata services of AWS and Google Cloud. `notice` sets whether the machine will be preempted."""

    def __init__(self):
        self.notice, self.status = False, 200
        service = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, status, text):
                self.send_response(service.status if service.status != 200 else status)
                self.end_headers()
                self.wfile.write(text.encode())

            def do_PUT(self):
                is_valid = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.answer(200 if is_valid else 400, TOKEN)

            def do_GET(self):
                if self.path == "/latest/meta-data/spot/instance-action":
                    if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
                        self.answer(401, "")
                    elif service.notice:
                        self.answer(200, '{"action": "terminate", "time": "2026-11-26T08:22:00Z"}')
                    else:
                        self.answer(404, "not found")
                elif self.path == "/computeMetadata/v1/instance/preempted":
                    allowed = self.headers["Metadata-Flavor"] == "Google"
                    self.answer(200 if allowed else 403, str(service.notice).upper())
                else:
                    self.answer(404, "")

            def log_message(self, *words):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def metadata():
    service = FakeMetadataService()
    yield service
    service.stop()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_notice_is_read_from_the_metadata_service(metadata, cloud):
    assert not has_notice(cloud, metadata.address)
    metadata.notice = True
    assert has_notice(cloud, metadata.address)
    metadata.status = 503  # an error is neither a notice nor its absence
    with pytest.raises(OSError, match="503"):
        has_notice(cloud, metadata.address)


@pytest.fixture
def watcher(metadata, monkeypatch):
    """A function that runs `python -m deploy.spot_notice` for a head's address in a thread."""
    monkeypatch.setattr(spot_notice, "POLL_SECONDS", 0.05)

    def start(address: str) -> threading.Thread:
        words = ["--cloud", "aws", "--address", address, "--metadata", metadata.address]
        monkeypatch.setattr(sys, "argv", ["spot_notice", *words])
        thread = threading.Thread(target=spot_notice.main, daemon=True)
        thread.start()
        return thread

    return start


def test_watcher_keeps_polling_after_errors_and_retries_the_drain_until_it_succeeds(
    metadata, watcher, monkeypatch, caplog
):
    drained = []

    def fake_drain(address, node_ip, seconds):
        drained.append((address, seconds))
        if len(drained) < 2:
            raise RuntimeError("the head is unreachable")

    monkeypatch.setattr(spot_notice, "drain", fake_drain)
    metadata.status = 503
    thread = watcher("127.0.0.1:6379")
    wait_until(lambda: caplog.text.count("503") >= 2)
    assert drained == []
    metadata.status, metadata.notice = 200, True
    thread.join(timeout=30)
    assert drained == [("127.0.0.1:6379", 120)] * 2
    assert "the head is unreachable" in caplog.text


@pytest.mark.soak
@pytest.mark.cluster
def test_notice_drains_the_nodes_of_the_machine(metadata, watcher):
    with cluster_of_two(num_cpus=1) as cluster:
        client = GcsClient(address=cluster.address)
        assert all(info.state == info.ALIVE for info in client.get_all_node_info().values())
        metadata.notice = True
        thread = watcher(cluster.address)
        thread.join(timeout=30)
        assert not thread.is_alive()
        # Both nodes are on this machine and idle, so Ray terminates them immediately.
        wait_until(lambda: all(info.state == info.DEAD for info in client.get_all_node_info().values()))
        deaths = [info.death_info for info in client.get_all_node_info().values()]
        assert [death.reason for death in deaths] == [deaths[0].AUTOSCALER_DRAIN_PREEMPTED] * 2
        with pytest.raises(RuntimeError, match=re.escape("has no node 192.0.2.1")):
            drain(cluster.address, "192.0.2.1", 30)
