import copy
import json

import pytest
from PIL import Image

from pipelines.errors import InputError
from pipelines.evaluate.job import SideBySideJob
from pipelines.evaluate.side_by_side import compare, protocol_differences, read_report, short_names
from pipelines.tracking.run import Run


def report(frechet, error=0.1, **protocol):
    one = {"title": "1 step", "num_function_evaluations": 1, "frechet": frechet, "frechet_standard_error": error}
    two = {**one, "title": "2 steps", "num_function_evaluations": 2, "frechet": frechet / 2}
    made = {"extractor": {"name": "judge"}, "source": {"images": "/a/train", "sha256": "aa"}, "num_images": 5}
    return {
        "model": "m",
        "protocol": {
            "distance": "Fréchet distance (judge)", "num_samples": 1000, "labels": "balanced", "image_size": 64,
            "uint8_rule": "u", "extractor": {"name": "judge"}, "precision_recall": {},
            "reference": {"location": "/a/reference.npz", "sha256": "1", "protocol": made}, **protocol,
        },
        "warnings": [],
        "held_out": {"frechet": 0.3},
        "samples": [one, two],
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_report(name, content):
        (tmp_path / name / "report").mkdir(parents=True)
        (tmp_path / name / "report" / "report.json").write_text(json.dumps(content))
        return str(tmp_path / name / "report")

    return write_report


def test_differences_are_reported_with_their_significance(write, tmp_path):
    names = (write("first", report(5.0)), write("second", report(4.0)), write("third", report(5.1)))
    text = compare(SideBySideJob(reports=names, output=tmp_path / "both"))
    lines = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in text.splitlines() if " | " in line}
    assert "-1.000 ± 0.141 |" in lines["second", "1 step"]
    assert "-0.500 ± 0.141 |" in lines["second", "2 steps"]
    assert "+0.100 ± 0.141, not significant |" in lines["third", "1 step"]
    assert lines["first", "1 step"].rstrip().endswith("|  |")
    assert Image.open(tmp_path / "both" / "side_by_side.png").size[0] > 500
    written = json.loads((tmp_path / "both" / "side_by_side.json").read_text())
    assert list(written["reports"]) == ["first", "second", "third"]
    assert (tmp_path / "both" / "side_by_side.md").read_text() == text


def test_reports_of_different_protocols_are_refused_unless_allowed(write, tmp_path):
    names = (write("first", report(5.0)), write("second", report(4.0, labels="random", num_samples=500)))
    with pytest.raises(
        InputError, match="num_samples: 1000 in first, 500 in second; labels: balanced in first, random"
    ):
        compare(SideBySideJob(reports=names, output=tmp_path / "both"))
    assert not (tmp_path / "both").exists()
    allowed = compare(SideBySideJob(reports=names, output=tmp_path / "both", allow_different_protocols=True))
    assert allowed.startswith("Warning: the protocols differ: num_samples: 1000 in first, 500 in second.")


def test_references_of_the_same_images_are_equal_in_any_location(write):
    first, second = report(5.0), report(4.0)
    second["protocol"]["reference"] |= {"location": "/b/reference.npz", "sha256": "2"}
    second["protocol"]["reference"]["protocol"]["source"]["images"] = "/b/train"
    assert protocol_differences({"first": first, "second": second}) == []
    other = copy.deepcopy(second)
    other["protocol"]["reference"]["protocol"]["source"]["autoencoder_sha256"] = "bb"
    assert protocol_differences({"first": first, "second": other}) == [
        "reference: /a/reference.npz in first, /b/reference.npz in second"
    ]


def test_short_names_are_the_parts_in_which_locations_differ():
    assert short_names(("/r/one/report", "/r/two/report")) == ["one", "two"]
    assert short_names(("models:/a@champion", "models:/b@champion")) == ["a@champion", "b@champion"]
    assert short_names(("/r/one", "/r/one/two")) == ["one", "one/two"]
    with pytest.raises(InputError, match="reports must differ"):
        short_names(("a", "a"))
    with pytest.raises(ValueError, match="at least two, but got 1"):
        SideBySideJob(reports=("a",), output="b")


def test_reports_are_read_from_mlflow_and_missing_ones_refused(write, tmp_path, tracking_uri):
    folder = write("first", report(5.0))
    run = Run.begin(tracking_uri, "side by side", "trained", {})
    run.log_file(tmp_path / "first" / "report" / "report.json", "evaluate")
    assert run.flush()
    assert read_report(f"runs:/{run.run_id}", tracking_uri) == read_report(folder, None)
    bare = Run.begin(tracking_uri, "side by side", "not evaluated", {})
    with pytest.raises(InputError, match="has no report; run `meanflow evaluate` first"):
        read_report(f"runs:/{bare.run_id}", tracking_uri)
    with pytest.raises(InputError, match="give an --output folder of `meanflow evaluate`"):
        read_report(str(tmp_path), None)
    with pytest.raises(InputError, match="is in MLflow; give --tracking-uri, or set MLFLOW_TRACKING_URI"):
        read_report("models:/m@champion", None)
    with pytest.raises(InputError, match="has no run of models:/unknown@champion"):
        read_report("models:/unknown@champion", tracking_uri)
