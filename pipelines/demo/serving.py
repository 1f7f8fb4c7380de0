"""Serves the demo's model, requests images from it, and stops the server."""

import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from pipelines.demo.processes import Processes
from pipelines.errors import InputError

# Ray's workers use ports 10002 to 19999. Most other Ray processes use ephemeral ports, on Linux from 32768.
FREE_PORTS = range(20_000, 32_768)


def free_port(port: int) -> int:
    """Returns `port` if it is free on 127.0.0.1; for 0, a free port that no other process is likely to take.

    Raises InputError if the port is taken.
    """
    candidates = random.SystemRandom().sample(FREE_PORTS, 100) if port == 0 else [port]
    for candidate in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
                return candidate
            except OSError as error:
                last_error = error
    raise InputError(
        f"port {candidates[-1]} on 127.0.0.1 is in use; choose another --port, or 0 for any"
    ) from last_error


def fetch(url: str, body: dict | None = None, timeout: float = 30.0) -> tuple[int, str, bytes]:
    """Sends an HTTP request. Returns status, content type and body, also for an error response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, response.headers.get_content_type(), response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


def wait_until_ready(
    url: str, server: subprocess.Popen, log: Path | None = None, timeout_seconds: float = 180.0
) -> None:
    """Waits for /readyz. Raises InputError if the server, whose output is in `log`, exits or is not ready in time."""
    where = "above" if log is None else f"in {log}"
    started = time.monotonic()
    while time.monotonic() - started < timeout_seconds:
        if server.poll() is not None:
            raise InputError(f"serve exited with code {server.returncode} before it was ready; its output is {where}")
        try:
            if fetch(f"{url}/readyz", timeout=5.0)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise InputError(f"{url}/readyz was not ready within {timeout_seconds:.0f} s; the server's output is {where}")


def serve_and_request(work: Path, port: int, processes: Processes, model: str, tracking_uri: str) -> str:
    """Serves the model, requests four images twice, writes the second response, and stops the server.

    work: the demo's folder, for served.png. Returns a summary. Raises InputError if anything fails.
    """
    port = free_port(port)
    options = ["--port", str(port), "--tracking-uri", tracking_uri]
    server = processes.start("serve", [sys.executable, "-m", "deploy.serve", model, *options])
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(url, server, processes.log("serve"))
    body = {"class": "star", "seed": 7, "num_images": 4}
    fetch(f"{url}/generate", body)  # the first request warms up
    started = time.perf_counter()
    status, content_type, content = fetch(f"{url}/generate", body)
    milliseconds = 1000.0 * (time.perf_counter() - started)
    if (status, content_type) != (200, "image/png"):
        raise InputError(f"POST /generate answered {status} {content_type}: {content[:300]!r}")
    (work / "served.png").write_bytes(content)
    server.send_signal(signal.SIGINT)
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired as error:
        raise InputError("serve did not stop within 60 s of an interrupt") from error
    processes.end_all()
    return f"4 stars over HTTP in {milliseconds:.0f} ms"
