"""A real MLflow server on sqlite, which can go and come back."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from pipelines.demo.__main__ import free_port


class Server:
    """On a port of its own of 127.0.0.1; what it is told lies in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_port(0)
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        # Not a part of any Ray cluster, whose processes tests know by this variable.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
                 "--artifacts-destination", str(self._folder / "artifacts"), "--host", "127.0.0.1",
                 "--port", str(self.port), "--workers", "1"],
                cwd=self._folder, stdout=log, stderr=log, start_new_session=True,
                env={**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            assert self._process.poll() is None, (self._folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> None:
        """Kills it, and all that it started."""
        family = [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
        self._process.wait()
