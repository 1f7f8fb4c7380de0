"""What a stage's job is: a YAML file with the command, where its driver goes, and which variables it is handed."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
LOOKS_SECRET = re.compile(r"SECRET|PASSWORD|TOKEN|CREDENTIAL|(^|_)KEY", re.IGNORECASE)
PASSWORD_IN_ADDRESS = re.compile(r"://[^\s/:@$]*:[^\s/@$]+@")
ASSIGNMENT = re.compile(r"(?:^|[\s;&])(\w+)=[^\s$]")


class JobError(ValueError):
    """A job that cannot be; the message says what was wanted, what came and what to do."""


class JobFile(BaseModel):
    """One job, as `ray job submit` takes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    submission_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The job's name on the cluster; a number is put behind it when an earlier one has it."""
    entrypoint: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    """The command, run by a shell on the cluster: it may name variables of env_vars and env_from."""
    env_vars: dict[VariableName, str] = {}
    """Settings, with their values. Not for secrets."""
    env_from: list[VariableName] = []
    """Variables whose values come from the environment of whoever submits: addresses, secrets."""
    working_dir: str | None = None
    """Folder to send along, in place of the code of the image."""
    entrypoint_num_cpus: float | None = Field(default=None, ge=0)
    """CPUs for the driver. With one of these five, it goes where they are free; without, to the head."""
    entrypoint_num_gpus: float | None = Field(default=None, ge=0)
    entrypoint_memory: int | None = Field(default=None, ge=0)
    """Bytes."""
    entrypoint_resources: dict[str, float] = {}
    entrypoint_label_selector: dict[str, str] = {}
    """Labels that the driver's machine has."""

    @field_validator("env_vars")
    @classmethod
    def _check_no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if LOOKS_SECRET.search(name) or PASSWORD_IN_ADDRESS.search(text):
                raise ValueError(f"{name} looks like a secret; list its name under env_from, and export its value")
        return value

    @field_validator("entrypoint")
    @classmethod
    def _check_no_secrets_in_command(cls, value: str) -> str:
        names = [name for name in ASSIGNMENT.findall(value) if LOOKS_SECRET.search(name)]
        if names or PASSWORD_IN_ADDRESS.search(value):
            raise ValueError(
                f"entrypoint holds what looks like a secret ({names[0] if names else 'a password in an address'}); list a "
                f"variable for it under env_from, export its value, and name it in the command: $VARIABLE"
            )
        return value

    @model_validator(mode="after")
    def _check_said_once(self) -> "JobFile":
        both = sorted(set(self.env_vars) & set(self.env_from))
        if both:
            raise ValueError(f"{', '.join(both)} stands in env_vars and in env_from; one of them is wanted")
        return self

    def runtime_env(self, environment: Mapping[str, str], working_dir: str | None = None) -> dict[str, Any]:
        """Ray's runtime_env: the settings, and the listed variables out of `environment`.

        working_dir: in place of the file's. Raises JobError where a listed variable is not set, or the folder is missing.
        """
        missing = [name for name in self.env_from if not environment.get(name)]
        if missing:
            raise JobError(
                f"{', '.join(missing)} must be set: env_from lists {'them' if len(missing) > 1 else 'it'}; "
                f"export {missing[0]}=..., or take the name out of the file"
            )
        made: dict[str, Any] = {"env_vars": {**self.env_vars, **{name: environment[name] for name in self.env_from}}}
        folder = working_dir or self.working_dir
        if folder is not None:
            if "://" not in folder and not Path(folder).expanduser().is_dir():
                raise JobError(f"working_dir {folder} is no folder")
            made["working_dir"] = folder if "://" in folder else os.path.expanduser(folder)
        return made

    def placement(self) -> dict[str, Any]:
        """Where the driver goes, as `JobSubmissionClient.submit_job` takes it; nothing for the head."""
        names = ("num_cpus", "num_gpus", "memory", "resources", "label_selector")
        given = {f"entrypoint_{name}": getattr(self, f"entrypoint_{name}") for name in names}
        return {name: value for name, value in given.items() if value not in (None, {})}


class _EachKeyOnce(yaml.SafeLoader):
    """YAML, without the last of two values for a key winning in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice[0]} stands there twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_job_file(path: Path) -> JobFile:
    """Reads a job's file. Raises JobError where there is none, or for what it should not say."""
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise JobError(f"{path} must be text in UTF-8, but {error}") from error
    except OSError as error:
        beside = ", ".join(sorted(str(other) for other in path.parent.glob("*.yaml")))
        raise JobError(f"cannot read {path}: {error.strerror}" + (f"; there are {beside}" if beside else "")) from error
    try:
        content = yaml.load(text, Loader=_EachKeyOnce)
    except yaml.YAMLError as error:
        raise JobError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise JobError(f"{path} must hold keys and values, but holds {type(content).__name__}")
    try:
        return JobFile.model_validate(content)
    except ValidationError as error:
        raise JobError(f"{path}: {'; '.join(map(_in_words, error.errors()))}") from error


def _in_words(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}; known: {', '.join(JobFile.model_fields)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "string_type" and error["loc"][0] == "env_vars":
        return f"{where} must be text, but is {error['input']!r}: put it into quotes"
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {error['msg']}, but got {error['input']!r}"
