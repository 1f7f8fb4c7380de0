"""The warnings for runs that are too short for their preset's schedule."""

from dataclasses import replace

import pytest

from meanflow_core.presets import PRESETS
from meanflow_core.training import learning_rate
from pipelines.train.short_runs import short_run_warnings


@pytest.mark.parametrize("preset", ["xl2", "b4", "imf_xl2", "demo", "clothing", "fashion"])
def test_presets_at_their_own_length_give_no_warning(preset):
    assert short_run_warnings(PRESETS[preset](), has_initial_network=False) == []


def test_a_short_run_names_the_learning_rate_that_it_reaches_and_the_initial_share_of_the_average():
    config = replace(PRESETS["clothing"](), num_steps=400, ema_decays=(0.998, 0.98))
    rate, average = short_run_warnings(config, has_initial_network=False)
    highest = max(learning_rate(config.optimizer, step, 400) for step in range(400))
    assert f"only reaches {highest / config.optimizer.learning_rate:.0%} of 0.004" in rate
    assert "--optimizer.warmup-steps 40 --optimizer.cooldown-steps 100" in rate
    assert "still make up 45% of the average with decay 0.998." in average
    assert short_run_warnings(config, has_initial_network=True) == [rate]


def test_a_preset_without_a_cool_down_is_not_given_one():
    [rate, _] = short_run_warnings(replace(PRESETS["imf_b2"](), num_steps=1000), has_initial_network=False)
    assert "--optimizer.warmup-steps 100" in rate
    assert "--optimizer.cooldown-steps" not in rate


def test_the_proposed_values_give_no_warning():
    config = replace(PRESETS["clothing"](), num_steps=400, ema_decays=(0.98,))
    config = replace(config, optimizer=replace(config.optimizer, warmup_steps=40, cooldown_steps=100))
    assert short_run_warnings(config, has_initial_network=False) == []
