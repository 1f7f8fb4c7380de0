"""Runs the commands of docs/how-to/own-experiment.md in a folder that holds its two files."""

import contextlib
import io
import json
import logging
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from deploy.settings import Arguments
from meanflow_core.checkpoint import save_train_state
from meanflow_core.config import NetworkConfig
from meanflow_core.generator import load_pipeline
from meanflow_core.portable import network_source
from meanflow_core.presets import preset_config
from pipelines import storage
from pipelines.cluster import start_ray
from pipelines.demo.serving import fetch, free_port, wait_until_ready
from pipelines.errors import InputError
from pipelines.plan.report import CHANGED
from pipelines.train.job import parse_arguments
from pipelines.train.prepare import prepare
from pipelines.training import checkpoints, stopping
from tests.support.api import pixels
from tests.support.endpoint import in_process
from tests.support.latents import encode_demo_images
from tests.support.readme import REPOSITORY, commands
from tests.support.training_checkpoints import differing, train_in_this_process
from tests.support.training_jobs import job_with_data, with_config
from tests.support.waiting import wait_until

PAGE = "docs/how-to/own-experiment.md"
FILES = sorted((REPOSITORY / "docs/how-to/own_experiment").glob("*.py"))
# Options added to the page's commands: a small network, few images and few steps.
SMALLER = {
    "pipelines.demo.images": "--num-train 60 --num-val 40",
    "pipelines.encode": "--num-workers 1",
    "pipelines.train": "--network.width 32 --network.depth 2 --num-steps 30 --global-batch-size 16 --log-interval-steps 10 "
    "--checkpoint-interval-steps 15 --sample-interval-steps 30 --optimizer.warmup-steps 5 --optimizer.cooldown-steps 10 "
    "--cache-dir none --cpu-threads 1",
    "pipelines.evaluate": "--num-samples 40 --num-workers 1",
}
pytestmark = pytest.mark.cluster


def documented(block: str, *changes: tuple[str, str]) -> list[list[str]]:
    """The words of the commands of the page's block, with the options of SMALLER and other changes."""
    lines = []
    for line in commands(block, PAGE):
        for before, after in (("REPOSITORY", str(REPOSITORY)), *changes):
            line = line.replace(before, after)
        words = shlex.split(line)
        lines.append(words + shlex.split(SMALLER.get(words[2], "") if words[0] == "python" else ""))
    return lines


@dataclass(frozen=True)
class Finished:
    """The page's commands up to evaluate. The training was interrupted and resumed."""

    folder: Path
    printed: dict[str, str]
    """What each command printed."""
    log: str
    """What the commands and their workers logged."""


def copy_files(folder: Path) -> None:
    for file in FILES:
        shutil.copy(file, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_root) -> Iterator[Finished]:
    """Runs the commands in this process and on one Ray cluster, which saves several starts."""
    folder = tmp_path_factory.mktemp("mine")
    copy_files(folder)
    (folder / "images").symlink_to(image_root)
    encode_demo_images(image_root / "train", folder / "latents", images_per_shard=32)
    encode_demo_images(image_root / "val", folder / "held-out", images_per_shard=32)
    printed, log = {}, io.StringIO()
    handler = logging.StreamHandler(log)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(log):
        patch.chdir(folder)
        patch.syspath_prepend(folder)  # as `python -m` does
        patch.setattr(logging.getLogger(), "level", logging.INFO)
        logging.getLogger().addHandler(handler)

        def run(words: list[str], expected_code: int = 0) -> str:
            patch.setattr(sys, "argv", words[2:])
            with contextlib.redirect_stdout(io.StringIO()) as output:
                code = 0
                try:
                    runpy.run_module(words[2], run_name="__main__", alter_sys=True)
                except SystemExit as stop:
                    code = stop.code or 0
            assert code == expected_code, log.getvalue()[-6000:]
            return output.getvalue()

        start_ray(needed_cpus=3)
        try:
            dry_run, train = documented("own-experiment-train")
            printed["dry run"] = run(dry_run)
            with interrupted("runs/mine"):
                printed["interrupted"] = run(train, expected_code=128 + signal.SIGTERM)
            printed["train"] = run(train)
            [evaluate] = documented("own-experiment-evaluate")
            printed["evaluate"] = run(evaluate)
        finally:
            ray.shutdown()
            logging.getLogger().removeHandler(handler)
        yield Finished(folder, printed, log.getvalue())
    for file in FILES:
        sys.modules.pop(file.stem, None)


@contextlib.contextmanager
def interrupted(run_location: str) -> Iterator[None]:
    """Requests a stop, as SIGTERM does, as soon as the run starts."""
    location, is_over = storage.absolute(run_location), threading.Event()

    def request() -> None:
        while not is_over.wait(0.2):
            stopping.request_stop(location)

    thread = threading.Thread(target=request)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_the_two_files_have_at_most_150_lines():
    assert [file.name for file in FILES] == ["my_experiment.py", "my_network.py"]
    assert sum(len(file.read_text().splitlines()) for file in FILES) <= 150
    assert "meanflow_core" not in FILES[1].read_text()


def test_dry_run_shows_the_settings_and_costs_of_the_experiment(finished):
    report = finished.printed["dry run"]
    assert "my_experiment:CosineMeanFlow" in report
    assert "my_network:PlainNet" in report
    assert f"0.5{CHANGED}1.0)" in report
    assert "per function evaluation" in report


def test_training_validates_publishes_and_registers_the_experiment(finished):
    folder = finished.folder
    assert f"generator: {folder}/runs/mine/generator" in finished.printed["train"]
    assert "model: models:/meanflow-cosine@candidate" in finished.printed["train"]
    record = json.loads((folder / "runs/mine/training.json").read_text())
    assert record["preset"] == "my_experiment:cosine"
    assert record["identity"]["config"]["loss"]["class"] == "my_experiment:CosineMeanFlow"
    assert record["identity"]["config"]["network"]["class"] == "my_network:PlainNet"
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    run = client.get_run(record["mlflow_run_id"])
    assert run.data.params["loss.huber"] == "1.0"
    for name in ("loss", "squared_error", "validation/squared_error", "model_flops_per_second"):
        assert np.isfinite(run.data.metrics[name]), name
    history = client.get_metric_history(record["mlflow_run_id"], "squared_error")
    assert [metric.step for metric in history] == [10, 20, 30]
    assert history[-1].value < history[0].value


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    with checkpoints.committed(*storage.open_storage(str(run))).latest.as_directory() as folder:
        return tensors_in(Path(folder))


def test_an_interrupted_run_resumes_bit_for_bit(finished, tmp_path):
    assert "with a checkpoint; the same command resumes from it" in finished.printed["interrupted"]
    stopped_at = int(finished.printed["interrupted"].split("stopped at step ")[1].split()[0])
    assert 1 <= stopped_at < 30
    config = parse_arguments(documented("own-experiment-train")[1][3:])[1].config
    whole = train_in_this_process(finished.folder / "latents", config, num_threads=1)
    save_train_state(whole.state, config, tmp_path)
    ours, theirs = last_checkpoint(finished.folder / "runs/mine"), tensors_in(tmp_path)
    assert any("momentum_buffer" in name for name in ours)  # Muon's
    assert differing(ours, theirs) == []


def test_evaluation_measures_the_generator(finished):
    report = json.loads((finished.folder / "report/report.json").read_text())
    assert [entry["num_steps"] for entry in report["samples"]] == [1, 2]
    assert all(np.isfinite(entry["frechet"]) for entry in report["samples"])


def test_endpoint_serves_the_generator(finished):
    folder = finished.folder / "runs/mine/generator"
    words = documented("own-experiment-serve")[1]
    request = json.loads(words[words.index("-d") + 1])
    with in_process(Arguments(model=str(folder))) as client:
        response = client.post("/generate", json=request)
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    expected = load_pipeline(folder).images_from_seeds([8], [7])[0].numpy().astype(int)
    assert np.abs(pixels(response.content) - expected).max() <= 1


def test_portable_generator_loads_with_diffusers_alone(finished, tmp_path):
    [code] = [
        block.split("```")[0]
        for block in (REPOSITORY / PAGE).read_text().split("```python\n")[1:]
        if "trust_remote_code" in block
    ]
    shutil.copytree(finished.folder / "runs/mine/generator", tmp_path / "runs/mine/generator")
    program = f"import sys\nsys.modules.update(meanflow_core=None, my_network=None)\n{code}"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=120)
    expected = load_pipeline(finished.folder / "runs/mine/generator").images_from_seeds([8], [7])[0].numpy().astype(int)
    assert np.abs(pixels((tmp_path / "portable.png").read_bytes()) - expected).max() <= 1


def test_generator_whose_module_is_missing_is_refused(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_network", None)
    with pytest.raises(ValueError, match="cannot find 'my_network:PlainNet'.* with the module on the Python path"):
        load_pipeline(finished.folder / "runs/mine/generator")


def test_training_starts_from_the_generator_of_the_same_network_only(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    words = documented("own-experiment-train", ("--run-name mine", "--run-name next --init-from runs/mine/generator"))[
        1
    ][3:]
    initial = prepare(parse_arguments(words)[1]).initial
    assert not initial.is_flow_matching
    weights = load_file(finished.folder / "runs/mine/generator/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in initial.network.state_dict().items())
    with pytest.raises(InputError, match=r"arguments is .*'depth': 2.*, expected .*'depth': 3"):
        prepare(parse_arguments([*words, "--network.depth", "3"])[1])


def test_a_run_resumes_with_the_same_settings_only(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    words = [*documented("own-experiment-train")[1][3:], "--loss.huber", "0.5"]
    with pytest.raises(InputError, match=r"config.loss.huber was 1.0, is now 0.5"):
        prepare(parse_arguments(words)[1])


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "imports_config",
            "import meanflow_core.config",
            "needs import meanflow_core.config, which a portable generator",
        ),
        (
            "imports_its_neighbour",
            "from my_layers import Layer",
            "needs (import )?my_layers, which a portable generator cannot",
        ),
        ("defines_a_name_again", "class Conditioning: ...", "networks.interface and .* both define Conditioning"),
        ("defines_a_constant_again", "MAX_PERIOD = 1", "networks.layers and .* both define MAX_PERIOD"),
        (
            "renames_an_import",
            "from meanflow_core.networks.layers import run_blocks as run",
            "needs from meanflow_core.networks.layers import run_blocks as run, which",
        ),
    ],
)
def test_network_that_is_not_in_one_module_is_not_portable(tmp_path, monkeypatch, name, line, message):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_layers.py").write_text("class Layer: ...")
    network = (FILES[1]).read_text()
    (tmp_path / f"{name}.py").write_text(f"{line}\nfrom meanflow_core.networks.layers import PatchEmbedder\n{network}")
    with pytest.raises(ValueError, match=message):
        network_source("meanflow_core.networks.forward_mode:ForwardModeNetwork", f"{name}:PlainNet")


def test_training_refuses_a_network_that_cannot_be_portable_before_it_starts(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.folder)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_layers.py").write_text("")
    (tmp_path / "needs_layers.py").write_text("import my_layers\nfrom my_network import PlainNet\n")
    words = documented("own-experiment-train", ("--run-name mine", "--run-name unportable"))[1][3:]
    _, job = parse_arguments(words)
    network = make_dataclass("Config", [], bases=(type(job.config.network),), frozen=True, kw_only=True)
    network.network = "needs_layers:PlainNet"
    with pytest.raises(InputError, match="needs (import )?my_layers, which a portable generator cannot"):
        prepare(replace(job, config=replace(job.config, network=network())))


# What is refused


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("my_experiment", "unknown preset 'my_experiment'; known: .*, or module:function for one of your own"),
        ("my_absent:cosine", "cannot find 'my_absent:cosine': No module named 'my_absent'"),
        ("my_experiment:cosin", "cannot find 'my_experiment:cosin': module 'my_experiment' has no attribute 'cosin'"),
        (
            "my_experiment:CosineMeanFlowConfig",
            "a function without arguments .*, but my_experiment:CosineMeanFlowConfig returns Cos",
        ),
        ("my_experiment:math", "must be a function .*, but my_experiment:math is <module 'math'"),
        ("meanflow_core.presets.demo:comparison", r"demo:comparison fails: comparison\(\) missing 1 required"),
        ("my_broken:cosine", "cannot import my_broken: NameError: name 'undefined' is not defined"),
    ],
)
def test_preset_that_is_none_is_refused(preset, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FILES[0].parent)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_broken.py").write_text("undefined")
    with pytest.raises(InputError, match=message):
        parse_arguments([preset, "--data", "d", "--storage", "s", "--run-name", "r"])


def network_config(name: str) -> NetworkConfig:
    reference = {"network": f"tests.support.plain_networks:{name}"}
    return make_dataclass("Config", [], bases=(NetworkConfig,), namespace=reference, frozen=True, kw_only=True)()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Absent", "cannot find 'tests.support.plain_networks:Absent'"),
        ("not_a_class", "must be a subclass of torch.nn.Module"),
        ("WithoutSizes", "must take sample_size, in_channels, num_classes as arguments"),
        ("WithDropout", "but layer is Dropout"),
        ("WithAttentionDropout", r"but layer.self_attn is MultiheadAttention"),
        ("OtherForward", "the forward of tests.support.plain_networks:OtherForward must take z, t, h and labels"),
        ("FailsOnData", r"a step of 8 samples of noise fails with .*FailsOnData and .*: RuntimeError: .*shapes"),
        ("OtherShape", r"must return the shape of z .*, but got .*"),
        ("WithCustomFunction", "an operation without forward-mode AD, which du/dt needs: You must implement the jvp"),
    ],
)
def test_network_that_breaks_a_rule_is_refused_before_training(name, message, tmp_path):
    job = with_config(job_with_data(tmp_path), network=network_config(name))
    with pytest.raises(InputError, match=message):
        prepare(job)


def test_objective_without_du_dt_needs_no_forward_mode(tmp_path):
    config = replace(preset_config("demo_flow_matching"), network=network_config("WithCustomFunction"))
    assert prepare(job_with_data(tmp_path, config=config)).record is None


def test_network_that_reads_values_trains_without_a_count_of_flops(tmp_path, caplog):
    from pipelines.train.run import _step_flops

    ready = prepare(with_config(job_with_data(tmp_path), network=network_config("ReadsValues")))
    assert _step_flops(ready.job.config, ready.manifest) is None
    assert "model_flops_per_second is not logged: the network or the objective does not run without data" in caplog.text


# As a user runs it


@pytest.mark.soak
def test_every_command_of_the_page_runs_as_a_process(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_TMPDIR": "/tmp/mfx"}
    Path("/tmp/mfx").mkdir(exist_ok=True)

    def run(words: list[str]) -> None:
        subprocess.run(words, cwd=tmp_path, env=environment, check=True, timeout=900)

    copy, *rest = documented("own-experiment-data")
    run(["bash", "-c", shlex.join(copy).replace("'", "")])
    for words in rest:
        run(words)
    dry_run, train = documented("own-experiment-train")
    run(dry_run)
    run(["python", "-m", "pipelines.plan", "my_experiment:cosine", "--gpus", "8"])
    train += ["--num-steps", "400"]
    first = subprocess.Popen(train, cwd=tmp_path, env=environment)
    wait_until(lambda: list(tmp_path.glob("runs/mine/checkpoint_*")) or first.poll() is not None, 600)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 128 + signal.SIGTERM
    run(train)
    run([word.replace("mine", "whole") for word in train])
    assert differing(*(last_checkpoint(tmp_path / "runs" / name) for name in ("mine", "whole"))) == []
    run(documented("own-experiment-evaluate")[0])

    port = free_port(8000)
    serve, curl = documented("own-experiment-serve")
    with subprocess.Popen(serve, cwd=tmp_path, env=environment, start_new_session=True) as server:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", server)
            run(curl)
            assert pixels((tmp_path / "star.png").read_bytes()).shape == (64, 64, 3)
            assert fetch(f"http://127.0.0.1:{port}/readyz")[0] == 200
        finally:
            server.send_signal(signal.SIGINT)
            time.sleep(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
