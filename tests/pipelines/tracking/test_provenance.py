import json
import platform
import shutil
import subprocess

import mlflow

from pipelines.tracking import provenance
from pipelines.tracking.provenance import code_identity, latents_dataset


def test_code_identity_has_the_commit_and_whether_files_are_modified(tmp_path, monkeypatch):
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
    outside = code_identity()  # a repository that does not track the code, such as one around a virtual environment
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


def test_latents_dataset_removes_credentials():
    used = latents_dataset(
        "s3://key:secret@bucket/latents",
        "a" * 64,
        num_samples=9,
        num_classes=3,
        source="s3://k:s@images",
        context="training",
    )
    assert used.dataset.name == "training: s3://bucket/latents"
    assert used.dataset.digest == "a" * 36
    assert json.loads(used.dataset.profile) == {"num_samples": 9, "num_classes": 3, "images": "s3://images"}
