"""Parses documented commands with the argument parsers of their programs."""

import argparse
import json
import re
import shlex
import tomllib
from collections.abc import Callable

import tyro
import yaml
from huggingface_hub.cli.hf import app as hf_command_line
from mlflow.cli import cli as mlflow_command_line
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli as ray_command_line
from ray.serve.scripts import cli as serve_command_line

from deploy.api.schema import GenerateRequest, ImagesRequest
from deploy.serve import parse_arguments as parse_serve
from deploy.settings import Arguments
from pipelines.autoencoder.job import AutoencoderJob
from pipelines.before_after.job import BeforeAfterJob
from pipelines.check.job import CheckJob
from pipelines.convert.job import ConvertJob
from pipelines.demo.images import DrawImages
from pipelines.encode.job import EncodeJob
from pipelines.evaluate.job import EvaluateJob, ReferenceJob, SideBySideJob
from pipelines.judge.job import JudgeJob
from pipelines.latents.cache_command import CacheJob
from pipelines.main import MODULES as COMMANDS
from pipelines.plan.__main__ import parse_arguments as parse_plan
from pipelines.refine.job import parse_arguments as parse_refinement
from pipelines.train.job import parse_arguments as parse_training
from tests.support.aws import parse_aws
from tests.support.job_scripts import STAGES, parse_with_click, submission
from tests.support.readme import REPOSITORY, text_of


def _of_class(kind: type) -> Callable[[list[str]], object]:
    return lambda words: tyro.cli(kind, args=words)


def _one_argument(words: list[str]) -> object:
    parser = argparse.ArgumentParser()
    parser.add_argument("argument")
    return parser.parse_args(words)


MODULES: dict[str, Callable[[list[str]], object]] = {
    "pipelines.autoencoder": _of_class(AutoencoderJob),
    "pipelines.check": _of_class(CheckJob),
    "pipelines.encode": _of_class(EncodeJob),
    "pipelines.evaluate": _of_class(EvaluateJob),
    "pipelines.judge": _of_class(JudgeJob),
    "pipelines.convert": _of_class(ConvertJob),
    "pipelines.demo.images": _of_class(DrawImages),
    "pipelines.latent_cache": _of_class(CacheJob),
    "pipelines.side_by_side": _of_class(SideBySideJob),
    "pipelines.reference": _of_class(ReferenceJob),
    "pipelines.train": parse_training,
    "pipelines.refine": parse_refinement,
    "pipelines.before_after": _of_class(BeforeAfterJob),
    "pipelines.plan": parse_plan,
    "deploy.models": _one_argument,
    "deploy.serve": parse_serve,
    "deploy.keys": _one_argument,
}


def parse_module(module: str, words: list[str]) -> object:
    """The options of `python -m MODULE WORDS`; for pipelines.train, (preset, options)."""
    return MODULES[module](words)


def parse_job(stage: str) -> object:
    """The options of the job that deploy/jobs/STAGE.sh submits."""
    job = submission(stage)
    return parse_module(job.module, job.arguments)


def _meanflow(words: list[str]) -> object:
    return parse_module(COMMANDS[words[0]], words[1:])


def _python(words: list[str]) -> object:
    if words[0] == "-m":
        return parse_module(words[1], words[2:])
    assert all((REPOSITORY / word).is_file() for word in words), words
    return words


def _assert_files_exist(words: list[str]) -> None:
    for word in words:
        is_of_the_user = word == "endpoint.yaml"  # written by `meanflow serve --print-config`
        assert not word.endswith(".yaml") or is_of_the_user or (REPOSITORY / word).is_file(), word


def _ray(words: list[str]) -> object:
    options = parse_with_click(ray_command_line, words).params
    _assert_files_exist(words)
    if words[0] == "exec":
        return parse_command(options["cmd"])
    if words[:2] != ["job", "submit"]:
        return options
    if options["runtime_env"]:
        RuntimeEnv(**yaml.safe_load(text_of(options["runtime_env"])))
    if options["runtime_env_json"]:
        RuntimeEnv(**json.loads(options["runtime_env_json"]))
    assert isinstance(json.loads(options["entrypoint_label_selector"] or "{}"), dict)
    python, *rest = options["entrypoint"]
    assert python == "python"  # `meanflow` would start the installed version, not that of --working-dir
    return _python(rest)


def _serve(words: list[str]) -> None:
    options = parse_with_click(serve_command_line, words).params
    _assert_files_exist(words)
    if words[0] == "run":
        Arguments.model_validate(dict(word.split("=", 1) for word in options["arguments"]))


def _curl(words: list[str]) -> object:
    [address] = [word for word in words if re.match(r"(https?://)?[\w.-]+:\d+/", word)]
    path = "/" + address.split("?")[0].removeprefix("http://").split("/", 1)[1]
    if "-d" in words:
        schema = {"/generate": GenerateRequest, "/v1/images/generations": ImagesRequest}[path]
        return schema.model_validate(json.loads(words[words.index("-d") + 1]))
    assert path in ("/health", "/readyz", "/classes"), path
    return path


def _docker(words: list[str]) -> None:
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    image, endpoint = f"REGISTRY/meanflow-ray:{version}", f"meanflow-endpoint:{version}"
    if words[0] == "build":
        file = words[words.index("--file") + 1]
        tag = {"deploy/Dockerfile": image, "deploy/endpoint.Dockerfile": endpoint}[file]
        assert (REPOSITORY / file).is_file()
        assert (words[words.index("--tag") + 1], words[-1]) == (tag, ".")
    elif words[0] == "push":
        assert words[1:] == [image]
    elif words[0] == "login":
        assert words[1:] == ["--username", "AWS", "--password-stdin", image.split("/")[0]]
    else:
        assert words[0] == "run"
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for switch in ("--rm", "--detach", "--init"):
            parser.add_argument(switch, action="store_true")
        for option in ("--gpus", "--restart", "--name", "--publish", "--volume", "--shm-size", "--stop-timeout"):
            parser.add_argument(option)
        parser.add_argument("--env", action="append")
        parser.add_argument("image", choices=[image, endpoint, "postgres:17"])
        parser.add_argument("command", nargs=argparse.REMAINDER)
        given = parser.parse_args(words[1:])
        command = given.command
        if given.image == endpoint:
            parse_serve(command)
        elif command[:2] == ["python", "-c"]:
            compile(command[2], "-c", "exec")
        else:
            assert command in ([], ["pip", "freeze"])


def _make(words: list[str]) -> None:
    for target in words:
        assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE), target


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    if "--constraint" in words:
        assert (REPOSITORY / words[words.index("--constraint") + 1]).is_file()
    for word in words[1:]:
        if "==" in word:
            assert word in text_of("constraints.txt").splitlines()
        elif word.startswith(".["):
            extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
            assert word[2:-1] in extras


def _git(words: list[str]) -> None:
    assert words == ["clone", "REPOSITORY-URL", "meanflow-ray"]


def _cd(words: list[str]) -> None:
    assert words == ["meanflow-ray"]


def _ssh(words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-i", required=True)
    parser.add_argument("-N", action="store_true", required=True)
    parser.add_argument("-L", type=re.compile(r"\d+:localhost:\d+").fullmatch, required=True)
    parser.add_argument("host", type=re.compile(r"ubuntu@.+").fullmatch)
    assert None not in vars(parser.parse_args(words)).values()


def _export(words: list[str]) -> None:
    """Accepts the variables that Ray, MLflow, the AWS CLI, PostgreSQL, OpenTelemetry or a job script reads."""
    known = {
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH",
        "RAY_SERVE_TRACING_SAMPLING_RATIO",
        "RAY_API_SERVER_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_TMPDIR",
        "MLFLOW_TRACKING_URI",
        "AWS_DEFAULT_REGION",
        "PGPASSWORD",
        "STORAGE",
    }
    for word in words:
        name, value = word.split("=", 1)
        assert name in known, name
        assert value


def _openssl(words: list[str]) -> None:
    assert words == ["rand", "-hex", "24"]


def _source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]


# Shell variables set by earlier lines of the runbook, with example values.
IDS = {"$GROUP": "sg-0123456789abcdef0", "$SUBNET": "subnet-0123456789abcdef0", "$FILES": "fs-0123456789abcdef0"}

TOOLS: dict[str, Callable[[list[str]], object]] = {
    "python": _python,
    "meanflow": _meanflow,
    "ray": _ray,
    "serve": _serve,
    "hf": lambda words: parse_with_click(hf_command_line, words),
    "mlflow": lambda words: parse_with_click(mlflow_command_line, words),
    "curl": _curl,
    "docker": _docker,
    "make": _make,
    "pip": _pip,
    "git": _git,
    "cd": _cd,
    "aws": lambda words: parse_aws([IDS.get(word, word) for word in words]),
    "export": _export,
    "openssl": _openssl,
    "source": _source,
    "ssh": _ssh,
}


def parse_command(line: str) -> object:
    """Parses a shell command with its program's own argument parser.

    Raises:
        KeyError: The program is unknown.
        AssertionError, ValueError, SystemExit, ...: The program's parser rejects the line.
    """
    if exported := re.fullmatch(r"export (\w+)=\$\((.*)\)", line):
        _export([f"{exported[1]}=x"])
        return parse_command(exported[2])
    if assigned := re.fullmatch(r"[A-Z]+=\$\((.*)\)", line):
        return parse_command(assigned[1])
    words = shlex.split(line.removeprefix("exec "), comments=True)
    if not words:
        return None
    if "|" in words:
        parse_command(shlex.join(words[: words.index("|")]))
        words = words[words.index("|") + 1 :]
    if ">" in words:
        words = words[: words.index(">")]
    variables = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, value = words.pop(0).split("=", 1)
        assert name in ("SUBMISSION_ID", "RUNTIME_ENV"), name  # the variables that the scripts read
        variables[name] = value
    if script := re.fullmatch(rf"deploy/jobs/({'|'.join(STAGES)})\.sh", words[0]):
        job = submission(script[1], *words[1:], **variables)
        return parse_module(job.module, job.arguments)
    assert not variables, line
    return TOOLS[words[0]](words[1:])
