"""Error messages for failed runs: the cause, and the checkpoint from which the same command resumes."""

from dataclasses import dataclass

from ray.exceptions import RayError
from ray.train import TrainingFailedError

from pipelines import storage
from pipelines.errors import InputError, RunError
from pipelines.private_interfaces import original_error
from pipelines.train import checkpoints
from pipelines.train.job import TrainJob


@dataclass(frozen=True)
class Cause:
    """Why training failed."""

    error: BaseException
    """The original error."""
    rank: int | None
    """The worker that raised it; None for Ray's controller."""


def first_cause(error: TrainingFailedError) -> Cause:
    """Finds the error that made training fail, ignoring the connection errors that it caused on other workers."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return Cause(getattr(error, "controller_failure", error), None)
    causes = [Cause(original_error(failure), rank) for rank, failure in failures.items()]
    consequences = ("connection", "nccl", "gloo", "timed out")
    original = [
        cause
        for cause in causes
        if isinstance(cause.error, RayError) or not any(word in str(cause.error).lower() for word in consequences)
    ]
    return (original or causes)[0]


def as_command_error(error: TrainingFailedError, job: TrainJob) -> InputError | RunError:
    """Converts a training failure into an error for the command line."""
    cause = first_cause(error)
    if isinstance(cause.error, InputError):
        return InputError(str(cause.error))
    first_line = (str(cause.error).strip().splitlines() or [""])[0]
    worker = "" if cause.rank is None else f"worker {cause.rank}: "
    return RunError(f"training failed: {worker}{type(cause.error).__name__}: {first_line}; {resume_hint(job)}")


def nonfinite_error(job: TrainJob, step: int) -> RunError:
    """Returns the error that reports a nonfinite gradient."""
    return RunError(
        f"the gradient of step {step} is not finite; {resume_hint(job)}. Add --skip-nonfinite {job.skip_nonfinite + 1} to "
        f"skip the step, or start a new run with a smaller optimizer.learning_rate or optimizer.max_gradient_norm"
    )


def resume_hint(job: TrainJob) -> str:
    """Says at which checkpoint the same command resumes. Never raises."""
    try:
        last = checkpoints.committed(*storage.open_storage(job.run_location))
    except (InputError, OSError) as error:
        return f"the run's checkpoints cannot be read now ({error})"
    if last is None:
        return "there is no checkpoint yet, so the same command starts from the beginning"
    return f"the same command resumes from the checkpoint of step {last.step} ({last.latest.path})"
