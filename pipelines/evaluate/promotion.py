"""Decides whether the evaluated version of a registered model becomes its champion, and moves the alias.

A version is promoted if its distance at the first setting is smaller than the champion's under the same protocol, by more
than SIGNIFICANT_ERRORS standard errors of the difference; or below --promote-below; or if the model has no champion.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.side_by_side import SIGNIFICANT_ERRORS, protocol_differences, read_report
from pipelines.tracking.registry import CHAMPION, Version, find_version, move_alias

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether to promote a version, and why."""

    promote: bool
    reason: str


def decide(report: Mapping[str, Any], champion: Mapping[str, Any] | None, *, below: float | None = None) -> Decision:
    """Compares the first settings of two reports.

    champion: the champion's report, or None if there is no champion. below: a distance that is always good enough.
    """
    entry = report["samples"][0]
    if report["protocol"].get("generator", {}).get("is_trained_on_extractor", False):
        return Decision(
            promote=False,
            reason="it was trained on this extractor's distance (`meanflow refine`); evaluate it with a held-out extractor",
        )
    found = f"{entry['frechet']:.4g} ± {entry['frechet_standard_error']:.2g} ({entry['title']})"
    if below is not None and entry["frechet"] < below:
        return Decision(promote=True, reason=f"its distance {found} is below {below:g}")
    if champion is None:
        return Decision(promote=True, reason=f"its distance is {found}, and there is no champion")
    differences = protocol_differences({"the candidate": report, "the champion": champion})
    if differences:
        return Decision(
            promote=False,
            reason=f"the champion was measured by another protocol ({'; '.join(differences)}); evaluate both in the same way",
        )
    theirs = next((other for other in champion["samples"] if other["title"] == entry["title"]), None)
    if theirs is None:
        return Decision(
            promote=False, reason=f"the champion was not measured at {entry['title']}; evaluate it there, too"
        )
    error = (entry["frechet_standard_error"] ** 2 + theirs["frechet_standard_error"] ** 2) ** 0.5
    gain = theirs["frechet"] - entry["frechet"]
    figures = (
        f"its distance is {found}, the champion's {theirs['frechet']:.4g} ± {theirs['frechet_standard_error']:.2g}"
    )
    if gain > SIGNIFICANT_ERRORS * error:
        return Decision(promote=True, reason=figures)
    return Decision(
        promote=False,
        reason=f"{figures}: better by {gain:.3g}, but more than {SIGNIFICANT_ERRORS * error:.3g} is needed",
    )


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A registered version that may become the champion."""

    version: Version
    champion: Mapping[str, Any] | None
    """The champion's report; None if there is no champion."""
    champion_number: int | None
    """The champion's version; None if there is no champion."""
    below: float | None


def open_promotion(job: EvaluateJob, tracking_uri: str | None) -> Promotion | None:
    """Finds the version of --model and the champion's report, before anything is measured.

    Returns None if the version is the champion already. Raises InputError if the model is not registered, if the champion has
    no report, or if MLflow does not answer.
    """
    version = None if job.model is None else find_version(job.model, tracking_uri)
    if version is None:
        raise InputError(
            f"--promote needs a registered model, such as models:/NAME@candidate, and the address of MLflow, but got "
            f"{job.model or job.samples} at {tracking_uri or 'no address'}"
        )
    name = f"models:/{version.name}@{CHAMPION}"
    champion = find_version(name, tracking_uri)
    if champion is None:
        return Promotion(version=version, champion=None, champion_number=None, below=job.promote_below)
    if champion.number == version.number:
        logger.info("version %s of %s is the champion already", version.number, version.name)
        return None
    report = read_report(name, tracking_uri)
    measured = report["protocol"].get("generator", {}).get("transformer_sha256")
    if measured and champion.weights_sha256 and measured != champion.weights_sha256:
        raise InputError(
            f"the last evaluation of run {champion.run_id} measured other weights than those of the champion; evaluate "
            f"{champion.uri} first"
        )
    return Promotion(version=version, champion=report, champion_number=champion.number, below=job.promote_below)


def promote_if_better(promotion: Promotion, report: Mapping[str, Any]) -> Decision:
    """Decides, moves the alias if the version is better, and logs the decision."""
    decision, version = decide(report, promotion.champion, below=promotion.below), promotion.version
    champion = find_version(f"models:/{version.name}@{CHAMPION}", version.tracking_uri)
    if (None if champion is None else champion.number) != promotion.champion_number:
        decision = Decision(promote=False, reason="the champion changed during the evaluation; evaluate again")
    if decision.promote:
        move_alias(version, CHAMPION)
    verdict = "becomes" if decision.promote else "does not become"
    logger.info("version %s of %s %s the champion: %s", version.number, version.name, verdict, decision.reason)
    return decision
