import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipelines.demo import images
from pipelines.demo.processes import Processes, ProgressLine
from pipelines.demo.run import MARKER, prepare_work, summarize
from pipelines.demo.serving import FREE_PORTS, free_port
from pipelines.errors import InputError


def test_images_are_a_function_of_split_and_index():
    np.testing.assert_array_equal(images.draw("train", 17)[0], images.draw("train", 17)[0])
    assert images.draw("train", 17)[1] == 7
    assert not np.array_equal(images.draw("train", 17)[0], images.draw("val", 17)[0])
    with pytest.raises(ValueError, match="unknown split 'test'; known: train, val"):
        images.draw("test", 0)


def test_colours_do_not_predict_the_class():
    def features(split, count):
        pixels, labels = images.draw_many(split, 0, count)
        flat = pixels.reshape(count, -1, 3).astype(np.float64)
        return np.concatenate([flat.mean(1), flat.std(1)], axis=1), labels

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(*features("train", 1500))
    assert classifier.score(*features("val", 500)) <= 0.3


def test_shapes_cover_the_same_area_and_stay_inside():
    axis = np.linspace(-2, 2, 401)
    x, y = np.meshgrid(axis, axis)
    for name, shape in images.SHAPES.items():
        scale = images.shape_scale(name)
        inside = shape(x / scale, y / scale) < 0
        assert inside.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(np.pi, rel=0.03), name
        reach = np.hypot(x, y)[inside].max() * images.RADIUS[1] + images.MAX_SHIFT
        assert reach < 1.0, name


def test_distribution_is_symmetric_under_mirroring():
    pixels, labels = images.draw_many("val", 0, 1000)
    for label in range(10):
        of_class = pixels[labels == label].astype(np.float64)
        mean = of_class.mean(axis=(0, 3))
        standard_error = of_class.mean(axis=3).std(axis=0) / np.sqrt(len(of_class))
        assert (np.abs(mean - mean[:, ::-1]) / (standard_error + 1)).mean() < 2.5, images.CLASS_NAMES[label]


def test_folder_has_the_layout_of_imagenet(image_root):
    assert len(list((image_root / "train").glob("d*/d*_*.JPEG"))) == 60
    assert (image_root / "LOC_synset_mapping.txt").read_text().splitlines()[3] == "d0000003 cross"


def test_taken_port_is_refused_and_zero_finds_a_free_one():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is in use; choose another"):
            free_port(port)
    # The server binds the port seconds later, so the port must be one that other processes are unlikely to take.
    assert free_port(0) in FREE_PORTS


def test_work_folder_replaces_only_an_earlier_demo(tmp_path):
    work = tmp_path / "demo"
    prepare_work(work)
    (work / "old").touch()
    prepare_work(work)
    assert [path.name for path in work.iterdir()] == [MARKER]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds something other than"):
        prepare_work(tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        prepare_work(tmp_path / "file")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_stage_runs_in_the_current_folder_and_its_orphans_are_ended(tmp_path):
    # Runs in another process: adopting orphans cannot be undone, and it would also end this process's other children, such
    # as the fork server of other tests.
    script = """
import os, subprocess, sys, psutil
from pathlib import Path
from pipelines.demo.processes import Processes, adopt_orphans
adopt_orphans()
daemon = "import os, time; os.setsid(); open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {daemon!r}]); time.sleep(2)"
Processes(dict(os.environ), Path("logs")).run("stage", [sys.executable, "-c", parent])
assert not psutil.pid_exists(int(open("pid").read())), "the orphan is alive"
print("none left")
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "none left", result.stderr


def test_failing_stage_stops_the_demo_and_shows_the_end_of_its_log(tmp_path, capsys):
    processes = Processes(dict(os.environ), tmp_path)
    with pytest.raises(InputError, match=f"failed with exit code 3; its last lines .* in {tmp_path}/train.log"):
        processes.run("train", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
    assert "  the reason\n" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [False, True])
def test_only_progress_is_shown_in_place_on_a_terminal_and_once_a_minute_elsewhere(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "80")
    progress, now = ProgressLine(), time.monotonic()
    for seconds, step in ((0, 25), (61, 50), (62, 75)):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        progress.show(
            f"\x1b[36m(RayTrainWorker pid=7)\x1b[0m trained {step} of 1500 steps, 3.2 steps/s, 7m36s left, 354 images/s"
        )
        progress.show("a warning of a library")
    progress.clear()
    shown = capsys.readouterr().out
    lines = [f"  trained {step} of 1500 steps, 3.2 steps/s, 7m36s left" for step in (25, 50, 75)]
    assert shown == ("".join(f"\r{line}\033[K" for line in lines) + "\r\033[K" if is_terminal else f"{lines[1]}\n")


def test_report_has_the_main_figures():
    quality = {"accuracy": 0.9, "frechet": 0.5, "diversity": 1.0, "nearest_train_ratio": 1.1}
    evaluation = {
        "autoencoder_psnr": 35.0,
        "held_out": quality,
        "reconstruction": quality,
        "samples": [{"num_steps": 2, **quality, "accuracy": 0.99}, {"num_steps": 1, **quality}],
    }
    report = summarize(evaluation, [])
    assert report["one_step_accuracy"] == 0.9
    assert {"stage_seconds", "autoencoder_psnr", "real_accuracy", "frechet_floor", "frechet_reconstruction",
            "frechet_one_step", "diversity", "nearest_train_ratio"} <= set(report)  # fmt: skip
