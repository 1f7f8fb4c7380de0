"""The process that `meanflow serve` starts: a local Ray cluster with the application of a Serve config, until SIGINT.

    python -m deploy.serve_process serve.yaml

The console gets a few lines. The output of Ray and Serve goes to files in the session's folder of logs.
"""

import functools
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.schema import ApplicationStatus, LoggingConfig

from deploy.private_interfaces import deploy_config

POLL_SECONDS = 0.5


class DeploymentError(Exception):
    """The application did not start. The message is the reason."""


def wait_until_running(application: str) -> None:
    """Waits until Serve has started the application. Raises DeploymentError with Serve's reason."""
    while True:
        found = serve.status().applications.get(application)
        if found is not None and found.status == ApplicationStatus.RUNNING:
            return
        if found is not None and found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            causes = [deployment.message for deployment in found.deployments.values()]
            raise DeploymentError(_last_line("\n".join([found.message, *causes])))
        time.sleep(POLL_SECONDS)


def _last_line(message: str) -> str:
    """The last line with text: of a traceback, the exception."""
    return ([line.strip() for line in message.splitlines() if line.strip()] or ["no reason was given"])[-1]


def wait_until_ready(url: str) -> None:
    """Waits until the endpoint answers through the proxy."""
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_SECONDS)


def start(config: dict[str, Any], say: Callable[[str], None]) -> str:
    """Starts Ray and Serve and deploys the config's application. Returns its address once it answers.

    say: prints a line to the console. Standard output and error go to a file. Raises DeploymentError.
    """
    options = config["http_options"]
    [application] = config["applications"]
    say(f"starting Ray and {application['args']['model']} on this machine; this takes about half a minute")
    context = ray.init(address="local", namespace="serve", log_to_driver=False, logging_level="ERROR")
    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest").resolve() / "logs"
    say(f"logs: {logs}/serve; Ray's dashboard: http://{context.dashboard_url}")
    with open(logs / "meanflow-serve.log", "ab") as log:
        for descriptor in (1, 2):  # Ray's C++ code writes to these, too
            os.dup2(log.fileno(), descriptor)
    serve.start(
        proxy_location=config["proxy_location"], http_options=options, logging_config=LoggingConfig(log_level="INFO")
    )
    deploy_config(config)
    wait_until_running(application["name"])
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options["host"], options["host"])
    url = f"http://{host}:{options['port']}"
    wait_until_ready(url)
    return url


def main() -> int:
    """Serves until SIGINT. Returns the exit code: 0 after a signal, 1 if the application did not start."""
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    say = functools.partial(print, file=os.fdopen(os.dup(1), "w", buffering=1))
    started, code = time.monotonic(), 0
    try:
        url = start(config, say)
        say(f"ready after {time.monotonic() - started:.0f} s: {url} (a page), {url}/docs (the API). Ctrl-C stops it.")
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        say("stopping")
    except DeploymentError as error:
        say(f"error: the endpoint did not start: {error}")
        code = 1
    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()
    say("stopped")
    return code


if __name__ == "__main__":
    sys.exit(main())
