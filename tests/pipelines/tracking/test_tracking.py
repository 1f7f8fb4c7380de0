import os
import platform
import shutil
import subprocess
import threading

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

import deploy.models
from pipelines.errors import InputError
from pipelines.tracking import outbox, provenance
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.registry import fetch_generator, find_run
from pipelines.tracking.run import WEIGHTS_TAG, Run, resolve_tracking_uri


def test_address_is_the_configured_one_else_a_database_by_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri("runs", num_nodes=1) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_tracking_uri(f"file://{tmp_path}/runs", num_nodes=1).endswith(f"{tmp_path}/runs/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert resolve_tracking_uri("s3://bucket/runs", num_nodes=8) == "http://mlflow:5000"


@pytest.mark.parametrize(("storage", "num_nodes"), [("s3://bucket/runs", 1), ("runs", 2)])
def test_several_machines_without_a_server_are_refused(storage, num_nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        resolve_tracking_uri(storage, num_nodes)
    assert not list(tmp_path.iterdir())


def test_a_run_is_continued_and_its_generator_found_again(tmp_path, monkeypatch, pipeline):
    monkeypatch.chdir(tmp_path)  # nothing may be written to the working directory
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    uri = resolve_tracking_uri(str(tmp_path / "runs"), num_nodes=1)
    first = Run.begin(uri, "experiment", "name", {"network.depth": 2})
    first.log_metrics({"loss": 1.5}, step=1)
    first.end("KILLED")

    again = Run(uri, first.run_id)
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
    assert find_run(model, uri).run_id == first.run_id
    assert find_run("models:/small/1", uri).run_id == first.run_id
    assert find_run("models:/other@champion", uri) is None
    assert find_run(str(tmp_path / "generator"), uri) is None
    mlflow.set_tracking_uri(None)  # as in the process of another stage, which knows the address by its argument alone
    version = deploy.models.resolve_model(model, uri)
    assert version == "models:/small/1"
    mlflow.set_tracking_uri(None)
    with deploy.models.fetched_generator(version, uri) as (fetched, source):
        assert (fetched / "model_index.json").is_file()
    assert source.run_id == first.run_id
    mlflow.set_tracking_uri(None)
    folder = fetch_generator(model, uri)
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
        fetch_generator("models:/none@champion", None)
    with pytest.raises(InputError, match="is no folder; wanted a generator's folder"):
        fetch_generator(str(tmp_path / "none"), None)
    with pytest.raises(InputError, match="found 0"):
        fetch_generator(str(tmp_path), None)
    with pytest.raises(InputError, match=r"cannot fetch models:/none@champion from sqlite"):
        fetch_generator("models:/none@champion", uri)
    run = Run(uri, "0" * 32)
    with pytest.raises(InputError, match="does not know MLflow run"):
        run.resume()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture
def run(database):
    return Run.begin(database, "experiment", "name", {}, {"git_commit": "0a1b"})


def test_a_run_bears_its_tags_and_its_json_files(run, tmp_path):
    content = {"depth": 2}
    run.log_dict(content, "folder/config.json")
    content["depth"] = 3
    run.end("FINISHED")
    found = MlflowClient(run.tracking_uri).get_run(run.run_id)
    assert found.data.tags["git_commit"] == "0a1b"
    path = mlflow.artifacts.download_artifacts(f"{found.info.artifact_uri}/folder/config.json", dst_path=str(tmp_path))
    with open(path) as file:
        assert file.read() == '{\n  "depth": 2\n}\n'


def test_an_evaluation_may_be_repeated_at_its_steps(run):
    for value in (0.5, 0.6):
        run.log_metrics({"evaluate/accuracy": value}, step=1)
        assert run.flush()
    history = MlflowClient(run.tracking_uri).get_metric_history(run.run_id, "evaluate/accuracy")
    assert [metric.value for metric in history] == [0.5, 0.6]


def test_a_picture_is_logged_as_it_was_when_it_was_queued(run, tmp_path):
    image = np.full((8, 8, 3), 7, np.uint8)
    run.log_image(image, "samples", 1)
    image[:] = 0
    assert run.flush()
    folder = mlflow.artifacts.download_artifacts(
        f"{MlflowClient(run.tracking_uri).get_run(run.run_id).info.artifact_uri}/images", dst_path=str(tmp_path)
    )
    (png,) = [name for name in os.listdir(folder) if name.endswith(".png")]
    assert (np.asarray(Image.open(f"{folder}/{png}")) == 7).all()


def test_a_file_that_is_gone_and_a_bad_key_are_left_out_with_a_warning(run, tmp_path, caplog):
    run.log_file(tmp_path / "gone.txt", "folder")
    run.log_image(np.zeros((8, 8, 3), np.uint8), "bad+key", 1)
    run.log_dict({}, "kept.json")
    assert run.flush()
    assert "goes without file folder/gone.txt: FileNotFoundError" in caplog.text
    assert "goes without picture bad+key of step 1: ValueError" in caplog.text
    assert "kept.json" in [file.path for file in MlflowClient(run.tracking_uri).list_artifacts(run.run_id)]


def test_what_waits_is_bounded_and_what_was_lost_is_counted(run, monkeypatch, caplog):
    monkeypatch.setattr(outbox, "MAX_ROWS", 10)
    monkeypatch.setattr(outbox, "MAX_PICTURES", 2)
    monkeypatch.setattr(run._outbox, "_start", lambda: None)  # nobody writes
    for step in range(15):
        run.log_metrics({"loss": 1.0}, step)
    for step in range(5):
        run.log_image(np.zeros((8, 8, 3), np.uint8), "samples", step)
    assert [row["step"] for row in run.pending()] == list(range(5, 15))
    assert not run.flush(0.0)
    assert caplog.messages[-1].endswith(
        "10 metric rows (steps 5 to 14); pictures samples (steps 3, 4); 5 metric rows lost before, 3 pictures lost before"
    )
    monkeypatch.undo()
    assert run.flush()
    history = MlflowClient(run.tracking_uri).get_metric_history(run.run_id, "loss")
    assert [metric.step for metric in history] == list(range(5, 15))


def test_adopted_rows_come_first_in_the_order_of_steps(run, monkeypatch):
    monkeypatch.setattr(run._outbox, "_start", lambda: None)  # nobody writes
    run.log_metrics({"loss": 4.0}, 4)
    run.adopt({"step": step, "timestamp_ms": 1, "metrics": {"loss": 1.0}} for step in (3, 2))
    assert [row["step"] for row in run.pending()] == [2, 3, 4]


def test_the_thread_ends_with_the_run(run):
    run.log_metrics({"loss": 1.0}, 1)
    thread = run._outbox._thread
    assert thread in threading.enumerate()
    run.end("FINISHED")
    thread.join(5)
    assert not thread.is_alive()
    run.log_metrics({"loss": 1.0}, 2)  # a report on a run that has ended
    assert run.flush()


@pytest.mark.parametrize(("configured", "wanted"), [(None, "0"), ("5", "5")])
def test_mlflow_tries_once_unless_the_user_says_otherwise(run, monkeypatch, configured, wanted):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    if configured:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", configured)
    run.log_metrics({"loss": 1.0}, 1)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == wanted
    assert run.flush()


def test_registering_reads_no_history_and_runs_no_model(run, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(MlflowClient, "get_metric_history", None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    pipeline.save_pretrained(tmp_path / "generator")
    run.log_metrics({"loss": 1.0}, 0)
    run.end("FAILED")
    model = run.register_generator(tmp_path / "generator", "example")
    monkeypatch.undo()
    assert MlflowClient(run.tracking_uri).get_run(run.run_id).info.status == "FAILED"
    info = mlflow.models.get_model_info(model)
    assert info.signature.inputs.input_names() == ["class_label", "seed"]
    assert info.saved_input_example_info["artifact_path"] == "input_example.json"


def test_tags_reach_the_versions_of_these_weights_alone(run, tmp_path, pipeline, caplog):
    pipeline.save_pretrained(tmp_path / "generator")
    for weights in ("1a", "2b"):
        run.register_generator(tmp_path / "generator", "tagged", {WEIGHTS_TAG: weights, "step": "7"})
    run.tag_generator("1a", "evaluate.", {"evaluate.frechet.2-steps": "3"})
    run.tag_generator("1a", "evaluate.", {"evaluate.report": "runs:/x/evaluate/report.json"})  # of another reference
    client = MlflowClient(run.tracking_uri)
    first, second = (client.get_model_version("tagged", str(number)) for number in (1, 2))
    assert first.tags == {"transformer_sha256": "1a", "step": "7", "evaluate.report": "runs:/x/evaluate/report.json"}
    assert second.tags == {"transformer_sha256": "2b", "step": "7"}
    away = Run("http://127.0.0.1:9", run.run_id)
    away.tag_generator("1a", "evaluate.", {"evaluate.report": "x"})
    assert "have no tags of this" in caplog.text


def test_the_code_says_its_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "pipelines").mkdir()
    code = tmp_path / "pipelines" / "tracking.py"
    shutil.copy(provenance.__file__, code)
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert code_identity()["git_commit"] == "unknown"  # no repository
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "m")
    outside = code_identity()  # somebody else's repository, as around a virtual environment
    assert (outside["git_commit"], outside["git_dirty"]) == ("unknown", "unknown")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    clean = code_identity()
    assert (clean["git_commit"], clean["git_dirty"]) == (git("rev-parse", "HEAD"), "false")
    code.write_text("")
    assert code_identity()["git_dirty"] == "true"
    monkeypatch.setenv("PATH", "")
    without_git = code_identity()
    assert without_git["git_commit"] == "unknown"
    assert without_git["python"] == platform.python_version()
    assert without_git["mlflow"] == mlflow.__version__
    assert set(without_git) == {
        "git_commit", "git_dirty", "meanflow_ray", "torch", "ray", "diffusers", "mlflow", "python",
    }  # fmt: skip
