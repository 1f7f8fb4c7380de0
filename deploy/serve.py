"""Serve a one-step generator on this machine, with Ray Serve's fast path.

    python -m deploy.serve runs/demo/generator                   # http://127.0.0.1:8000, with a page to try it
    curl 127.0.0.1:8000/generate -H 'content-type: application/json' -d '{"class": "star", "seed": 7}' -o star.png

The fast path is a set of environment variables, which must be set before any process of Ray starts:

- HAProxy, a compiled proxy, passes requests straight to the replicas (Ray's default is a proxy in Python);
- replicas run our code on the event loop that receives the requests, and write their logs in larger pieces.

A cluster of several machines gets them from its image or its start command: see docs/how-to/serve.md.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from deploy.settings import Arguments


@dataclass(kw_only=True)
class ServeJob:
    """Serve a generator."""

    arguments: Annotated[Arguments, tyro.conf.arg(name="")]
    port: int = 8000
    """HTTP port."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in, and requires api_keys or --auth none."""


def fast_path(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Environment variables of the fast path. Variables that `environment` sets keep their values.

    folder: for the files of HAProxy, whose default is one folder for all clusters of a machine.
    """
    stats_port, metrics_port = _free_ports()
    wanted = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # A replica that dies before it answers: HAProxy sends the request to another one, once.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        # HAProxy passes on the caller's own X-Forwarded-For, which uvicorn would believe.
        "FORWARDED_ALLOW_IPS": "",
        # A stopping replica keeps answering for this many seconds while proxies update their lists. Ray's default is 30.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
    }
    return {**wanted, **{name: environment[name] for name in wanted if name in environment}}


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return int(first.getsockname()[1]), int(second.getsockname()[1])


def serve_config(job: ServeJob) -> dict[str, Any]:
    """The config for `serve run`. Folders are absolute, because it runs in another folder."""
    arguments = job.arguments.model_dump(exclude_defaults=True)
    for name in ("model", "preview_vae"):
        if name in arguments and Path(arguments[name]).exists():
            arguments[name] = str(Path(arguments[name]).absolute())
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": job.host, "port": job.port, "keep_alive_timeout_s": 90},
        "applications": [
            {
                "name": "meanflow",
                "route_prefix": "/",
                "import_path": "deploy.app:build_app",
                "args": arguments,
            }
        ],
    }


def parse_arguments(words: list[str]) -> ServeJob:
    """The command line."""
    return tyro.cli(ServeJob, args=words, description=__doc__, prog="meanflow serve")


def main() -> None:
    """Serves until SIGINT or SIGTERM."""
    job = parse_arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="mfp-", dir="/tmp") as folder:  # paths of Unix sockets must be short
        config_file = Path(folder, "serve.yaml")
        config_file.write_text(yaml.safe_dump(serve_config(job)))
        # A cluster of its own: a running one lacks the variables. In a folder of its own, because Ray's processes look for
        # modules in the current folder first, and the user's may have a `deploy`.
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local", str(config_file)]
        environment = {**os.environ, **fast_path(Path(folder), dict(os.environ))}
        sys.exit(_run(command, environment, folder))


def _run(command: list[str], environment: dict[str, str], folder: str) -> int:
    """Runs `serve run`, and returns its exit code. It only stops HAProxy on SIGINT, so SIGTERM becomes SIGINT."""
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    )
    process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)

    def interrupt(*_: object) -> None:
        process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    return process.wait()


if __name__ == "__main__":
    main()
