"""Checks that the jobs submitted by deploy/jobs/*.sh parse with Ray's CLI and the parsers of the stages."""

import os
import subprocess
from pathlib import Path

import pytest
import ray
import yaml
from ray._private.label_utils import validate_label_selector
from ray.runtime_env import RuntimeEnv

from tests.support.command_lines import parse_job, parse_module
from tests.support.job_scripts import JOBS, STAGES, submission
from tests.support.readme import text_of


def test_folder_contains_a_script_per_stage_and_the_runtime_environment():
    assert {path.name for path in JOBS.iterdir()} == {"runtime_env.yaml", *(f"{stage}.sh" for stage in STAGES)}
    for stage in STAGES:
        assert os.access(JOBS / f"{stage}.sh", os.X_OK), stage


def test_commands_parse_and_each_stage_reads_the_output_of_the_previous_one():
    encode, (preset, train), evaluate = (parse_job(stage) for stage in STAGES)
    assert preset == "xl2"
    assert train.data == encode.output
    assert train.vae == encode.vae
    assert evaluate.model == f"models:/meanflow-{preset}@candidate"
    assert evaluate.promote
    # A cluster that scales from zero has no GPUs when the driver starts, so `--device auto` would choose CPUs.
    assert {encode.device, train.device, evaluate.device} == {"gpu"}
    assert encode.num_workers
    assert evaluate.num_workers
    assert evaluate.output.is_absolute()  # the working directory of a job is deleted when the job ends


@pytest.mark.parametrize(
    ("stage", "name"), [("encode", "encode-imagenet256"), ("train", "train-xl2"), ("evaluate", "evaluate-xl2")]
)
def test_arguments_are_passed_to_the_stage_and_variables_to_ray(stage, name, tmp_path):
    plain = submission(stage)
    assert plain.module == f"pipelines.{stage}"
    assert plain.options["submission_id"] == name
    assert Path(plain.options["runtime_env"]) == JOBS / "runtime_env.yaml"
    assert not plain.options["no_wait"]  # without --no-wait, `ray job submit` follows the job's log
    changed = submission(
        stage, "--num-workers", "64", SUBMISSION_ID="again", RUNTIME_ENV="mine.yaml", STORAGE=str(tmp_path)
    )
    assert (changed.options["submission_id"], changed.options["runtime_env"]) == ("again", "mine.yaml")
    parsed = parse_module(changed.module, changed.arguments)
    options = parsed[1] if stage == "train" else parsed
    assert options.num_workers == 64  # a repeated option overrides the earlier one
    assert str(tmp_path) in " ".join(changed.arguments)
    assert "BUCKET" not in " ".join(changed.arguments)


@pytest.mark.parametrize("stage", STAGES)
def test_missing_storage_fails_before_a_job_is_submitted(stage):
    with pytest.raises(subprocess.CalledProcessError) as error:
        submission(stage, STORAGE="")
    assert "STORAGE: must be set to s3://BUCKET/imagenet" in error.value.stderr
    assert error.value.stdout == ""


def test_evaluate_driver_runs_on_a_cpu_machine_and_the_others_on_the_head():
    fields = ("num_cpus", "num_gpus", "memory", "resources", "label_selector")
    placements = {
        stage: {
            name: value for name in fields if (value := submission(stage).options[f"entrypoint_{name}"]) is not None
        }
        for stage in STAGES
    }
    assert placements["encode"] == placements["train"] == {}
    assert placements["evaluate"] == {
        "num_cpus": 4,
        "memory": 16 * 2**30,
        "label_selector": '{"meanflow/pool": "cpu"}',
    }
    assert validate_label_selector({"meanflow/pool": "cpu"}) is None


def test_runtime_environment_allows_time_for_checkpoints_and_machine_starts():
    environment = yaml.safe_load((JOBS / "runtime_env.yaml").read_text())
    RuntimeEnv(**environment)
    variables = environment["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    assert float(variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) >= 600
    folder = Path(ray.__file__).parent
    assert "RAY_JOB_STOP_WAIT_TIME_S" in (folder / "dashboard/modules/job/job_supervisor.py").read_text()
    assert "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" in (folder / "train/v2/_internal/constants.py").read_text()
    assert f"--env MLFLOW_TRACKING_URI={variables['MLFLOW_TRACKING_URI']} " in text_of("ray_cluster.yaml")
