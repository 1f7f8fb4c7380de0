"""An MLflow server on loopback that tests can stop and restart."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil

from pipelines.demo.serving import free_port


class Server:
    """A server on a free port of 127.0.0.1.

    Args:
        folder: Folder for the log and, by default, for the SQLite database and the artifacts.
        options: Options of `mlflow server` other than --host and --port. Default: SQLite and artifacts in the folder,
            one worker.
        environment: Environment variables added to those of the test process.
    """

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._folder, self.port = folder, free_port(0)
        self.uri = f"http://127.0.0.1:{self.port}"
        self._options = options or [
            f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts",
            "--workers=1",
        ]  # fmt: skip
        self._environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
        self._process: subprocess.Popen | None = None

    def launch(self) -> None:
        """Starts the server without waiting until it answers."""
        # Tests kill the processes that have RAY_TMPDIR set as their Ray cluster does; the server must survive.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *self._options, "--host=127.0.0.1", f"--port={self.port}"],
                cwd=self._folder, stdout=log, stderr=log, start_new_session=True, env={**environment, **self._environment},
            )  # fmt: skip

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        self.launch()
        self.wait()

    def wait(self) -> None:
        """Waits until the server answers."""
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            assert self._process.poll() is None, (self._folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> None:
        """Kills the server and its descendants."""
        processes: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it has already been stopped
            server = psutil.Process(self._process.pid)
            processes = [*server.children(recursive=True), server]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        self._process.wait()
