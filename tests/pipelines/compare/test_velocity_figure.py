"""The figure's velocities, in closed form."""

import numpy as np
import pytest

from pipelines.compare.velocity_figure import EXAMPLE, Mixture


def test_velocity_of_one_gaussian_maps_noise_onto_it():
    # For N(m, s^2 I) the map is z_0 = m + s z_1.
    mixture = Mixture(means=np.array([[2.0, -1.0]]), std=0.5)
    z = np.random.default_rng(0).standard_normal((20, 2))
    end = z - mixture.average_velocity(z, 0.0, 1.0)
    assert end == pytest.approx(mixture.means + 0.5 * z, abs=1e-6)


@pytest.mark.parametrize(("r", "t"), [(0.0, 0.9), (0.2, 0.7), (0.5, 0.95)])
def test_average_velocity_satisfies_the_meanflow_identity(r, t):
    z, h = np.random.default_rng(0).standard_normal((50, 2)), 1e-4
    v = EXAMPLE.velocity(z, t)
    after, before = (EXAMPLE.average_velocity(z + side * v, r, t + side) for side in (h, -h))
    du_dt = (after - before) / (2.0 * h)
    assert np.abs(v - (t - r) * du_dt - EXAMPLE.average_velocity(z, r, t)).max() < 1e-4
    assert np.abs((t - r) * du_dt).max() > 0.1


def test_one_step_with_the_velocity_ends_at_the_mean_of_the_data():
    z = np.random.default_rng(0).standard_normal((50, 2))
    assert z - EXAMPLE.velocity(z, 1.0) == pytest.approx(np.tile(EXAMPLE.means.mean(axis=0), (50, 1)))
