import datetime
import json
import shutil

import mlflow
import pytest
from mlflow import MlflowClient

from deploy import models
from deploy.models import fetched_generator, is_alias, resolve_model, tag_as_serving

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


def test_a_downloaded_model_names_its_source_and_is_deleted_afterwards(registry, other_folder):
    uri, runs = registry
    with fetched_generator("models:/stars/2", uri) as (folder, source):
        weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert weights == (other_folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert not folder.exists()
    assert (source.name, source.version, source.run_id, source.tracking_uri) == ("stars", "2", runs[1], uri)
    with fetched_generator(f"runs:/{runs[0]}/generator", uri) as (_, source):
        assert (source.name, source.version, source.run_id) == ("generator", None, runs[0])


def test_a_folder_is_used_in_place_and_names_its_training_run(generator_folder, tmp_path):
    with fetched_generator(str(generator_folder), None) as (folder, source):
        assert folder == generator_folder
    assert folder.exists()
    assert (source.name, source.run_id) == ("first", None)
    trained = shutil.copytree(generator_folder, tmp_path / "stars" / "generator")
    (trained / "provenance.json").write_text(json.dumps({"run_id": "abc"}))
    with fetched_generator(str(trained), None) as (_, source):
        assert (source.name, source.run_id) == ("stars", "abc")


def test_replicas_refuse_an_alias(registry):
    assert is_alias("models:/stars@champion")
    assert is_alias("models:/stars/latest")
    assert not is_alias("models:/stars/3")
    with (
        pytest.raises(ValueError, match="may refer to a different version on each replica"),
        fetched_generator("models:/stars@champion", registry[0]),
    ):
        pass


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
    with fetched_generator("models:/stars/1", uri) as (_, source):
        tag_as_serving(source, "the-stars")
        tag_as_serving(source, "sana's (best)")
    client = MlflowClient(uri)
    tags = client.get_model_version("stars", "1").tags
    tagged = datetime.datetime.fromisoformat(tags["endpoint.the-stars"])
    assert datetime.timedelta(0) <= datetime.datetime.now(datetime.UTC) - tagged < datetime.timedelta(minutes=1)
    assert "endpoint.sana-s -best-" in tags
    assert "endpoint.the-stars" not in client.get_model_version("stars", "2").tags
    with fetched_generator(str(generator_folder), None) as (_, source):
        tag_as_serving(source, "the-stars")  # a folder has no version to tag
