"""`meanflow serve`: what it refuses before Ray starts, and what its console says when the endpoint cannot start."""

import shutil
import socket
import subprocess
import sys

import psutil
import pytest

from deploy.serve import check, parse_arguments
from deploy.serve_process import reason
from pipelines.demo.serving import free_port
from tests.support.readme import REPOSITORY

CLOTHES = str(REPOSITORY / "docs" / "gallery" / "clothes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [CLOTHES, "--host", "0.0.0.0"],
            "--host 0.0.0.0 lets other machines in, and there are no API keys; give --api-keys",
        ),
        (["no/such/folder"], "model no/such/folder is not a folder"),
        ([CLOTHES, "--port", "80000"], "^--port must be between 1 and 65535, but got 80000$"),
        ([CLOTHES, "--rate-limit", "often"], "^--rate-limit: expected a rate such as \"600/minute\", but got 'often'$"),
        ([CLOTHES, "--api-keys", "alice", "secret"], "^--api-keys: the key 'alice' must be given as its SHA-256"),
        ([CLOTHES, "--topology", "one", "--num-api-replicas", "2"], "^num_api_replicas 2 requires topology two"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_invalid_options_are_refused_in_one_line_before_ray_starts(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(parse_arguments(words))
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match=f"port {port}: .*in use; choose another --port"):
            check(parse_arguments([CLOTHES, "--port", port]))
    check(parse_arguments([CLOTHES, "--port", port]))


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_an_endpoint_that_cannot_start_says_why_and_ends(tmp_path):
    folder = tmp_path / "generator"
    shutil.copytree(CLOTHES, folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    command = [sys.executable, "-m", "deploy.serve", str(folder), "--port", str(free_port(0))]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        for left in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            left.kill()
        process.kill()
    assert (process.returncode, errors) == (1, ""), output + errors
    lines = output.splitlines()
    assert lines[-2].startswith("error: the endpoint did not start: ValueError: cannot load"), output
    assert (lines[0], lines[-1]) == (f"checking {folder}", "stopped")
    assert len(lines) <= 8


def test_reason_is_the_last_exception_of_a_text():
    trace = "Traceback\n  File x\nValueError: no weights\n\nThe deployment failed to start 3 times.\n"
    assert reason(trace) == "ValueError: no weights"
    assert reason("ray.exceptions.RayTaskError: a\ntorch.cuda.OutOfMemoryError: full\nCompile with X") == (
        "torch.cuda.OutOfMemoryError: full"
    )
    assert reason("waiting\nno GPU") == "no GPU"
    assert reason("") == "Serve gave no reason"
