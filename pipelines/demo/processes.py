"""Runs commands and ends all their descendants, including daemons that outlive their parent."""

import contextlib
import ctypes
import logging
import shlex
import signal
import subprocess
import sys

import psutil

from pipelines.errors import InputError

logger = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Makes orphaned descendants children of this process (Linux only), so that it can find and end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Processes:
    """Runs commands with an environment and ends their descendants.

    Call `adopt_orphans` first: Ray's daemons outlive the process that started them, and only then become children of
    this process.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def start(self, command: list[str]) -> subprocess.Popen:
        """Starts a command in its own session, so that Ctrl-C in the terminal interrupts only this process."""
        logger.info("$ %s", shlex.join(command))
        return subprocess.Popen(command, env=self._environment, start_new_session=True)

    def run(self, command: list[str]) -> None:
        """Runs a command, waits for it, and ends its descendants. Raises InputError if it fails."""
        process = self.start(command)
        if process.wait() != 0:
            raise InputError(f"`{shlex.join(command)}` failed with exit code {process.returncode}; its output is above")
        self.end_all()

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
