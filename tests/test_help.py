"""`--help` of every command is quick, because slow packages are imported where they are used."""

import json
import subprocess
import sys

import pytest

from tests.support.environments import command_modules
from tests.support.readme import REPOSITORY

COMMANDS = [*command_modules(), "pipelines.train demo"]
SLOW_IMPORTS = ("diffusers", "matplotlib", "mlflow", "pandas", "ray", "torch", "transformers")
# Runs each command in a fork of one process. Prints its exit code, CPU seconds and slow imports.
SCRIPT = """
import json, os, resource, runpy, sys
for command in json.loads(sys.argv[1]):
    if os.fork() == 0:
        module, *arguments = command.split()
        sys.argv = [module, *arguments, "--help"]
        out, sys.stdout = sys.stdout, open(os.devnull, "w")
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = "no --help"
        except SystemExit as exit:
            code = exit.code
        used = resource.getrusage(resource.RUSAGE_SELF)
        slow = [name for name in SLOW_IMPORTS if name in sys.modules]
        print(json.dumps([command, code, used.ru_utime + used.ru_stime, slow]), file=out, flush=True)
        os._exit(0)
    os.wait()
""".replace("SLOW_IMPORTS", repr(SLOW_IMPORTS))


@pytest.fixture(scope="module")
def helps():
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return {command: results for command, *results in map(json.loads, process.stdout.splitlines())}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_at_most_two_seconds_of_cpu(helps, command):
    exit_code, seconds, slow_imports = helps[command]
    assert exit_code == 0
    assert slow_imports == []
    assert seconds <= 2.0
