import datetime
import json
import shutil
import time

import mlflow
import pytest
from mlflow import MlflowClient
from pyarrow import fs

from deploy import models
from deploy.models import fetch_generator, is_alias, resolve_model, tag_as_serving
from tests.support.object_store import s3_bucket

ALIAS = "champion"


@pytest.fixture(scope="module")
def registry(tmp_path_factory, tracking_uri, generator_folder, other_folder):
    """(tracking URI, run ids) of an MLflow with two versions of a model; the alias refers to the second."""
    client = MlflowClient(tracking_uri)
    experiment = client.create_experiment("stars", artifact_location=str(tmp_path_factory.mktemp("artifacts")))
    mlflow.set_tracking_uri(tracking_uri)
    client.create_registered_model("stars")
    runs = []
    for source in (generator_folder, other_folder):
        run_id = client.create_run(experiment).info.run_id
        client.log_artifacts(run_id, str(source), "generator")
        tags = {"data.sha256": f"d{len(runs)}"}
        client.create_model_version("stars", f"runs:/{run_id}/generator", run_id, tags=tags)
        runs.append(run_id)
    client.set_registered_model_alias("stars", ALIAS, "2")
    return tracking_uri, runs


def test_an_alias_is_resolved_to_its_version(registry):
    uri, runs = registry
    assert resolve_model(f"models:/stars@{ALIAS}", uri) == "models:/stars/2"
    assert resolve_model("models:/stars/latest", uri) == "models:/stars/2"
    assert resolve_model("models:/stars/1", uri) == "models:/stars/1"
    assert resolve_model(f"runs:/{runs[0]}/generator", uri) == f"runs:/{runs[0]}/generator"


def test_a_folder_is_resolved_to_its_absolute_path(generator_folder, monkeypatch):
    monkeypatch.chdir(generator_folder.parent)
    assert resolve_model(generator_folder.name, None) == str(generator_folder)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "nowhere is not a folder"),
        ("models:/stars@none", "cannot find models:/stars@none at sqlite"),
        ("models:/other/1", "cannot find models:/other/1 at sqlite"),
        ("models:/stars/9", "cannot find models:/stars/9 at sqlite"),
        ("runs:/0123456789abcdef0123456789abcdef/generator", "cannot find runs:/0123456789"),
    ],
)
def test_an_unknown_model_is_refused(registry, model, words):
    with pytest.raises(ValueError, match=words):
        resolve_model(model, registry[0])


def test_a_registered_model_requires_a_tracking_uri():
    with pytest.raises(ValueError, match="pass tracking_uri or set MLFLOW_TRACKING_URI"):
        resolve_model("models:/stars/1", None)


def test_a_node_downloads_a_registered_model_once_and_names_its_source(registry, other_folder, monkeypatch):
    uri, runs = registry
    folder, source = fetch_generator("models:/stars/2", uri)
    weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert weights == (other_folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert (source.name, source.version, source.run_id, source.tracking_uri) == ("stars", "2", runs[1], uri)
    _, source = fetch_generator(f"runs:/{runs[0]}/generator", uri)
    assert (source.name, source.version, source.run_id) == ("generator", None, runs[0])
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", None)
    assert fetch_generator("models:/stars/2", uri)[0] == folder


def test_a_folder_is_used_in_place_and_names_its_training_run(generator_folder, tmp_path):
    folder, source = fetch_generator(str(generator_folder), None)
    assert folder == generator_folder
    assert (source.name, source.run_id) == ("first", None)
    trained = shutil.copytree(generator_folder, tmp_path / "stars" / "generator")
    (trained / "provenance.json").write_text(json.dumps({"run_id": "abc"}))
    _, source = fetch_generator(str(trained), None)
    assert (source.name, source.run_id) == ("stars", "abc")


def test_a_generator_in_an_object_store_is_fetched_again_only_when_it_changes(generator_folder):
    with s3_bucket() as bucket:
        uri = f"{bucket}/runs/stars/generator"
        with pytest.raises(ValueError, match=f"cannot find model {uri}"):
            resolve_model(uri, None)
        filesystem, path = fs.FileSystem.from_uri(uri)
        fs.copy_files(str(generator_folder), path, destination_filesystem=filesystem)
        assert resolve_model(uri, None) == uri
        folder, source = fetch_generator(uri, None)
        assert (source.model, source.name) == (uri, "stars")
        assert read_files(folder) == read_files(generator_folder)
        assert fetch_generator(uri, None)[0] == folder
        with filesystem.open_output_stream(f"{path}/provenance.json") as file:
            file.write(b'{"run_id": "abc"}')
        changed, source = fetch_generator(uri, None)
        assert (changed != folder, source.run_id) == (True, "abc")
        time.sleep(1.1)  # an object store's times are in seconds
        with filesystem.open_output_stream(f"{path}/provenance.json") as file:
            file.write(b'{"run_id": "xyz"}')  # the same size
        assert fetch_generator(uri, None)[1].run_id == "xyz"


def read_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_replicas_refuse_an_alias(registry):
    assert is_alias("models:/stars@champion")
    assert is_alias("models:/stars/latest")
    assert not is_alias("models:/stars/3")
    with pytest.raises(ValueError, match="may refer to a different version on each replica"):
        fetch_generator("models:/stars@champion", registry[0])


def test_the_command_prints_the_version_behind_an_alias(registry, monkeypatch, capsys):
    uri, runs = registry
    monkeypatch.setattr("sys.argv", ["models", f"models:/stars@{ALIAS}", "--tracking-uri", uri])
    models.main()
    assert capsys.readouterr().out == "models:/stars/2\n"
    monkeypatch.setattr("sys.argv", ["models", f"models:/stars@{ALIAS}", "--tracking-uri", uri, "--json"])
    models.main()
    output = json.loads(capsys.readouterr().out)
    assert (output["run_id"], output["tags"]) == (runs[1], {"data.sha256": "d1"})
    monkeypatch.setattr("sys.argv", ["models", "models:/none@x", "--tracking-uri", uri])
    with pytest.raises(SystemExit, match="error: cannot find models:/none@x"):
        models.main()


def test_a_serving_version_is_tagged_in_mlflow(registry, generator_folder):
    uri, _ = registry
    _, source = fetch_generator("models:/stars/1", uri)
    tag_as_serving(source, "the-stars")
    tag_as_serving(source, "sana's (best)")
    client = MlflowClient(uri)
    tags = client.get_model_version("stars", "1").tags
    tagged = datetime.datetime.fromisoformat(tags["endpoint.the-stars"])
    assert datetime.timedelta(0) <= datetime.datetime.now(datetime.UTC) - tagged < datetime.timedelta(minutes=1)
    assert "endpoint.sana-s -best-" in tags
    assert "endpoint.the-stars" not in client.get_model_version("stars", "2").tags
    _, source = fetch_generator(str(generator_folder), None)
    tag_as_serving(source, "the-stars")  # a folder has no version to tag
