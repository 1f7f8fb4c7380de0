import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

import deploy.models
from pipelines import tracking
from pipelines.command import InputError


def test_address_is_the_configured_one_else_a_database_by_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.resolve_tracking_uri("runs", num_nodes=1) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking.resolve_tracking_uri(f"file://{tmp_path}/runs", num_nodes=1).endswith(f"{tmp_path}/runs/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.resolve_tracking_uri("s3://bucket/runs", num_nodes=8) == "http://mlflow:5000"


@pytest.mark.parametrize(("storage", "num_nodes"), [("s3://bucket/runs", 1), ("runs", 2)])
def test_several_machines_without_a_server_are_refused(storage, num_nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        tracking.resolve_tracking_uri(storage, num_nodes)
    assert not list(tmp_path.iterdir())


def test_a_run_is_continued_and_its_generator_found_again(tmp_path, monkeypatch, pipeline):
    monkeypatch.chdir(tmp_path)  # nothing may be written to the working directory
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    uri = tracking.resolve_tracking_uri(str(tmp_path / "runs"), num_nodes=1)
    first = tracking.Run.begin(uri, "experiment", "name", {"network.depth": 2})
    first.log_metrics({"loss": 1.5}, step=1)
    first.end("KILLED")

    again = tracking.Run(uri, first.run_id)
    again.resume()
    again.log_metrics({"loss": 0.5}, step=2)
    again.log_image(np.zeros((4, 4, 3), np.uint8), "samples/one_step", step=2)
    pipeline.save_pretrained(tmp_path / "generator")
    model = again.register_generator(tmp_path / "generator", "small")
    again.end("FINISHED")

    client = MlflowClient(uri)
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"network.depth": "2"}
    history = client.get_metric_history(first.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.5), (2, 0.5)]
    assert model == "models:/small@champion"
    assert tracking.find_run(model, uri).run_id == first.run_id
    assert tracking.find_run("models:/small/1", uri).run_id == first.run_id
    assert tracking.find_run("models:/other@champion", uri) is None
    assert tracking.find_run(str(tmp_path / "generator"), uri) is None
    mlflow.set_tracking_uri(None)  # as in the process of another stage, which knows the address by its argument alone
    assert (deploy.models.fetch_generator(model, uri) / "model_index.json").is_file()
    mlflow.set_tracking_uri(None)
    folder = tracking.fetch_generator(model, uri)
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert str(folder).startswith(str(tmp_path / "runs" / "mlflow-artifacts"))

    loaded = mlflow.pyfunc.load_model(model)
    import pandas as pd

    rows = loaded.predict(pd.DataFrame({"class_label": [3], "seed": [7]}), params={"num_inference_steps": 2})
    assert rows["image_png"][0][:8] == b"\x89PNG\r\n\x1a\n"
    assert not list((tmp_path / "cwd").iterdir())


def test_unknown_models_are_refused_in_one_sentence(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(InputError, match="give --tracking-uri, or set MLFLOW_TRACKING_URI"):
        tracking.fetch_generator("models:/none@champion", None)
    with pytest.raises(InputError, match="is no folder; wanted a generator's folder"):
        tracking.fetch_generator(str(tmp_path / "none"), None)
    with pytest.raises(InputError, match="found 0"):
        tracking.fetch_generator(str(tmp_path), None)
    with pytest.raises(InputError, match=r"cannot fetch models:/none@champion from sqlite"):
        tracking.fetch_generator("models:/none@champion", uri)
    run = tracking.Run(uri, "0" * 32)
    with pytest.raises(InputError, match="does not know MLflow run"):
        run.resume()
