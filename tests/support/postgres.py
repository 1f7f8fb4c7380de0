"""A PostgreSQL server on loopback that tests can crash and restart."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from pipelines.demo.serving import free_port

# Debian's packages install the programs here, outside PATH.
_FOLDERS = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
_PATH = os.pathsep.join([*_FOLDERS, os.environ.get("PATH", os.defpath)])
NAME = "mlflow"  # user and database in deploy/mlflow/compose.yaml


def missing_programs() -> list[str]:
    """The required PostgreSQL programs that are not installed."""
    return [name for name in ("initdb", "postgres", "pg_isready", "createdb") if shutil.which(name, path=_PATH) is None]


class Postgres:
    """A password-protected server on a free port of 127.0.0.1, with all files in a temporary folder."""

    def __init__(self) -> None:
        self.port, self.password = free_port(0), secrets.token_hex(24)
        # Not in pytest's folders: the postgres user cannot access them, and Unix socket paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        self._data, self._log = self.folder / "data", self.folder / "log"
        self._process: subprocess.Popen | None = None
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        # PostgreSQL refuses to run as root; Debian's package creates this user.
        self._identity = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self._identity:
            for path in (self.folder, password_file):
                shutil.chown(path, "postgres", "postgres")
        self._run(
            "initdb", f"--pgdata={self._data}", f"--username={NAME}", f"--pwfile={password_file}",
            "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync",
        )  # fmt: skip
        password_file.unlink()
        self.start()
        self._run("createdb", "--host=127.0.0.1", f"--port={self.port}", f"--username={NAME}", NAME)

    def start(self) -> None:
        """Starts the server and waits until it accepts connections."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [shutil.which("postgres", path=_PATH), "-D", self._data, "-h", "127.0.0.1", "-p", str(self.port),
                 "-k", self.folder],
                cwd=self.folder, stdout=log, stderr=log, start_new_session=True, **self._identity,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while self._try("pg_isready", "--host=127.0.0.1", f"--port={self.port}").returncode:
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.1)

    def crash(self) -> None:
        """Stops the server without a clean shutdown, so that the next start recovers from the write-ahead log."""
        self._end(signal.SIGQUIT)

    def remove(self) -> None:
        """Stops the server and deletes its folder."""
        if self._process is not None and self._process.poll() is None:
            self._end(signal.SIGINT)
        shutil.rmtree(self.folder)

    def _end(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        self._process.wait(timeout=60)

    def _try(self, program: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [shutil.which(program, path=_PATH), *arguments], cwd=self.folder, capture_output=True, text=True, timeout=120,
            env={**os.environ, "PGPASSWORD": self.password}, **self._identity,
        )  # fmt: skip

    def _run(self, program: str, *arguments: str) -> None:
        result = self._try(program, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
