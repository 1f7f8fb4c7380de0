"""Ray clusters of two nodes on this machine, for tests that remove a node."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

import psutil
import pytest
from ray.cluster_utils import Cluster

# To detect a lost node within seconds instead of half a minute.
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


@contextlib.contextmanager
def cluster_of_two(num_cpus: int) -> Iterator[Cluster]:
    """A head and a second node, with the methods `remove_second` and `add_second`."""
    ray_folder = tempfile.mkdtemp(prefix="mfr-", dir="/tmp")  # Unix socket paths must be short
    node = {"num_cpus": num_cpus, "object_store_memory": 150 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", ray_folder)
        started = Cluster(
            initialize_head=True,
            head_node_args={**node, "include_dashboard": False, "_system_config": QUICK_HEALTH_CHECKS},
        )
        started.ray_folder = ray_folder

        def add_second() -> None:
            started.second = started.add_node(**node)

        def remove_second() -> None:
            started.remove_node(started.second, allow_graceful=False)

        started.add_second, started.remove_second = add_second, remove_second
        add_second()
        try:
            yield started
        finally:
            started.shutdown()
            for process in processes_of(ray_folder):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(ray_folder, ignore_errors=True)


def processes_of(ray_folder: str, word: str = "") -> list[psutil.Process]:
    """Processes with this RAY_TMPDIR in their environment and this word in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.environ().get("RAY_TMPDIR") != ray_folder:
                continue
            if any(word in part for part in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
