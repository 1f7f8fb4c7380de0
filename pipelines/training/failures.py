"""Error messages for failed runs: the cause, and the checkpoint from which the same command resumes."""

from ray.train import TrainingFailedError

from pipelines import storage
from pipelines.cluster import first_cause
from pipelines.errors import InputError, RunError
from pipelines.training import checkpoints
from pipelines.training.job import RunJob


def as_command_error(error: TrainingFailedError, job: RunJob) -> InputError | RunError:
    """Converts a training failure into an error for the command line."""
    cause = first_cause(error)
    if isinstance(cause.error, InputError):
        return InputError(str(cause.error))
    first_line = (str(cause.error).strip().splitlines() or [""])[0]
    worker = "" if cause.rank is None else f"worker {cause.rank}: "
    return RunError(f"training failed: {worker}{type(cause.error).__name__}: {first_line}; {resume_hint(job)}")


def nonfinite_error(job: RunJob, step: int) -> RunError:
    """Returns the error that reports a nonfinite gradient."""
    return RunError(
        f"the gradient of step {step} is not finite; {resume_hint(job)}. Add --skip-nonfinite {job.skip_nonfinite + 1} to "
        f"skip the step, or start a new run with a smaller optimizer.learning_rate or optimizer.max_gradient_norm"
    )


def resume_hint(job: RunJob) -> str:
    """Says at which checkpoint the same command resumes. Never raises."""
    try:
        last = checkpoints.committed(*storage.open_storage(job.run_location))
    except (InputError, OSError) as error:
        return f"the run's checkpoints cannot be read now ({error})"
    if last is None:
        return "there is no checkpoint yet, so the same command starts from the beginning"
    return f"the same command resumes from the checkpoint of step {last.step} ({last.latest.path})"
