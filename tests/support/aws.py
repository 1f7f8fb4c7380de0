"""AWS's command line, as far as the documents use it: by botocore's own description of the services."""

import json
import shlex
from dataclasses import dataclass
from typing import Any

import botocore.session
from botocore import xform_name
from botocore.model import ListShape, Shape, StructureShape
from botocore.validate import ParamValidator

SHOWN = {
    "query": None,
    "output": ("text", "json", "table"),
    "region": None,
}  # of every command: how its answer is shown


@dataclass(frozen=True)
class Call:
    """What a line would ask of AWS."""

    service: str
    operation: str
    parameters: dict[str, Any]
    query: str | None


def understand_aws(words: list[str]) -> Call | None:
    """The call of `aws WORDS`; None for `aws s3`, which makes many. Raises ValueError for one that AWS does not know."""
    service, operation, *rest = words
    if service == "s3":
        if operation not in ("cp", "sync") or len(rest) != 2 or not any(place.startswith("s3://") for place in rest):
            raise ValueError(f"aws s3 {operation} is not known, or wants two places, one of them in S3")
        return None
    service = "s3" if service == "s3api" else service
    if (service, operation) == ("ecr", "get-login-password"):  # the command line's own, made of this call
        operation = "get-authorization-token"
    model = botocore.session.get_session().get_service_model(service)
    operations = {xform_name(name, "-"): name for name in model.operation_names}
    if operation not in operations:
        raise ValueError(f"aws {service} has no {operation}")
    shape = model.operation_model(operations[operation]).input_shape
    members = {xform_name(name, "-"): name for name in (shape.members if shape else {})}
    given: dict[str, Any] = {}
    shown: dict[str, str] = {}
    while rest:
        option = rest.pop(0).removeprefix("--")
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if option in SHOWN:
            [shown[option]] = values
            if SHOWN[option] is not None and shown[option] not in SHOWN[option]:
                raise ValueError(f"--{option} {shown[option]} is not known")
        elif option in members:
            name = members[option]
            given[name] = _value(shape.members[name], values)
        else:
            raise ValueError(f"aws {service} {operation} has no --{option}")
    report = ParamValidator().validate(given, shape)
    if report.has_errors():
        raise ValueError(report.generate_report())
    return Call(service, operations[operation], given, shown.get("query"))


def _value(shape: Shape, words: list[str]) -> Any:
    if shape.type_name == "boolean":
        if words:
            raise ValueError(f"a switch takes no {words}")
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
    """Name=a,Values=b"""
    made = {}
    for name, text in (part.split("=", 1) for part in word.split(",")):
        if name not in shape.members:
            raise ValueError(f"{shape.name} has no {name}")
        made[name] = [text] if isinstance(shape.members[name], ListShape) else text
    return made


def words_of(line: str, variables: dict[str, str]) -> tuple[str | None, list[str]]:
    """(the variable that takes the answer, the words) of `NAME=$(aws ...)` or `aws ...`, with `variables` put in."""
    name = None
    if line.endswith(")") and "=$(" in line.split(" ")[0]:
        name, line = line[:-1].split("=$(", 1)
    for variable, value in variables.items():
        line = line.replace(f"${variable}", value)
    return name, shlex.split(line)
