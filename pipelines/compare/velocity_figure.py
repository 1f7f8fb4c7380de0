"""Figure of the instantaneous and the average velocity in the plane, in closed form: no network, no training.

    z_t = (1 - t) x + t e,  x from a mixture of Gaussians N(m_k, s^2 I), e from N(0, I)
    v(z, t) = E[e - x | z_t = z]                          instantaneous velocity: tangent to the paths
    u(z, r, t) = 1 / (t - r) integral of v over [r, t]    average velocity on the path through z at time t

Data is at t = 0, noise at t = 1. Source: Geng et al. 2025, Figures 1 to 3 and Eq. 3.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

# N points, K Gaussians, T times


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Mixture of K Gaussians in the plane, with equal weights and equal standard deviations."""

    means: np.ndarray
    """Means m_k (K, 2)."""
    std: float
    """Standard deviation s."""

    def sample(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Draws points (count, 2)."""
        chosen = self.means[generator.integers(len(self.means), size=count)]
        return chosen + self.std * generator.standard_normal((count, 2))

    def velocity(self, z: np.ndarray, t: float) -> np.ndarray:
        """Exact v(z, t) at points (N, 2), as (N, 2).

        Given k, z_t ~ N((1 - t) m_k, ((1 - t)^2 s^2 + t^2) I), and the means of x and e are linear in z_t.
        """
        variance = (1.0 - t) ** 2 * self.std**2 + t**2
        offsets = z[:, None, :] - (1.0 - t) * self.means  # (N, K, 2)
        exponents = -np.square(offsets).sum(axis=2) / (2.0 * variance)  # (N, K)
        responsibilities = np.exp(exponents - exponents.max(axis=1, keepdims=True))
        responsibilities /= responsibilities.sum(axis=1, keepdims=True)
        noise = t / variance * offsets  # E[e | z, k]
        data = self.means + (1.0 - t) * self.std**2 / variance * offsets  # E[x | z, k]
        return (responsibilities[:, :, None] * (noise - data)).sum(axis=1)

    def path(self, z: np.ndarray, t: float, r: float, num_steps: int = 200) -> np.ndarray:
        """Paths of points (N, 2) from time t to r by the fourth-order Runge-Kutta method: (num_steps + 1, N, 2)."""
        step = (r - t) / num_steps
        points = [z]
        for now in np.linspace(t, r, num_steps + 1)[:-1]:
            z = points[-1]
            k1 = self.velocity(z, now)
            k2 = self.velocity(z + step / 2 * k1, now + step / 2)
            k3 = self.velocity(z + step / 2 * k2, now + step / 2)
            k4 = self.velocity(z + step * k3, now + step)
            points.append(z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
        return np.stack(points)

    def average_velocity(self, z: np.ndarray, r: float, t: float, num_steps: int = 200) -> np.ndarray:
        """u(z, r, t) at points (N, 2): displacement along their paths over t - r; v at r = t."""
        if r == t:
            return self.velocity(z, t)
        return (z - self.path(z, t, r, num_steps)[-1]) / (t - r)


# The data lies to the right of the noise, so that paths do not cross: some bend up, some bend down, some go far.
EXAMPLE = Mixture(means=np.array([[5.0, 2.6], [7.2, 0.1], [4.6, -2.5]]), std=0.35)


def draw_velocities(path: Path, mixture: Mixture = EXAMPLE) -> None:
    """Draws three panels: velocities along paths, average velocities along chords, and one step with each."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    generator = np.random.default_rng(4)
    data = mixture.sample(600, generator)
    noise = generator.standard_normal((600, 2))
    angles = np.linspace(0.0, 2.0 * np.pi, 7, endpoint=False) + 0.35
    few = 1.25 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    few_paths = mixture.path(few, 1.0, 0.0)  # (T, N, 2)
    many = generator.standard_normal((300, 2))
    figure, axes = pyplot.subplots(1, 3, figsize=(13.5, 4.3), layout="constrained", sharex=True, sharey=True)
    for axis in axes:
        axis.scatter(*noise.T, s=3, color="0.80", linewidths=0)
        axis.scatter(*data.T, s=3, color="#9ecae1", linewidths=0)
        axis.set(aspect="equal", xticks=[], yticks=[], xlim=(-3.2, 8.6), ylim=(-4.2, 4.4))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2.0}
        axis.text(0.0, -3.8, "noise, t = 1", ha="center", color="0.45", bbox=box)
        axis.text(5.4, -3.8, "data, t = 0", ha="center", color="#3182bd", bbox=box)

    axes[0].set_title("instantaneous velocity v(z, t): tangent to the path")
    axes[1].set_title("average velocity u(z, 0, t): straight to the end")
    for axis in axes[:2]:
        axis.plot(*few_paths.transpose(2, 0, 1), color="0.45", lw=1.0, zorder=2)
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1.0, "width": 0.005, "zorder": 3}
    for fraction in (0.0, 0.4, 0.75):
        index = round(fraction * (len(few_paths) - 1))
        points, t = few_paths[index], 1.0 - fraction
        axes[0].scatter(*points.T, s=14, color="black", zorder=4)
        axes[0].quiver(*points.T, *(-0.22 * mixture.velocity(points, t)).T, color="tab:orange", **arrows)
    axes[1].scatter(*few.T, s=14, color="black", zorder=4)
    axes[1].quiver(*few.T, *(-mixture.average_velocity(few, 0.0, 1.0)).T, color="tab:green", **arrows)

    axes[2].set_title("one step from t = 1")
    by_velocity = many - mixture.velocity(many, 1.0)
    by_average = many - mixture.average_velocity(many, 0.0, 1.0)
    axes[2].scatter(*by_average.T, s=9, color="tab:green", zorder=3, label="with u: on the data")
    axes[2].scatter(
        *by_velocity.T, s=60, marker="X", color="tab:orange", zorder=4, label="with v: all at the mean of the data"
    )
    axes[2].legend(loc="upper left", framealpha=1.0)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
