"""Serve a one-step generator on this machine, with Ray Serve's fast path.

    meanflow serve docs/gallery/clothes                   # http://127.0.0.1:8000, with a page to try it
    curl 127.0.0.1:8000/generate -H 'content-type: application/json' -d '{"class": "dress", "seed": 7}' -o dress.png

The fast path is a set of environment variables, which must be set before any process of Ray starts:

- HAProxy, a compiled proxy, passes requests straight to the replicas (Ray's default is a proxy in Python);
- replicas run our code on the event loop that receives the requests.

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
from pydantic import ValidationError

from deploy.api.auth import is_open_to_others
from deploy.models import is_in_mlflow, resolve_model, tracking_address
from deploy.settings import Arguments

# The deployments of each topology in deploy/app.py. Their settings under user_config can change while they run.
DEPLOYMENTS = {"one": ("Endpoint",), "two": ("Api", "ImageGenerator")}


@dataclass(kw_only=True)
class ServeJob:
    """Serve a generator."""

    arguments: Annotated[Arguments, tyro.conf.arg(name="")]
    port: int = 8000
    """HTTP port."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in, and requires --api-keys or --auth none."""
    print_config: bool = False
    """Print the config for `serve deploy`, and do not start anything."""


def fast_path(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Environment variables of the fast path. Variables that `environment` sets keep their values.

    folder: for the files of HAProxy, whose default is one folder for all clusters of a machine.
    """
    stats_port, metrics_port = _free_ports()
    wanted = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Write each line of a replica's log at once. The line above collects 1,000, and loses them when the replica stops.
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
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


def _absolute(location: str) -> str:
    """A folder, or the file of an SQLite database, as an absolute path; anything else as it is."""
    if location.startswith("sqlite:///") and not location.startswith("sqlite:////"):
        return f"sqlite:///{Path(location.removeprefix('sqlite:///')).absolute()}"
    return str(Path(location).absolute()) if Path(location).exists() else location


def serve_config(job: ServeJob) -> dict[str, Any]:
    """The config of Ray Serve, whose processes run in another folder: locations are absolute."""
    arguments = job.arguments.model_dump(exclude_defaults=True)
    tracking_uri = tracking_address(job.arguments.tracking_uri)
    if is_in_mlflow(job.arguments.model) and tracking_uri:
        arguments["tracking_uri"] = tracking_uri  # also from the variable, which other machines may lack
    for name in ("model", "preview_vae", "tracking_uri"):
        if name in arguments:
            arguments[name] = _absolute(arguments[name])
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": job.host, "port": job.port, "keep_alive_timeout_s": 90},
        "applications": [
            {
                "name": "meanflow",
                "route_prefix": "/",
                "import_path": "deploy.app:build_app",
                "args": arguments,
                "deployments": [{"name": name, "user_config": {}} for name in DEPLOYMENTS[job.arguments.topology]],
            }
        ],
    }


def parse_arguments(words: list[str]) -> ServeJob:
    """The command line. Raises ValueError for invalid settings."""
    try:
        return tyro.cli(ServeJob, args=words, description=__doc__, prog="meanflow serve")
    except ValidationError as error:
        raise ValueError(_one_line(error)) from error


def _one_line(error: ValidationError) -> str:
    messages = []
    for detail in error.errors():
        option = ".".join(map(str, detail["loc"])).replace("_", "-")
        messages.append((f"--{option}: " if option else "") + detail["msg"].removeprefix("Value error, "))
    return "; ".join(messages)


def check(job: ServeJob) -> None:
    """Raises ValueError if the model is not there, the host needs keys, or the port is not free: before Ray starts."""
    if is_open_to_others(job.arguments, job.host):
        raise ValueError(
            f"--host {job.host} lets other machines in, and there are no API keys; give --api-keys NAME HASH "
            f"(`meanflow keys NAME` makes both), --auth none, or --host 127.0.0.1"
        )
    if not 0 < job.port < 65536:
        raise ValueError(f"--port must be between 1 and 65535, but got {job.port}")
    try:
        with socket.socket(socket.AF_INET6 if ":" in job.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((job.host, job.port))
    except OSError as error:
        raise ValueError(f"cannot listen on {job.host}, port {job.port}: {error}; choose another --port") from error
    resolve_model(job.arguments.model, tracking_address(job.arguments.tracking_uri))


def main() -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP. Exits with 2 for invalid options, and with 1 if it cannot start."""
    code = 2
    try:
        job = parse_arguments(sys.argv[1:])
        if job.print_config:
            print(yaml.safe_dump(serve_config(job), sort_keys=False), end="")
            return
        print(f"checking {job.arguments.model}", flush=True)
        code = 1  # what is missing now may be there later
        check(job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)
    with tempfile.TemporaryDirectory(prefix="mfp-", dir="/tmp") as folder:  # paths of Unix sockets must be short
        config_file = Path(folder, "serve.yaml")
        config_file.write_text(yaml.safe_dump(serve_config(job)))
        # A new cluster, because a running one lacks the variables; it starts in `folder`, because Ray's processes search the
        # current folder first for modules, and the user's may have a `deploy`.
        command = [sys.executable, "-c", "from deploy.serve_process import main; main()", str(config_file)]
        environment = {**os.environ, **fast_path(Path(folder), dict(os.environ)), "PYTHONPATH": _module_folders()}
        if "MLFLOW_TRACKING_URI" in environment:
            environment["MLFLOW_TRACKING_URI"] = _absolute(environment["MLFLOW_TRACKING_URI"])
        sys.exit(_run(command, environment, folder))


def _module_folders() -> str:
    """PYTHONPATH: this package, the user's entries, and last the current folder, for networks of the user's."""
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    folders = [str(Path(__file__).parents[1]), *given, os.getcwd()]
    return os.pathsep.join(dict.fromkeys(str(Path(folder).absolute()) for folder in folders))


def _run(command: list[str], environment: dict[str, str], folder: str) -> int:
    """Runs the command until SIGINT, SIGTERM or SIGHUP, and returns its exit code.

    It has a session of its own, so that Ctrl-C and a closed terminal reach Ray's processes and HAProxy in order. The first
    signal is passed on as SIGINT, and the others are ignored, because a second one would interrupt the shutdown.
    """
    received: list[int] = []
    process: subprocess.Popen | None = None

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        if process is not None and len(received) == 1:
            process.send_signal(signal.SIGINT)

    # Before the child starts, which would inherit that SIGINT is ignored, as in a background job of a script.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored by nohup
            signal.signal(number, interrupt)
    process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)
    if received:
        process.send_signal(signal.SIGINT)
    code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
