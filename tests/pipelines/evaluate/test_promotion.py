"""Which evaluated versions become champions."""

import copy
import json
import re

import pytest

from pipelines.errors import InputError
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.promotion import decide, open_promotion, promote_if_better
from pipelines.tracking import registry
from pipelines.tracking.registry import WEIGHTS_TAG, find_version, register_generator
from pipelines.tracking.run import Run


def report(frechet, error=0.1, **protocol):
    return {
        "samples": [{"title": "1 step", "frechet": frechet, "frechet_standard_error": error}],
        "protocol": {"distance": "FID", "num_samples": 1000, **protocol}
        | {"reference": {"location": "real.npz", "sha256": "a1", "protocol": None}},
    }


@pytest.mark.parametrize(
    ("ours", "champion", "below", "promote", "reason"),
    [
        (report(9.0), None, None, True, "no champion"),
        (report(9.0), report(9.5), None, True, r"9 ± 0.1 .* the champion's 9.5 ± 0.1"),
        # Two standard errors of the difference are 0.283.
        (report(9.0), report(9.29), None, True, "the champion's 9.29"),
        (report(9.0), report(9.27), None, False, "better by 0.27, but more than 0.283 is needed"),
        (report(9.0), report(8.0), None, False, "better by -1, but"),
        (report(9.0), report(8.0), 9.1, True, "below 9.1"),
        (report(9.0), report(8.0), 9.0, False, "better by -1, but"),
        (report(9.0), report(20.0, num_samples=500), None, False, "another protocol .*num_samples: 1000 .* 500"),
    ],
)
def test_a_version_must_beat_the_champion_by_two_standard_errors(ours, champion, below, promote, reason):
    decision = decide(ours, champion, below=below)
    assert decision.promote == promote
    assert re.search(reason, decision.reason), decision.reason


def test_a_distance_that_was_trained_on_promotes_nothing():
    ours = report(1.0, generator={"is_trained_on_extractor": True})
    for champion in (None, report(9.0)):
        decision = decide(ours, champion, below=2.0)
        assert not decision.promote
        assert "evaluate it with a held-out extractor" in decision.reason


def test_a_champion_that_was_not_measured_at_the_first_setting_stays():
    other = copy.deepcopy(report(20.0))
    other["samples"][0]["title"] = "2 steps"
    decision = decide(report(9.0), other)
    assert (decision.promote, decision.reason) == (
        False,
        "the champion was not measured at 1 step; evaluate it there, too",
    )


@pytest.fixture
def register(tracking_uri, pipeline, tmp_path):
    """Registers a new version of the test's model, with a report if given."""
    pipeline.save_pretrained(tmp_path / "generator")

    def register(content=None, weights=None):
        run = Run.begin(tracking_uri, "experiment", "training", {})
        tags = {} if weights is None else {WEIGHTS_TAG: weights}
        model = register_generator(run, tmp_path / "generator", tmp_path.name, tags)
        assert model == f"models:/{tmp_path.name}@candidate"
        if content is not None:
            (tmp_path / "report.json").write_text(json.dumps(content | {"warnings": []}))
            run.log_file(tmp_path / "report.json", "evaluate")
            run.flush()

    return register


def champion_number(tmp_path, tracking_uri):
    found = find_version(f"models:/{tmp_path.name}@champion", tracking_uri)
    return None if found is None else found.number


def open_candidate(tmp_path, tracking_uri, model=None):
    model = model or f"models:/{tmp_path.name}@candidate"
    job = EvaluateJob(output=tmp_path, model=model, reference="real.npz", promote=True)
    return open_promotion(job, tracking_uri)


def test_only_a_better_candidate_takes_the_champions_alias(register, tracking_uri, tmp_path):
    register(report(9.0))
    assert champion_number(tmp_path, tracking_uri) is None  # training alone makes no champion
    promote_if_better(open_candidate(tmp_path, tracking_uri), report(9.0))
    assert champion_number(tmp_path, tracking_uri) == 1
    register(report(9.2))
    worse = open_candidate(tmp_path, tracking_uri)
    assert worse.version.uri == f"models:/{tmp_path.name}/2"
    promote_if_better(worse, report(9.2))
    assert champion_number(tmp_path, tracking_uri) == 1
    register(report(5.0))
    promote_if_better(open_candidate(tmp_path, tracking_uri), report(5.0))
    assert champion_number(tmp_path, tracking_uri) == 3
    assert open_candidate(tmp_path, tracking_uri) is None  # it is the champion already


def test_promote_below_promotes_a_version_that_is_no_better_than_the_champion(register, tracking_uri, tmp_path):
    register(report(5.0))
    promote_if_better(open_candidate(tmp_path, tracking_uri), report(5.0))
    register(report(6.0))
    model = f"models:/{tmp_path.name}@candidate"
    job = EvaluateJob(output=tmp_path, model=model, reference="real.npz", promote=True, promote_below=7.0)
    promote_if_better(open_promotion(job, tracking_uri), report(6.0))
    assert champion_number(tmp_path, tracking_uri) == 2


def test_two_evaluations_at_once_do_not_both_replace_the_champion(register, tracking_uri, tmp_path):
    register(report(9.0))
    promote_if_better(open_candidate(tmp_path, tracking_uri), report(9.0))
    register(report(5.0))
    better = open_candidate(tmp_path, tracking_uri)
    register(report(6.0))
    good = open_candidate(tmp_path, tracking_uri)
    assert promote_if_better(better, report(5.0)).promote
    decision = promote_if_better(good, report(6.0))
    assert (decision.promote, champion_number(tmp_path, tracking_uri)) == (False, 2)
    assert "the champion changed during the evaluation" in decision.reason


def test_a_champion_whose_report_is_of_other_weights_is_refused(register, tracking_uri, tmp_path):
    register(report(9.0, generator={"transformer_sha256": "b2"}), weights="a1")
    promote_if_better(open_candidate(tmp_path, tracking_uri), report(9.0))
    register(report(5.0))
    with pytest.raises(
        InputError, match=r"measured other weights than those of the champion; evaluate models:/.*/1 first"
    ):
        open_candidate(tmp_path, tracking_uri)


def test_a_server_that_does_not_answer_is_not_a_missing_champion(monkeypatch):
    monkeypatch.setattr(registry, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(InputError, match="cannot reach MLflow at http://127.0.0.1:9"):
        find_version("models:/m@champion", "http://127.0.0.1:9")


def test_what_cannot_be_compared_is_refused_before_measuring(register, tracking_uri, tmp_path):
    with pytest.raises(InputError, match=r"--promote needs a registered model.*, but got models:/.*@candidate at "):
        open_candidate(tmp_path, tracking_uri)
    with pytest.raises(InputError, match="but got /some/generator at"):
        open_candidate(tmp_path, tracking_uri, "/some/generator")
    register()
    promote_if_better(open_candidate(tmp_path, tracking_uri), report(9.0))
    register()
    with pytest.raises(InputError, match="has no report; run `meanflow evaluate` first"):
        open_candidate(tmp_path, tracking_uri)
    with pytest.raises(ValueError, match="promote_below needs --promote"):
        EvaluateJob(output=tmp_path, model="m", reference="r", promote_below=3.0)
