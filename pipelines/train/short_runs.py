"""Warns if a run is too short for its preset's schedule: the settings of presets belong to their numbers of steps."""

from meanflow_core.config import TrainingConfig

MAX_INITIAL_SHARE = 0.05
MIN_PEAK = 0.95


def short_run_warnings(config: TrainingConfig, *, has_initial_network: bool) -> list[str]:
    """What to change for so few steps; empty if nothing.

    - Warm-up and cool-down overlap, so that the learning rate stays below its value.
    - A moving average still contains too much of the random initial parameters. With an initial network, these are not
      random.
    """
    warnings, optimizer, steps = [], config.optimizer, config.num_steps
    schedule = optimizer.warmup_steps + optimizer.cooldown_steps
    peak = min(1.0, (steps + 1) / max(schedule, 1))  # where the two lines cross
    if peak < MIN_PEAK:
        options = {"warmup": steps // 10, "cooldown": steps // 4}
        advice = " ".join(
            f"--optimizer.{name}-steps {value}"
            for name, value in options.items()
            if getattr(optimizer, f"{name}_steps")
        )
        warnings.append(
            f"{steps} steps are too few for a warm-up of {optimizer.warmup_steps} and a cool-down of "
            f"{optimizer.cooldown_steps}: the learning rate only reaches {peak:.0%} of {optimizer.learning_rate:g}. "
            f"Give, for example, {advice}"
        )
    slow = [decay for decay in config.ema_decays if decay**steps > MAX_INITIAL_SHARE]
    if slow and not has_initial_network:
        shares = ", ".join(f"{decay**steps:.0%} of the average with decay {decay:g}" for decay in slow)
        warnings.append(
            f"{steps} steps are too few for the moving averages: at the end, the random initial parameters still make up "
            f"{shares}. Give, for example, --ema-decays {1 - 8 / max(steps, 16):.4g}"
        )
    return warnings
