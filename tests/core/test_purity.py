"""The core takes everything as arguments: it reads no environment variables or command line, and prints nothing."""

import ast

import pytest

from tests.support.readme import REPOSITORY

FORBIDDEN_NAMES = {"print", "input", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {"environ", "environb", "getenv", "putenv", "argv", "stdout", "stdin"}
FORBIDDEN_MODULES = {"argparse", "click", "getopt", "optparse", "tyro"}


def violations(source: str) -> list[str]:
    """The forbidden names of a module's source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            found.append(node.attr)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
            found += [name for name in names if name in FORBIDDEN_ATTRIBUTES]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "import os\nos.environ['A']",
        "from os import getenv",
        "import sys\nsys.argv[1]",
        "from tyro import cli",
    ],
)
def test_violation_is_found(source):
    assert violations(source)


def test_core_reads_no_environment_and_prints_nothing():
    files = sorted((REPOSITORY / "meanflow_core").rglob("*.py"))
    assert len(files) > 30
    assert {str(file): found for file in files if (found := violations(file.read_text()))} == {}
