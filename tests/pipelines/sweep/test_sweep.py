import json
import sys

import pytest
import ray
from mlflow import MlflowClient

from meanflow_core.presets.demo import debug
from pipelines.errors import RunError
from pipelines.sweep import __main__ as command
from pipelines.sweep.grid import expand
from pipelines.sweep.parent_run import FILE
from pipelines.sweep.run import table
from tests.support.latents import encode_demo_images


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


@pytest.mark.cluster
def test_sweep_keeps_the_variants_that_do_not_fail(latents, tmp_path, monkeypatch, capsys):
    options = [
        "debug", "--data", str(latents), "--storage", str(tmp_path), "--run-name", "rates", "--cache-dir", "none",
        "--device", "cpu", "--num-steps", "4", "--vary", "seed=0,1",
    ]  # fmt: skip
    output, tracking_uri = tmp_path / "rates", f"sqlite:///{tmp_path}/mlflow.db"
    try:
        monkeypatch.setattr(sys, "argv", ["sweep", *options, "--vary", "optimizer.learning_rate=1e-3"])
        command.main()
        printed = capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["sweep", *options, "--vary", "optimizer.learning_rate=1e-3,1e38"])
        with pytest.raises(RunError, match=r"2 of 4 experiments failed \(.*is not finite"):
            command.main()
    finally:
        ray.shutdown()
    assert "| seed | optimizer.learning_rate | training loss |" in printed
    assert len(printed.split("| 0.001 |")) == 3
    assert (output / "table.md").read_text().count("| 1e+38 | failed |") == 2
    for seed in (0, 1):
        assert (output / f"runs/seed-{seed}_learning_rate-0.001/generator/model_index.json").is_file()

    client, parent = MlflowClient(tracking_uri), json.loads((output / FILE).read_text())["run_id"]
    run = client.get_run(parent)
    assert run.info.status == "FAILED"
    assert run.data.params["preset"] == "debug"
    losses = [run.data.metrics[f"evaluate/seed-{seed}_learning_rate-0.001/training_loss"] for seed in (0, 1)]
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(child.info.status for child in children) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    champion = client.get_model_version_by_alias("meanflow-rates", "champion")
    best = client.get_run(champion.run_id)
    assert best.data.metrics["loss"] == min(losses)
    assert best.info.run_name == f"seed-{losses.index(min(losses))}_learning_rate-0.001"
