import datetime
import json

import pytest
from mlflow import MlflowClient

from deploy import models
from deploy.models import announce, fetched_generator, is_alias, resolve_model
from pipelines.tracking.registry import ALIAS


@pytest.fixture(scope="module")
def registry(tmp_path_factory, generator_folder, other_folder):
    """An MLflow with two versions of one model; the alias names the second."""
    import mlflow

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("e", artifact_location=str(folder / "artifacts"))
    mlflow.set_tracking_uri(uri)
    client.create_registered_model("stars")
    runs = []
    for source in (generator_folder, other_folder):
        run = client.create_run(experiment)
        client.log_artifacts(run.info.run_id, str(source), "generator")
        client.create_model_version(
            "stars", f"runs:/{run.info.run_id}/generator", run.info.run_id, tags={"data.sha256": f"d{len(runs)}"}
        )
        runs.append(run.info.run_id)
    client.set_registered_model_alias("stars", ALIAS, "2")
    return uri, runs


def test_an_alias_is_resolved_to_its_version(registry):
    uri, runs = registry
    assert resolve_model(f"models:/stars@{ALIAS}", uri) == "models:/stars/2"
    assert resolve_model("models:/stars/latest", uri) == "models:/stars/2"
    assert resolve_model("models:/stars/1", uri) == "models:/stars/1"
    assert resolve_model(f"runs:/{runs[0]}/generator", uri) == f"runs:/{runs[0]}/generator"


def test_a_folder_is_named_by_its_absolute_path(generator_folder, monkeypatch):
    monkeypatch.chdir(generator_folder.parent)
    assert resolve_model(generator_folder.name, None) == str(generator_folder)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "nowhere is no folder"),
        ("models:/stars@none", "cannot find models:/stars@none at sqlite"),
        ("models:/other/1", "cannot find models:/other/1 at sqlite"),
        ("models:/stars/9", "cannot find models:/stars/9 at sqlite"),
        ("runs:/0123456789abcdef0123456789abcdef/generator", "cannot find runs:/0123456789"),
    ],
)
def test_what_is_not_there_is_refused_when_the_application_is_built(registry, model, words):
    with pytest.raises(ValueError, match=words):
        resolve_model(model, registry[0])


def test_a_registered_model_wants_an_address():
    with pytest.raises(ValueError, match="give tracking_uri, or set MLFLOW_TRACKING_URI"):
        resolve_model("models:/stars/1", None)


def test_what_was_downloaded_is_gone_afterwards_and_says_where_it_came_from(registry, other_folder):
    uri, runs = registry
    with fetched_generator("models:/stars/2", uri) as (folder, source):
        assert (folder / "transformer" / "config.json").is_file()
        weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert weights == (other_folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert not folder.exists()
    assert (source.name, source.version, source.run_id, source.tracking_uri) == ("stars", "2", runs[1], uri)
    with fetched_generator(f"runs:/{runs[0]}/generator", uri) as (_, source):
        assert (source.name, source.version, source.run_id) == ("generator", None, runs[0])


def test_a_folder_stays_where_it_is(generator_folder):
    with fetched_generator(str(generator_folder), None) as (folder, source):
        assert folder == generator_folder
    assert folder.exists()
    assert (source.name, source.run_id) == ("first", None)


def test_replicas_are_never_told_an_alias(registry):
    assert is_alias("models:/stars@champion")
    assert is_alias("models:/stars/latest")
    assert not is_alias("models:/stars/3")
    with (
        pytest.raises(ValueError, match="may stand for another version on each replica"),
        fetched_generator("models:/stars@champion", registry[0]),
    ):
        pass


def test_the_command_tells_what_an_alias_stands_for(registry, monkeypatch, capsys):
    uri, runs = registry
    monkeypatch.setattr("sys.argv", ["models", f"models:/stars@{ALIAS}", "--tracking-uri", uri])
    models.main()
    assert capsys.readouterr().out == "models:/stars/2\n"
    monkeypatch.setattr("sys.argv", ["models", f"models:/stars@{ALIAS}", "--tracking-uri", uri, "--json"])
    models.main()
    about = json.loads(capsys.readouterr().out)
    assert (about["run_id"], about["tags"]) == (runs[1], {"data.sha256": "d1"})
    monkeypatch.setattr("sys.argv", ["models", "models:/none@x", "--tracking-uri", uri])
    with pytest.raises(SystemExit, match="error: cannot find models:/none@x"):
        models.main()


def test_a_version_that_serves_says_so_in_mlflow(registry, generator_folder):
    uri, _ = registry
    with fetched_generator("models:/stars/1", uri) as (_, source):
        announce(source, "the-stars")
        announce(source, "sana's (best)")
    client = MlflowClient(uri)
    moment = datetime.datetime.fromisoformat(client.get_model_version("stars", "1").tags["endpoint.the-stars"])
    assert datetime.timedelta(0) <= datetime.datetime.now(datetime.UTC) - moment < datetime.timedelta(minutes=1)
    assert "endpoint.sana-s -best-" in client.get_model_version("stars", "1").tags
    assert "endpoint.the-stars" not in client.get_model_version("stars", "2").tags
    with fetched_generator(str(generator_folder), None) as (_, source):
        announce(source, "the-stars")  # nothing to be told
