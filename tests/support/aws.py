"""Parses the AWS CLI commands in the documentation, using botocore's service models."""

import json
import shlex
from dataclasses import dataclass
from typing import Any

import botocore.session
from botocore import xform_name
from botocore.model import ListShape, Shape, StructureShape
from botocore.validate import ParamValidator

# {option that every command accepts: its choices}. These options are not part of the request.
GLOBAL_OPTIONS = {"query": None, "output": ("text", "json", "table"), "region": None}


@dataclass(frozen=True)
class Call:
    """One request to AWS."""

    service: str
    operation: str
    parameters: dict[str, Any]
    query: str | None


def parse_aws(words: list[str]) -> Call | None:
    """The request that `aws WORDS` sends; None for `aws s3`, which sends several.

    Raises ValueError for an unknown command or option.
    """
    service, operation, *rest = words
    if service == "s3":
        if operation not in ("cp", "sync") or len(rest) != 2 or not any(path.startswith("s3://") for path in rest):
            raise ValueError(
                f"must be aws s3 cp or sync with two paths, at least one in S3, but got aws {shlex.join(words)}"
            )
        return None
    service = "s3" if service == "s3api" else service
    if (service, operation) == ("ecr", "get-login-password"):  # the CLI implements it with this request
        operation = "get-authorization-token"
    model = botocore.session.get_session().get_service_model(service)
    operations = {xform_name(name, "-"): name for name in model.operation_names}
    if operation not in operations:
        raise ValueError(f"aws {service} has no {operation}")
    shape = model.operation_model(operations[operation]).input_shape
    members = {xform_name(name, "-"): name for name in (shape.members if shape else {})}
    given: dict[str, Any] = {}
    global_options: dict[str, str] = {}
    while rest:
        option = rest.pop(0).removeprefix("--")
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if option in GLOBAL_OPTIONS:
            [global_options[option]] = values
            if GLOBAL_OPTIONS[option] is not None and global_options[option] not in GLOBAL_OPTIONS[option]:
                raise ValueError(
                    f"--{option} must be one of {GLOBAL_OPTIONS[option]}, but got {global_options[option]}"
                )
        elif option in members:
            name = members[option]
            given[name] = _value(shape.members[name], values)
        else:
            raise ValueError(f"aws {service} {operation} has no --{option}")
    report = ParamValidator().validate(given, shape)
    if report.has_errors():
        raise ValueError(report.generate_report())
    return Call(service, operations[operation], given, global_options.get("query"))


def _value(shape: Shape, words: list[str]) -> Any:
    if shape.type_name == "boolean":
        if words:
            raise ValueError(f"a flag takes no value, but got {words}")
        return True
    if isinstance(shape, ListShape):
        if len(words) == 1 and words[0].startswith("["):
            return json.loads(words[0])
        return [_value(shape.member, [word]) for word in words]
    [word] = words
    if isinstance(shape, StructureShape):
        return json.loads(word) if word.startswith("{") else _shorthand(shape, word)
    if shape.type_name in ("integer", "long"):
        return int(word)
    return float(word) if shape.type_name in ("double", "float") else word


def _shorthand(shape: StructureShape, word: str) -> dict[str, Any]:
    """Parses the CLI's shorthand syntax, such as Name=a,Values=b."""
    values = {}
    for name, text in (part.split("=", 1) for part in word.split(",")):
        if name not in shape.members:
            raise ValueError(f"{shape.name} has no {name}")
        values[name] = [text] if isinstance(shape.members[name], ListShape) else text
    return values


def words_of(line: str, variables: dict[str, str]) -> tuple[str | None, list[str]]:
    """Splits `NAME=$(aws ...)` or `aws ...` into (NAME or None, words), after substituting `variables`."""
    name = None
    if line.endswith(")") and "=$(" in line.split(" ")[0]:
        name, line = line[:-1].split("=$(", 1)
    for variable, value in variables.items():
        line = line.replace(f"${variable}", value)
    return name, shlex.split(line)
