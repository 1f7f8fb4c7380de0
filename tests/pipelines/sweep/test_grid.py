import pytest

from meanflow_core.presets.demo import debug
from pipelines.errors import InputError
from pipelines.sweep.grid import expand


def test_grid_has_all_combinations_and_their_names():
    variants = expand(["optimizer.learning_rate=1e-3,3e-3", "seed=0,1"], debug())
    assert [(v.name, v.config.optimizer.learning_rate, v.config.seed) for v in variants] == [
        ("learning_rate-0.001_seed-0", 1e-3, 0),
        ("learning_rate-0.001_seed-1", 1e-3, 1),
        ("learning_rate-0.003_seed-0", 3e-3, 0),
        ("learning_rate-0.003_seed-1", 3e-3, 1),
    ]


@pytest.mark.parametrize(
    ("specification", "field", "values"),
    [
        ("compile=True,false", "compile", [True, False]),
        ("precision=tf32,float32", "precision", ["tf32", "float32"]),
        ("ema_decays=0.99,0.9 0.99", "ema_decays", [(0.99,), (0.9, 0.99)]),
        ("optimizer.max-gradient-norm=None,1", "optimizer.max_gradient_norm", [None, 1.0]),
        ("loss.times.logit_mean=-0.4,0", "loss.times.logit_mean", [-0.4, 0.0]),
        ("optimizer.name=adam,my.module:make", "optimizer.name", ["adam", "my.module:make"]),
    ],
)
def test_values_are_parsed_to_the_type_of_the_field(specification, field, values):
    variants = expand([specification], debug())
    assert [variant.config.flat()[field] for variant in variants] == values
    assert not any(set("/:=+ ") & set(variant.name) for variant in variants)  # they name folders and metrics


def test_values_that_depend_on_each_other_are_set_together():
    # Each alone is invalid: 64 is no multiple of 3 heads, and 96 / 3 needs both.
    [variant] = expand(["network.num_heads=3", "network.hidden_size=96"], debug())
    assert (variant.config.network.hidden_size, variant.config.network.num_heads) == (96, 3)


@pytest.mark.parametrize(
    ("specifications", "message"),
    [
        (["optimizer.learning_rat=1"], "no field 'optimizer.learning_rat'; near names: optimizer.learning_rate,"),
        (["learning_rate=1"], "no field 'learning_rate'; near names: optimizer.learning_rate$"),
        (["loss.class=a"], "no field 'loss.class'"),
        (["seed=a"], "--vary seed must be of type int, but got 'a'"),
        (
            ["precision=fp8"],
            r"--vary precision must be of type Literal\['float32', 'tf32', 'bfloat16'\], but got 'fp8'",
        ),
        (["network.hidden_size=66"], "--vary hidden_size-66: network.hidden_size must be a multiple of 4"),
        (["seed=1,1"], "values of a field must differ"),
        (["seed=1", "seed=2"], "each field once"),
        (["seed"], "must be FIELD=VALUE,VALUE"),
    ],
)
def test_invalid_specifications_are_refused(specifications, message, capsys):
    with pytest.raises(InputError, match=message):
        expand(specifications, debug())
    assert capsys.readouterr().err == ""
