"""Runs commands with their output in log files, and ends all their descendants, including daemons of Ray."""

import contextlib
import ctypes
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipelines.errors import InputError

PROGRESS = re.compile(r"(?<!\w)[a-z][a-z ]* [\d,]+ of [\d,]+ \w+, .*(left|done)")  # lines of pipelines.progress
POLL_SECONDS = 0.2
SECONDS_BETWEEN_LINES = 60.0  # of progress, where it cannot be shown in place
LINES_OF_A_FAILURE = 25
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Makes orphaned descendants children of this process (Linux only), so that it can find and end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class ProgressLine:
    """Shows the latest progress in place on a terminal; otherwise as a line a minute."""

    def __init__(self) -> None:
        self._in_place = sys.stdout.isatty()
        self._shown_at = time.monotonic()

    def show(self, log: str) -> None:
        """Shows the last progress in a part of a log, if there is any."""
        all_found = list(PROGRESS.finditer(log))
        if not all_found:
            return
        found = all_found[-1]
        if self._in_place:
            print(f"\r  {found[0][: shutil.get_terminal_size().columns - 3]}\033[K", end="", flush=True)
        elif time.monotonic() - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._shown_at = time.monotonic()
            print(f"  {found[0]}", flush=True)

    def clear(self) -> None:
        """Removes the progress from a terminal."""
        if self._in_place:
            print("\r\033[K", end="", flush=True)


class Processes:
    """Runs commands with an environment, and ends their descendants.

    Call `adopt_orphans` first: Ray's daemons outlive the process that started them, and only then become children of
    this process.
    """

    def __init__(self, environment: dict[str, str], logs: Path) -> None:
        """logs: folder for the output of each command."""
        self._environment = environment
        self._logs = logs

    def log(self, name: str) -> Path:
        """The file with the output of the command `name`."""
        return self._logs / f"{name}.log"

    def start(self, name: str, command: list[str]) -> subprocess.Popen:
        """Starts a command in its own session, so that Ctrl-C in the terminal interrupts only this process."""
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("w") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            return subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, name: str, command: list[str]) -> None:
        """Runs a command, shows its progress, waits for it, and ends its descendants. Raises InputError if it fails."""
        process, progress = self.start(name, command), ProgressLine()
        try:
            with self.log(name).open(errors="replace") as log:
                while process.poll() is None:
                    progress.show(log.read())
                    time.sleep(POLL_SECONDS)
        finally:
            progress.clear()
        if process.returncode != 0:
            print("".join(f"  {line}\n" for line in self.last_lines(name)), file=sys.stderr)
            raise InputError(
                f"`{shlex.join(command)}` failed with exit code {process.returncode}; its last lines are above, and all "
                f"are in {self.log(name)}"
            )
        self.end_all()

    def last_lines(self, name: str) -> list[str]:
        """The end of a command's output."""
        return self.log(name).read_text(errors="replace").splitlines()[-LINES_OF_A_FAILURE:]

    def end_all(self, timeout_seconds: float = 5.0) -> None:
        """Terminates all descendants of this process, then kills those that do not end."""
        for signal_number, timeout in ((signal.SIGTERM, timeout_seconds), (signal.SIGKILL, 5.0)):
            remaining = psutil.Process().children(recursive=True)
            for process in remaining:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal_number)
            _, alive = psutil.wait_procs(remaining, timeout=timeout)
            if not alive and not psutil.Process().children(recursive=True):
                return
