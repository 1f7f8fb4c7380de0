"""A Ray cluster of several nodes on this machine, each started by `ray start` in its own process group."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines.demo.serving import free_port
from tests.support.clusters import processes_of
from tests.support.waiting import wait_until

BIN = Path(sys.executable).parent


@dataclass
class Node:
    """A Ray node, started by `ray start --block`."""

    process: subprocess.Popen
    log: Path

    def kill(self) -> None:
        """Sends SIGKILL to all processes of the node, as if the machine were lost."""
        processes = [
            self.process.pid,
            *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True)),
        ]
        for pid in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class RealCluster:
    """A head node without CPUs, and its worker nodes."""

    folder: Path
    environment: dict[str, str]
    head_port: int
    dashboard_port: int
    nodes: list[Node] = field(default_factory=list)

    @property
    def dashboard(self) -> str:
        """The address to which jobs and Serve configs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def command(self, *words: str) -> list[str]:
        """The command, with the path of the program in this Python environment."""
        return [str(BIN / words[0]), *words[1:]]

    def run(self, *words: str, timeout: float = 300.0, cwd: Path | None = None) -> subprocess.CompletedProcess:
        """Runs a command in the cluster's environment and waits until it exits."""
        return subprocess.run(
            self.command(*words), env=self.environment, capture_output=True, text=True, timeout=timeout, cwd=cwd
        )

    def start_node(self, *options: str) -> None:
        """Starts a node; does not wait until it has joined."""
        log = self.folder / f"node{len(self.nodes)}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                self.command("ray", "start", "--block", "--node-ip-address", "127.0.0.1", "--object-store-memory",
                             str(150 * 2**20), "--dashboard-agent-listen-port", str(free_port(0)), *options),
                env=self.environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.nodes.append(Node(process, log))

    def num_alive_nodes(self) -> int:
        """The number of alive nodes, as reported by the head; -1 while it does not answer."""
        headers = {}
        if self.environment.get("RAY_AUTH_TOKEN"):
            headers["Authorization"] = f"Bearer {self.environment['RAY_AUTH_TOKEN']}"
        request = urllib.request.Request(f"{self.dashboard}/nodes?view=summary", headers=headers)
        with contextlib.suppress(OSError, KeyError, ValueError), urllib.request.urlopen(request, timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
            return sum(node["raylet"].get("state") == "ALIVE" for node in summary)
        return -1

    def wait_for_nodes(self, count: int) -> None:
        """Waits until this many nodes are alive."""

        def state() -> str:
            return f"{self.num_alive_nodes()} of {count} nodes; " + "".join(
                node.log.read_text()[-1500:] for node in self.nodes
            )

        wait_until(lambda: self.num_alive_nodes() == count, 90, state, interval_seconds=0.3)


@contextlib.contextmanager
def real_cluster(num_workers: int, cpus_each: int, token: str | None = None) -> Iterator[RealCluster]:
    """Yields a head and workers, and kills all their processes on exit. token: enables Ray's token authentication."""
    folder = Path(tempfile.mkdtemp(prefix="mfk-", dir="/tmp"))  # Unix sockets need short paths
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment |= {
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token" if token else "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        # Detects a lost node within seconds instead of half a minute.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    if token:
        environment["RAY_AUTH_TOKEN"] = token
    cluster = RealCluster(folder, environment, free_port(0), free_port(0))
    try:
        cluster.start_node(
            "--head", "--port", str(cluster.head_port), "--num-cpus", "0", "--dashboard-port", str(cluster.dashboard_port),
            "--ray-client-server-port", str(free_port(0)),
        )  # fmt: skip
        cluster.wait_for_nodes(1)
        for number in range(num_workers):  # one at a time: on two cores, starting several at once makes one time out
            cluster.start_node("--address", f"127.0.0.1:{cluster.head_port}", "--num-cpus", str(cpus_each))
            cluster.wait_for_nodes(2 + number)
        yield cluster
    finally:
        for node in cluster.nodes:
            if node.process.poll() is None:
                node.kill()
        for process in processes_of(str(folder)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)
