"""`meanflow serve`: what it refuses before Ray starts, and what its console says when the endpoint cannot start."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from deploy.serve import check, parse_arguments
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
        ([CLOTHES, "--port", "80000"], "cannot listen on 127.0.0.1, port 80000: .*; choose another --port"),
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
    ended = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ}, capture_output=True, text=True, timeout=240, start_new_session=True
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    *_, error, last = ended.stdout.splitlines()
    assert error.startswith("error: the endpoint did not start: ValueError: cannot load"), ended.stdout
    assert last == "stopped"
    assert len(ended.stdout.splitlines()) == 5
    assert ended.stderr == ""
