"""Rules that the fields of configurations must follow."""

import math
from collections.abc import Callable
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]  # the requirement in words, and its test
POSITIVE: Rule = ("be above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Rule = ("be at least 0", lambda value: 0 <= value < math.inf)
AT_LEAST_1: Rule = ("be at least 1", lambda value: 1 <= value < math.inf)
IN_0_TO_1: Rule = ("lie in [0, 1]", lambda value: 0 <= value <= 1)
IN_ABOVE_0_TO_1: Rule = ("be above 0 and at most 1", lambda value: 0 < value <= 1)
IN_0_TO_BELOW_1: Rule = ("lie in [0, 1)", lambda value: 0 <= value < 1)
NOT_NEGATIVE_INTEGER: Rule = ("be a whole number of at least 0", lambda value: isinstance(value, int) and value >= 0)
POSITIVE_INTEGER: Rule = ("be a whole number above 0", lambda value: isinstance(value, int) and value >= 1)


def one_of(*choices: str) -> Rule:
    """The rule that a value is one of these."""
    return f"be one of {', '.join(choices)}", lambda value: value in choices


def require(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check(config: object, section: str, rule: Rule, *names: str) -> None:
    """Raises ValueError for the first field whose value violates the rule. section: prefix of the names in the error."""
    requirement, holds = rule
    for name in names:
        value = getattr(config, name)
        require(holds(value), f"{section}{name} must {requirement}, but got {value!r}")


def check_interval(config: Any, section: str) -> None:
    """Raises ValueError unless the guidance interval lies in [0, 1]. section: names the configuration in the error."""
    start, end = config.guidance_interval_start, config.guidance_interval_end
    require(
        0.0 <= start <= end <= 1.0,
        f"{section} needs 0 <= guidance_interval_start <= guidance_interval_end <= 1, but got {start} and {end}",
    )
