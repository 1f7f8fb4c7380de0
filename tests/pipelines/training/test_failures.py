from dataclasses import replace

from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from pipelines.cluster import Cause, first_cause
from pipelines.errors import InputError, RunError
from pipelines.training import checkpoints
from pipelines.training.failures import as_command_error, nonfinite_error, resume_hint
from tests.support.ray_records import checkpoint_name, write_checkpoints
from tests.support.training_jobs import training_job

BROKEN_CONNECTION = RuntimeError("Connection closed by peer [10.0.0.1]")


def test_cause_is_the_original_error_and_not_a_resulting_connection_error():
    disk_full, died = OSError(28, "No space left on device"), RayActorError()
    assert first_cause(WorkerGroupError("", {0: BROKEN_CONNECTION, 3: disk_full})) == Cause(disk_full, 3)
    wrapped = UserExceptionWithTraceback(disk_full, "traceback")
    assert first_cause(WorkerGroupError("", {0: wrapped})) == Cause(disk_full, 0)
    assert first_cause(WorkerGroupError("", {0: BROKEN_CONNECTION})) == Cause(BROKEN_CONNECTION, 0)
    assert first_cause(WorkerGroupError("", {0: BROKEN_CONNECTION, 1: died})) == Cause(died, 1)
    assert first_cause(ControllerError(disk_full)) == Cause(disk_full, None)


def test_message_names_the_cause_and_where_to_resume(tmp_path):
    job = replace(training_job(tmp_path), skip_nonfinite=3)
    assert resume_hint(job) == "there is no checkpoint yet, so the same command starts from the beginning"
    write_checkpoints(tmp_path / "runs/r", [10, 20])
    hint = f"the same command resumes from the checkpoint of step 20 ({tmp_path}/runs/r/{checkpoint_name(20)})"
    assert resume_hint(job) == hint
    error = as_command_error(WorkerGroupError("", {1: ValueError("odd\nnumber")}), job)
    assert isinstance(error, RunError)
    assert str(error) == f"training failed: worker 1: ValueError: odd; {hint}"
    assert isinstance(as_command_error(WorkerGroupError("", {1: InputError("no data")}), job), InputError)
    nonfinite = str(nonfinite_error(job, 21))
    assert nonfinite.startswith(f"the gradient of step 21 is not finite; {hint}")
    assert "--skip-nonfinite 4" in nonfinite
    (tmp_path / "runs/r" / checkpoints.CHECKPOINT_RECORD).write_text("{")
    assert "the run's checkpoints cannot be read now" in resume_hint(job)
