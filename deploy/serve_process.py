"""The process of `meanflow serve`: a local Ray cluster with the application of a Serve config, until SIGINT or SIGTERM.

The console gets a few lines. The output of Ray and Serve goes to files in the session's folder of logs.
"""

import contextlib
import os
import re
import sys
import time
import traceback
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
REPORT_SECONDS = 30.0
FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)

Say = Callable[[str], None]
"""Prints a line to the console."""


class DeploymentError(Exception):
    """The application did not start. The message is the reason."""


def wait_until_running(application: str, say: Say) -> None:
    """Waits until Serve has started the application. Raises DeploymentError with Serve's reason."""
    reported = time.monotonic()
    while True:
        found = serve.status().applications.get(application)
        if found is not None and found.status == ApplicationStatus.RUNNING:
            return
        messages = [] if found is None else [deployment.message for deployment in found.deployments.values()]
        if found is not None and found.status in FAILED:
            raise DeploymentError(reason("\n".join([*messages, found.message])))
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            say(" ".join(["still starting.", *filter(None, messages)]))
        time.sleep(POLL_SECONDS)


def reason(message: str) -> str:
    """The last exception in a text with tracebacks, or else its last line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (exceptions or lines or ["Serve gave no reason"])[-1]


def wait_until_ready(url: str) -> None:
    """Waits until the endpoint answers through HAProxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy is for other machines
    while True:
        with contextlib.suppress(OSError), opener.open(f"{url}/readyz", timeout=5):
            return
        time.sleep(POLL_SECONDS)


def start(config: dict[str, Any], say: Say) -> str:
    """Starts Ray and Serve and deploys the config's application. Returns its address once it answers.

    Standard output and error go to a file. Raises DeploymentError.
    """
    options = config["http_options"]
    [application] = config["applications"]
    say(f"starting Ray and {application['args']['model']} on this machine; this takes about half a minute")
    context = ray.init(address="local", namespace="serve", log_to_driver=False, logging_level="ERROR")
    logs = Path(context.address_info["session_dir"], "logs")
    say(f"logs: {logs}/serve; Ray's dashboard: http://{context.dashboard_url}")
    with open(logs / "meanflow-serve.log", "ab") as log:
        for descriptor in (1, 2):  # Ray's C++ code writes to these, too
            os.dup2(log.fileno(), descriptor)
    serve.start(
        proxy_location=config["proxy_location"], http_options=options, logging_config=LoggingConfig(log_level="INFO")
    )
    deploy_config(config)
    wait_until_running(application["name"], say)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options["host"], options["host"])
    url = f"http://{host}:{options['port']}"
    wait_until_ready(url)
    return url


def main() -> None:
    """Serves the config file of the command line until a signal. Exits with 1 if the application did not start."""
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    console = os.fdopen(os.dup(1), "w", buffering=1)

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            print(line, file=console)

    started, code = time.monotonic(), 0
    try:
        url = start(config, say)
        say(f"ready after {time.monotonic() - started:.0f} s: {url} (a page), {url}/docs (the API). Ctrl-C stops it.")
        while True:
            time.sleep(3600)
    except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into SystemExit
        say("stopping")
    except Exception as error:
        traceback.print_exc()  # into the log
        say(f"error: the endpoint did not start: {error}")
        code = 1
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        say("stopped")
    sys.exit(code)
