import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from pyarrow import fs

import deploy.models
from meanflow_core.generator_folder import write_provenance
from pipelines import storage
from pipelines.errors import InputError
from pipelines.tracking.registry import WEIGHTS_TAG, fetch_generator, find_run, register_generator, tag_generator
from pipelines.tracking.run import Run


@pytest.fixture
def run(tracking_uri):
    return Run.begin(tracking_uri, "experiment", "name", {})


@pytest.fixture
def generator(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def test_a_registered_generator_is_found_fetched_and_loaded(run, tracking_uri, generator, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")  # nothing may be written to the working directory
    model = register_generator(run, generator, "small")
    assert model == "models:/small@candidate"
    assert find_run(model, tracking_uri).run_id == run.run_id
    assert find_run("models:/small/1", tracking_uri).run_id == run.run_id
    assert find_run(f"runs:/{run.run_id}/small", tracking_uri).run_id == run.run_id
    assert find_run("models:/other@champion", tracking_uri) is None
    mlflow.set_tracking_uri(None)  # as in another stage's process: no global tracking URI
    version = deploy.models.resolve_model(model, tracking_uri)
    assert version == "models:/small/1"
    mlflow.set_tracking_uri(None)
    fetched, source = deploy.models.fetch_generator(version, tracking_uri)
    assert (fetched / "model_index.json").is_file()
    assert source.run_id == run.run_id
    mlflow.set_tracking_uri(None)
    folder = fetch_generator(model, tracking_uri)
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert folder == fetched  # a node has one copy, for all stages

    loaded = mlflow.pyfunc.load_model(model)
    rows = loaded.predict(pd.DataFrame({"class_label": [3], "seed": [7]}), params={"num_inference_steps": 2})
    assert rows["image_png"][0][:8] == b"\x89PNG\r\n\x1a\n"
    assert not list((tmp_path / "cwd").iterdir())


def test_the_run_of_a_folder_comes_from_its_provenance(generator, tracking_uri):
    assert find_run(str(generator), tracking_uri) is None
    write_provenance(generator, {"run_id": "1a2b", "tracking_uri": tracking_uri})
    assert (find_run(str(generator), None).run_id, find_run(str(generator), None).tracking_uri) == (
        "1a2b",
        tracking_uri,
    )
    assert find_run(str(generator), "http://other:5000").tracking_uri == "http://other:5000"
    (generator / "provenance.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        find_run(str(generator), None)


def test_a_generator_is_fetched_from_an_object_store(generator, tmp_path):
    filesystem, path = storage.open_storage("memory://bucket/generator")
    fs.copy_files(str(generator), path, destination_filesystem=filesystem)
    folder = fetch_generator("memory://bucket/generator", None)
    names = [sorted(str(file.relative_to(root)) for file in root.rglob("*")) for root in (folder, generator)]
    assert names[0] == names[1]


def test_unknown_models_are_refused(tracking_uri, tmp_path):
    with pytest.raises(InputError, match="give --tracking-uri, or set MLFLOW_TRACKING_URI"):
        fetch_generator("models:/none@champion", None)
    with pytest.raises(InputError, match="does not exist; a generator is a folder, a URI, models:/name@alias or"):
        fetch_generator(str(tmp_path / "none"), None)
    with pytest.raises(InputError, match="found none"):
        fetch_generator(str(tmp_path), None)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="the generator in .* has format version None"):
        fetch_generator(str(tmp_path), None)
    with pytest.raises(InputError, match=r"cannot find models:/none@champion at sqlite"):
        fetch_generator("models:/none@champion", tracking_uri)


def test_registering_reads_no_history_and_loads_no_model(run, generator, monkeypatch):
    # A call of None raises TypeError.
    monkeypatch.setattr(MlflowClient, "get_metric_history", None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    run.log_metrics({"loss": 1.0}, 0)
    run.end("FAILED")
    model = register_generator(run, generator, "example")
    monkeypatch.undo()
    assert MlflowClient(run.tracking_uri).get_run(run.run_id).info.status == "FAILED"
    info = mlflow.models.get_model_info(model)
    assert info.signature.inputs.input_names() == ["class_label", "seed"]
    assert info.saved_input_example_info["artifact_path"] == "input_example.json"


def test_only_versions_with_the_same_weights_are_tagged(run, generator, caplog):
    for weights in ("1a", "2b"):
        register_generator(run, generator, "tagged", {WEIGHTS_TAG: weights, "step": "7"})
    tag_generator(run, "1a", "evaluate.", {"evaluate.frechet.2-steps": "3"})
    # Deletes the tag above, because it also begins with "evaluate.".
    tag_generator(run, "1a", "evaluate.", {"evaluate.report": "runs:/x/evaluate/report.json"})
    first, second = (run.client.get_model_version("tagged", str(number)) for number in (1, 2))
    assert first.tags == {"transformer_sha256": "1a", "step": "7", "evaluate.report": "runs:/x/evaluate/report.json"}
    assert second.tags == {"transformer_sha256": "2b", "step": "7"}
    unreachable = Run("http://127.0.0.1:9", run.run_id)
    tag_generator(unreachable, "1a", "evaluate.", {"evaluate.report": "x"})
    assert "cannot tag the model versions" in caplog.text
