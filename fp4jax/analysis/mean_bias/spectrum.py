"""Mean, spike and tail of a matrix of activations [tokens, features], from sums over chunks of tokens.

X = 1 mu + X_R with mu the column mean; X_R = spike + tail with the spike its k leading singular components,
k = max(1, floor(0.01 features)). The parts are orthogonal, so that

    |X|² = tokens |mu|² + sum_{i <= k} s_i² + sum_{i > k} s_i²      (eq. 6-7)

holds exactly. Memory is that of one Gram matrix [features, features], whatever the number of tokens.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float64

SPIKE_SHARE = 0.01


def spike_rank(features: int) -> int:
    """k = floor(0.01 features), at least 1."""
    return max(1, int(SPIKE_SHARE * features))


class Moments:
    """Count, column sums and Gram matrix in float64, chunk by chunk."""

    def __init__(self, features: int):
        self.count = 0
        self.energy = 0.0
        self.sums = np.zeros(features)
        self.gram = np.zeros((features, features))

    def add(self, x: Float[np.ndarray, "tokens features"]) -> None:
        """Takes in a chunk of tokens."""
        x = x.astype(np.float64)
        self.count += len(x)
        self.energy += float(np.vdot(x, x))
        self.sums += x.sum(axis=0)
        self.gram += x.T @ x

    def spectrum(self) -> "Spectrum":
        """The decomposition of all that was taken in.

        Raises:
          ValueError: nothing was.
        """
        if not self.count:
            raise ValueError("no tokens were added")
        mean = self.sums / self.count
        values, vectors = np.linalg.eigh(self.gram)
        residual, directions = np.linalg.eigh(self.gram - self.count * np.outer(mean, mean))
        k = spike_rank(len(mean))
        return Spectrum(
            count=self.count,
            energy=self.energy,
            mean=mean,
            singular=np.sqrt(np.maximum(values[::-1], 0.0)),
            right=vectors[:, ::-1].T,
            residual_energies=residual[::-1],
            spike=directions[:, ::-1][:, :k].T,
        )


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Attributes:
    count: tokens.
    energy: |X|², summed directly.
    mean: mu.
    singular, right: singular values of X, descending, and its right singular vectors as rows.
    residual_energies: squared singular values of X_R, descending (rounding may leave the last slightly below 0).
    spike: the k leading right singular vectors of X_R as rows.
    """

    count: int
    energy: float
    mean: Float64[np.ndarray, " m"]
    singular: Float64[np.ndarray, " m"]
    right: Float64[np.ndarray, "m m"]
    residual_energies: Float64[np.ndarray, " m"]
    spike: Float64[np.ndarray, "k m"]

    @property
    def mean_energy(self) -> float:
        """tokens |mu|²."""
        return self.count * float(self.mean @ self.mean)

    @property
    def spike_energy(self) -> float:
        """Energy of X_R along its k leading directions."""
        return float(self.residual_energies[: len(self.spike)].sum())

    @property
    def tail_energy(self) -> float:
        """The rest of X_R's energy."""
        return float(self.residual_energies[len(self.spike) :].sum())

    @property
    def identity_error(self) -> float:
        """|mean + spike + tail - |X|²| / |X|²: rounding alone (eq. 6-7)."""
        parts = self.mean_energy + self.spike_energy + self.tail_energy
        return abs(parts - self.energy) / self.energy

    @property
    def ratio(self) -> float:
        """R = sqrt(tokens) |mu| / |X|: the mean's share of the Frobenius norm; R² is its share of the energy.

        Derived reading of eq. 1: 0 for columns without mean, 1 for equal tokens.
        """
        return float(np.sqrt(self.mean_energy / self.energy))

    @property
    def direction(self) -> Float64[np.ndarray, " m"]:
        """mu / |mu|; zeros for a mean of zero."""
        norm = np.linalg.norm(self.mean)
        return self.mean / norm if norm else self.mean

    def cosines(self, leading: int) -> Float64[np.ndarray, " leading"]:
        """|cos| of mu with the leading right singular vectors of X (fig. 1b); its squares sum to 1 over all."""
        return np.abs(self.right[:leading] @ self.direction)


def sign_consistency(projections: Float64[np.ndarray, " tokens"]) -> float:
    """The share of tokens whose projection on the mean direction is above 0 (fig. 1a): 1 for a pure mean, about .5
    for none.
    """
    return float(np.mean(projections > 0.0))


def increments(means: Float64[np.ndarray, "L m"]) -> tuple[Float64[np.ndarray, " L1"], Float64[np.ndarray, " L1"]]:
    """|mu_{l+1} - mu_l| and the cosine of the increment with mu_l (derived reading of eq. 4).

    A positive cosine adds to the mean so far, a negative one takes from it.
    """
    steps = np.diff(means, axis=0)
    norms = np.linalg.norm(steps, axis=1)
    before = np.linalg.norm(means[:-1], axis=1)
    return norms, np.sum(steps * means[:-1], axis=1) / np.maximum(norms * before, 1e-300)


def growth_exponent(mean: Float64[np.ndarray, " m"], seed: int = 0, draws: int = 64) -> float:
    """Slope of log |mu over h random features| against log h, from medians (derived reading of eq. 5).

    1/2 says that |mu| grows with sqrt(width), as it does where every feature carries alike; a mean in a few features
    has another slope.

    Raises:
      ValueError: fewer than 16 features.
    """
    if len(mean) < 16:
        raise ValueError(f"a growth exponent needs at least 16 features, got {len(mean)}")
    random = np.random.default_rng(seed)
    widths = np.unique(np.geomspace(8, len(mean), 8).astype(int))
    medians = []
    for width in widths:
        subsets = [random.choice(len(mean), width, replace=False) for _ in range(draws)]
        medians.append(np.median([np.linalg.norm(mean[subset]) for subset in subsets]))
    return float(np.polyfit(np.log(widths), np.log(np.maximum(medians, 1e-300)), 1)[0])
