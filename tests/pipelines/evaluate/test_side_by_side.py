import copy
import json

import pytest
from PIL import Image

from pipelines.errors import InputError
from pipelines.evaluate.side_by_side import SideBySideJob, compare, read_report, rule_differences, short_names
from pipelines.tracking.run import Run


def report(frechet, error=0.1, **protocol):
    entry = {"title": "1 step", "num_steps": 1, "network_calls": 1, "frechet": frechet, "frechet_standard_error": error}
    made = {"extractor": {"name": "judge"}, "source": {"images": "/a/train", "sha256": "aa"}, "num_images": 5}
    return {
        "model": "m",
        "protocol": {
            "distance": "Fréchet distance (judge)", "num_samples": 1000, "labels": "balanced", "image_size": 64,
            "uint8_rule": "u", "extractor": {"name": "judge"}, "precision_recall": {},
            "reference": {"where": "/a/reference.npz", "sha256": "1", "protocol": made}, **protocol,
        },
        "flags": [],
        "held_out": {"frechet": 0.3},
        "samples": [entry, {**entry, "title": "2 steps", "num_steps": 2, "network_calls": 2, "frechet": frechet / 2}],
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_report(name, content):
        (tmp_path / name / "report").mkdir(parents=True)
        (tmp_path / name / "report" / "report.json").write_text(json.dumps(content))
        return str(tmp_path / name / "report")

    return write_report


def test_differences_are_told_from_noise(write, tmp_path):
    names = (write("first", report(5.0)), write("second", report(4.0)), write("third", report(5.1)))
    text = compare(SideBySideJob(reports=names, output=tmp_path / "both"))
    lines = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in text.splitlines() if " | " in line}
    assert "-1.000 ± 0.141 |" in lines["second", "1 step"]
    assert "-0.500 ± 0.141 |" in lines["second", "2 steps"]
    assert "+0.100 ± 0.141, none |" in lines["third", "1 step"]
    assert lines["first", "1 step"].rstrip().endswith("|  |")
    assert Image.open(tmp_path / "both" / "side_by_side.png").size[0] > 500
    written = json.loads((tmp_path / "both" / "side_by_side.json").read_text())
    assert list(written["reports"]) == ["first", "second", "third"]
    assert (tmp_path / "both" / "side_by_side.md").read_text() == text


def test_reports_of_other_rules_are_refused_unless_allowed_and_then_flagged(write, tmp_path):
    names = (write("first", report(5.0)), write("second", report(4.0, labels="random", num_samples=500)))
    with pytest.raises(
        InputError, match="num_samples: 1000 in first, 500 in second; labels: balanced in first, random"
    ):
        compare(SideBySideJob(reports=names, output=tmp_path / "both"))
    assert not (tmp_path / "both").exists()
    allowed = compare(SideBySideJob(reports=names, output=tmp_path / "both", allow_other_rules=True))
    assert allowed.startswith("Mind: the rules differ: num_samples: 1000 in first, 500 in second.")


def test_references_are_the_same_by_what_they_are_of(write):
    first, second = report(5.0), report(4.0)
    second["protocol"]["reference"] |= {"where": "/b/reference.npz", "sha256": "2"}
    second["protocol"]["reference"]["protocol"]["source"]["images"] = "/b/train"
    assert rule_differences({"first": first, "second": second}) == []
    other = copy.deepcopy(second)
    other["protocol"]["reference"]["protocol"]["source"]["autoencoder_sha256"] = "bb"
    assert rule_differences({"first": first, "second": other}) == [
        "reference: /a/reference.npz in first, /b/reference.npz in second"
    ]


def test_names_are_what_differs():
    assert short_names(("/r/one/report", "/r/two/report")) == ["one", "two"]
    assert short_names(("models:/a@champion", "models:/b@champion")) == ["a@champion", "b@champion"]
    assert short_names(("/r/one", "/r/one/two")) == ["one", "one/two"]
    with pytest.raises(InputError, match="reports must differ"):
        short_names(("a", "a"))
    with pytest.raises(ValueError, match="at least two, but got 1"):
        SideBySideJob(reports=("a",), output="b")


def test_reports_are_found_in_mlflow_and_others_refused(write, tmp_path):
    folder = write("first", report(5.0))
    address = f"sqlite:///{tmp_path}/mlflow.db"
    run = Run.begin(address, "test", "trained", {})
    run.log_file(tmp_path / "first" / "report" / "report.json", "evaluate")
    assert run.flush()
    assert read_report(f"runs:/{run.run_id}", address) == read_report(folder, None)
    bare = Run.begin(address, "test", "not evaluated", {})
    with pytest.raises(InputError, match="has no report; run pipelines.evaluate first"):
        read_report(f"runs:/{bare.run_id}", address)
    with pytest.raises(InputError, match="holds no report of pipelines.evaluate"):
        read_report(str(tmp_path), None)
