"""Submits, follows and stops the stages' jobs on a cluster, with Ray's own client.

    python -m deploy.jobs submit deploy/jobs/train.yaml --follow
    python -m deploy.jobs follow train-xl2
    python -m deploy.jobs stop train-xl2
    python -m deploy.jobs list

The cluster is where --address or RAY_API_SERVER_ADDRESS says. Exit code: 0 for a job that succeeded, 1 for one that
failed, 143 for one that was stopped; 2 for a command that cannot be.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from deploy.jobs.job_file import JobError, JobFile, read_job_file

ADDRESS = "RAY_API_SERVER_ADDRESS"
EXIT_CODES = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: 143}  # 128 + SIGTERM, as the stages' own
POLL_SECONDS = 1.0
LOGS_FOLLOW = ", last available logs"  # in a failed job's message, before the end of the log


class JobClient(Protocol):
    """What is used of `ray.job_submission.JobSubmissionClient`."""

    def submit_job(self, *, entrypoint: str, **options: Any) -> str: ...  # noqa: D102

    def list_jobs(self) -> list[Any]: ...  # noqa: D102

    def get_job_info(self, job_id: str) -> Any: ...  # noqa: D102

    def stop_job(self, job_id: str) -> bool: ...  # noqa: D102

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...  # noqa: D102


def free_id(client: JobClient, wanted: str) -> str:
    """`wanted`, or with the first number behind it that no earlier job of the cluster has.

    Raises JobError while one of them still runs: two drivers of one run would be in each other's way.
    """
    status_of = {job.submission_id: job.status for job in client.list_jobs() if job.submission_id}
    number, name = 1, wanted
    while name in status_of:
        if not status_of[name].is_terminal():
            raise JobError(
                f"{name} is {status_of[name].value.lower()} already; python -m deploy.jobs follow {name}, or stop it, or "
                f"give another --id"
            )
        number += 1
        name = f"{wanted}-{number}"
    return name


def find(client: JobClient, name: str) -> Any:
    """What the cluster knows of a job. Raises JobError where it knows none of this name."""
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        raise JobError(f"the cluster has no job {name}; python -m deploy.jobs list shows those that it has") from error


def submit(
    client: JobClient, job: JobFile, environment: Mapping[str, str], *, name: str, working_dir: str | None
) -> str:
    """Submits a job; its id. Raises JobError for a job that cannot be."""
    runtime_env = job.runtime_env(environment, working_dir)
    return client.submit_job(
        entrypoint=job.entrypoint,
        submission_id=free_id(client, name),
        runtime_env=runtime_env,
        **job.placement(),
    )


def follow(client: JobClient, name: str) -> int:
    """Prints a job's log until its end; its exit code. Raises JobError where the connection is lost before."""

    async def _print_log() -> None:
        async for lines in client.tail_job_logs(name):
            print(lines, end="", flush=True)

    find(client, name)  # a job that is not there is told as such, and not as a lost connection
    try:
        asyncio.run(_print_log())
        info = client.get_job_info(name)
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        raise JobError(
            f"lost the connection ({error}); the job goes on: python -m deploy.jobs follow {name}"
        ) from error
    if not info.status.is_terminal():
        raise JobError(f"the log ended, but {name} goes on: python -m deploy.jobs follow {name}")
    return _report(name, info)


def stop(client: JobClient, name: str, *, pause: Callable[[float], None] = time.sleep) -> int:
    """Asks a job to stop and waits for its end; 0, or 1 where it failed all the same."""
    info = find(client, name)
    if not info.status.is_terminal():
        client.stop_job(name)
        print(f"{name}: asked to stop; a training writes a checkpoint first", flush=True)
    while not info.status.is_terminal():
        pause(POLL_SECONDS)
        info = client.get_job_info(name)
    return 1 if _report(name, info) == 1 else 0


def _report(name: str, info: Any) -> int:
    reason = f": {info.message.split(LOGS_FOLLOW)[0]}" if info.status == JobStatus.FAILED and info.message else ""
    print(f"{name}: {info.status.value.lower()}{reason}")
    return EXIT_CODES[info.status]


def list_jobs(client: JobClient) -> None:
    """Prints the cluster's submitted jobs, the last one first."""
    jobs = sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: -(job.start_time or 0))
    width = max((len(job.submission_id) for job in jobs), default=0)
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.start_time or 0) / 1000))  # Ray's are milliseconds
        print(f"{job.submission_id:{width}}  {job.status.value:9}  {began}  {' '.join(job.entrypoint.split())}")
    if not jobs:
        print("no job was submitted yet")


def connect(address: str | None, environment: dict[str, str] | os._Environ) -> JobClient:
    """Ray's client for an address. Raises JobError where there is none, or nobody answers."""
    address = address or environment.get(ADDRESS)
    if not address:
        raise JobError(f"no address; give --address http://HEAD:8265, or export {ADDRESS}")
    if not address.startswith(("http://", "https://")):
        raise JobError(f"the address must be like http://HEAD:8265, the dashboard's, but got {address}")
    environment[ADDRESS] = address  # Ray prefers the variable to what it is told
    try:
        return JobSubmissionClient(address)
    except requests.JSONDecodeError as error:
        raise JobError(
            f"{address} answers, but not as Ray's dashboard does; its port is 8265 unless changed"
        ) from error


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.jobs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--address", help=f"of the dashboard, http://HEAD:8265; {ADDRESS} unless given")
    commands = parser.add_subparsers(dest="command", required=True)
    of_file = commands.add_parser("submit", parents=[shared], help="submit the job of a file")
    of_file.add_argument("file", type=Path)
    of_file.add_argument("--follow", action="store_true", help="print its log until its end")
    of_file.add_argument("--id", help="in place of the file's submission_id")
    of_file.add_argument("--working-dir", help="folder to send along, in place of the code of the image")
    for name, meaning in (("follow", "print a job's log until its end"), ("stop", "stop a job, and wait for its end")):
        commands.add_parser(name, parents=[shared], help=meaning).add_argument("id")
    commands.add_parser("list", parents=[shared], help="the cluster's jobs")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace, connect: Callable[[], JobClient], environment: Mapping[str, str]) -> int:
    """Does what the command line says; the exit code. Raises JobError for what cannot be."""
    if arguments.command == "submit":
        job = read_job_file(arguments.file)
        job.runtime_env(environment, arguments.working_dir)  # before anybody is asked
        client = connect()
        name = submit(
            client, job, environment, name=arguments.id or job.submission_id, working_dir=arguments.working_dir
        )
        print(f"{name}: submitted", flush=True)
        return follow(client, name) if arguments.follow else 0
    client = connect()
    if arguments.command == "list":
        list_jobs(client)
        return 0
    return follow(client, arguments.id) if arguments.command == "follow" else stop(client, arguments.id)


def _without_traceback(message: str) -> str:
    """A message, or where the cluster sent its traceback, what that ends with."""
    lines = [line for line in message.splitlines() if any(letter.isalpha() for letter in line)]
    return lines[-1] if "Traceback (most recent call last)" in message else message


def main() -> None:
    """The command."""
    arguments = parse_arguments(sys.argv[1:])
    try:
        raise SystemExit(run(arguments, lambda: connect(arguments.address, os.environ), os.environ))
    except (ConnectionError, requests.ConnectionError) as error:
        message = f"{error} Is the tunnel open (ray dashboard ray_cluster.yaml), and the address right?"
    except AuthenticationError as error:
        wanted = "another token than this" if "nvalid" in str(error) else "its token"
        message = (
            f"the cluster wants {wanted}: export RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token or in "
            f"RAY_AUTH_TOKEN"
        )
    except (JobError, RuntimeError, ValueError, OSError) as error:
        message = _without_traceback(str(error))
    except KeyboardInterrupt:
        print("interrupted; a job that was submitted goes on", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
