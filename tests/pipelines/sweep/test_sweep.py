import json
import signal
import subprocess
import sys

import pytest
import ray
from mlflow import MlflowClient

from meanflow_core.presets.demo import debug
from pipelines import storage
from pipelines.errors import RunError
from pipelines.sweep import __main__ as command
from pipelines.sweep.grid import expand
from pipelines.sweep.parent_run import FILE
from pipelines.sweep.run import table
from pipelines.training.checkpoints import committed
from tests.support.latents import encode_demo_images
from tests.support.readme import REPOSITORY


@pytest.fixture(scope="module")
def latents(image_root, tmp_path_factory):
    return encode_demo_images(image_root / "train", tmp_path_factory.mktemp("sweep") / "latents", 64)


def test_table_lists_the_best_first_and_failed_variants_last():
    variants = expand(["optimizer.learning_rate=1e-3,1e-2,1", "seed=4"], debug())
    good, best, failed = (variant.name for variant in variants)
    scores = {best: {("frechet", 1): 1.5, ("frechet", 2): 1.25}, good: {("frechet", 1): 2.5, ("frechet", 2): 2.25}}
    assert table(variants, scores, {failed: "a reason"}).splitlines() == [
        "| optimizer.learning_rate | seed | frechet, 1 step | frechet, 2 steps |",
        "|---|---|---|---|",
        "| 0.01 | 4 | 1.5 | 1.25 |",
        "| 0.001 | 4 | 2.5 | 2.25 |",
        "| 1 | 4 | failed | failed |",
    ]


@pytest.mark.soak
@pytest.mark.cluster
def test_sweep_keeps_the_variants_that_do_not_fail(latents, tmp_path, monkeypatch, capsys):
    options = [
        "debug", "--data", str(latents), "--storage", str(tmp_path), "--run-name", "names", "--cache-dir", "none",
        "--device", "cpu", "--num-steps", "4", "--vary", "seed=3",
    ]  # fmt: skip
    output, client = tmp_path / "names", MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        monkeypatch.setattr(sys, "argv", ["sweep", *options, "--vary", "optimizer.name=adam,nowhere:make"])
        with pytest.raises(RunError, match=r"1 of 2 experiments failed \(seed-3_name-nowhere-make: cannot find"):
            command.main()
        record = json.loads((output / "runs/seed-3_name-adam/training.json").read_text())
        parent = client.get_run(json.loads((output / FILE).read_text())["run_id"])
        assert parent.info.status == "FAILED"
        monkeypatch.setattr(sys, "argv", ["sweep", *options, "--vary", "optimizer.name=adam,muon"])
        command.main()
    finally:
        ray.shutdown()
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("| seed | optimizer.name | training error |") == 2
    assert lines.count("| 3 | nowhere:make | failed |") == 1
    assert json.loads((output / "runs/seed-3_name-adam/training.json").read_text()) == record

    parent = client.get_run(parent.info.run_id)
    assert (parent.info.status, parent.data.params["preset"]) == ("FINISHED", "debug")
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    children = {run.info.run_name: run for run in found}
    errors = {
        name: sum(run.data.metrics[f"squared_error_{times}"] for times in ("r_equals_t", "r_below_t"))
        for name, run in children.items()
    }
    assert sorted(children) == ["seed-3_name-adam", "seed-3_name-muon"]
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert {name: parent.data.metrics[f"evaluate/{name}/training_error"] for name in errors} == errors
    best = children[min(errors, key=errors.get)]
    assert client.get_model_version_by_alias("meanflow-names", "champion").run_id == best.info.run_id
    assert (
        (output / "table.md").read_text().splitlines()[2].startswith(f"| 3 | {best.info.run_name.rpartition('-')[2]} |")
    )


@pytest.mark.soak
@pytest.mark.cluster
def test_sigterm_saves_a_checkpoint_of_every_running_variant(latents, tmp_path):
    options = [
        "debug", "--data", str(latents), "--storage", str(tmp_path), "--run-name", "long", "--cache-dir", "none",
        "--device", "cpu", "--num-steps", "1000000", "--checkpoint-interval-steps", "1000000", "--vary", "seed=0,1",
        "--sample-interval-steps", "1000000", "--max-concurrent", "2",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.sweep", *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    waiting, lines = {"seed-0: trained", "seed-1: trained"}, []
    for line in process.stdout:
        lines.append(line)
        waiting -= {start for start in waiting if start in line}
        if not waiting:
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, "".join(lines) + rest
    assert "the same command resumes from them" in rest
    for seed in (0, 1):
        saved = committed(*storage.open_storage(f"{tmp_path}/long/runs/seed-{seed}"))
        assert 5 <= saved.step < 1_000_000
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    parent = json.loads((tmp_path / "long" / FILE).read_text())["run_id"]
    assert client.get_run(parent).info.status == "KILLED"
