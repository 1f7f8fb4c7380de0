"""The command `meanflow`, started as its console script."""

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.demo.serving import free_port, wait_until_ready
from pipelines.main import MODULES
from tests.support.environments import command_modules
from tests.support.readme import REPOSITORY

PROGRAM = str(Path(sys.executable).with_name("meanflow"))
OWN_COMMANDS = {  # of the demo, the cluster and tests; started with python -m
    "deploy.spot_notice", "pipelines.compare.velocity_figure", "pipelines.demo.images", "pipelines.demo.judge",
}  # fmt: skip


@pytest.fixture
def users_folder(tmp_path):
    """A folder whose own packages have the names of ours."""
    for name in ("pipelines", "deploy", "meanflow_core"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the package of the user was imported')")
    return tmp_path


def run(words, folder, timeout=60):
    return subprocess.run([PROGRAM, *words], cwd=folder, capture_output=True, text=True, timeout=timeout)


def test_help_lists_every_command_within_a_second(users_folder):
    before = os.times().children_user + os.times().children_system
    result = run(["--help"], users_folder)
    assert os.times().children_user + os.times().children_system - before < 1.0
    assert (result.returncode, result.stderr) == (0, "")
    assert all(f"\n  {name} " in result.stdout for name in MODULES)


def test_version_is_that_of_the_package(users_folder):
    shown = run(["--version"], users_folder)
    assert shown.stdout.strip() == f"meanflow-ray {importlib.metadata.version('meanflow-ray')}"


def test_every_module_that_runs_has_a_name():
    assert set(command_modules()) - {"pipelines.latents.cache_command"} - OWN_COMMANDS == set(MODULES.values())


@pytest.mark.parametrize("name", ["encode", "serve", "keys", "train demo"])
def test_each_command_names_itself_in_its_help(name, users_folder):
    result = run([*name.split(), "--help"], users_folder)
    assert result.returncode == 0, result.stderr
    assert f"usage: meanflow {name}" in result.stdout


def test_a_preset_shows_its_common_options_and_with_help_all_every_option(users_folder):
    common, every = (run(["train", "demo", option], users_folder).stdout for option in ("--help", "--help-all"))
    assert "meanflow train demo --help-all lists all of them" in common
    for option in ("--data", "--storage", "--run-name", "--num-workers", "--num-steps", "--optimizer.learning-rate"):
        assert f"{option} " in common
        assert f"{option} " in every
    for option in ("--max-failures", "--ema-decays", "--loss.guidance.omega", "--network.depth", "--optimizer.beta1"):
        assert f"{option} " not in common
        assert f"{option} " in every


def test_a_preset_of_the_users_folder_is_found(users_folder):
    source = "from meanflow_core.presets.demo import debug\n\n\ndef mine():\n    return debug()\n"
    (users_folder / "my_experiment.py").write_text(source)
    result = run(["train", "my_experiment:mine", "--help"], users_folder)
    assert "usage: meanflow train my_experiment:mine" in result.stdout, result.stderr


def test_an_unknown_command_is_refused_and_the_known_ones_are_listed(users_folder):
    result = run(["trian"], users_folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: 'trian' is not a command; the commands are encode, check, ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["meanflow", "tr"], "train"),
        (["meanflow", "train", "demo_improved"], "demo_improved_meanflow"),
        (["meanflow", "train", "demo", "--global"], "--global-batch-size"),
        (["meanflow", "encode", "--max-rej"], "--max-rejected-fraction"),
        (["meanflow", "train", "demo", "--loss.guidance.o"], "--loss.guidance.omega"),
        (["meanflow", "comp"], "compare completion"),
        (["meanflow", "serve", "doc"], ""),  # the shell completes files
    ],
)
def test_bash_completes_commands_presets_and_options(words, expected, users_folder):
    script = f"""
        eval "$(meanflow completion)"
        COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
        _meanflow; echo "${{COMPREPLY[@]}}" """
    environment = {**os.environ, "PATH": f"{Path(PROGRAM).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", script], cwd=users_folder, env=environment, capture_output=True, text=True)
    assert sorted(set(result.stdout.split())) == expected.split(), result.stderr


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_ray_and_serve_import_the_package_and_a_terminated_endpoint_leaves_nothing(users_folder):
    photos = REPOSITORY / "tests/data/clothing/train"
    options = ["--vae", "pixels", "--image-size", "16", "--num-workers", "1"]
    encoded = run(["encode", "--images", str(photos), "--output", "latents", *options], users_folder, timeout=200)
    assert encoded.returncode == 0, encoded.stderr[-3000:]
    (users_folder / "generator").symlink_to(REPOSITORY / "docs/gallery/clothes")
    port = free_port(0)
    with open(users_folder / "log", "w") as log:
        command = [PROGRAM, "serve", "generator", "--port", str(port)]
        # As a background job of a script, which ignores SIGINT.
        server = subprocess.Popen(
            command, cwd=users_folder, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )  # fmt: skip
    processes: list[psutil.Process] = []
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, users_folder / "log")
        processes = psutil.Process(server.pid).children(recursive=True)
        assert any("haproxy" in process.name() for process in processes)
        server.terminate()
        assert server.wait(timeout=60) in (0, 128 + signal.SIGINT)
        assert not psutil.wait_procs(processes, timeout=20)[1]
    finally:
        for process in [psutil.Process(server.pid), *processes] if server.poll() is None else processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert free_port(port) == port  # HAProxy listens no more
