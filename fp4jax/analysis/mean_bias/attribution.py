"""Which part makes the largest entries: mean, spike or tail (eq. 8, fig. 4).

With x = a + b + c (mean, spike, tail) the sum over the chosen entries of x² is that of a² + b² + c² + 2ab + 2ac + 2bc.
The squares' shares alone need not sum to 1; with the cross terms they do.
"""

import numpy as np
from jaxtyping import Float, Float64

from fp4jax.analysis.mean_bias.spectrum import Spectrum

TOP_SHARE = 0.001
TERMS = ("mean", "spike", "tail", "mean x spike", "mean x tail", "spike x tail")


class TopEntries:
    """The largest entries by magnitude with their parts, over chunks of tokens; keeps no more than `kept` of them."""

    def __init__(self, spectrum: Spectrum, share: float = TOP_SHARE):
        self.spectrum = spectrum
        self.kept = max(1, int(share * spectrum.count * len(spectrum.mean)))
        self.parts = np.zeros((0, 3))

    def add(self, x: Float[np.ndarray, "tokens features"]) -> None:
        """Takes in a chunk of the tokens that the spectrum is of."""
        s = self.spectrum
        x = x.astype(np.float64)
        count = min(self.kept, x.size)
        chosen = np.argpartition(np.abs(x).ravel(), x.size - count)[x.size - count :]
        tokens, features = np.unravel_index(chosen, x.shape)
        mean = s.mean[features]
        spike = ((x - s.mean) @ s.spike.T @ s.spike)[tokens, features]
        found = np.stack([mean, spike, x[tokens, features] - mean - spike], axis=1)
        merged = np.concatenate([self.parts, found])
        order = np.argsort(-np.abs(merged.sum(axis=1)), kind="stable")
        self.parts = merged[order[: self.kept]]

    def shares(self) -> dict[str, float]:
        """The six TERMS as shares of the entries' energy; they sum to 1."""
        return shares(self.parts)


def shares(parts: Float64[np.ndarray, "entries 3"]) -> dict[str, float]:
    """The six TERMS of entries given as (mean, spike, tail), as shares of their energy."""
    products = parts.T @ parts
    total = float(products.sum())
    if not total:
        raise ValueError("the entries are all 0; nothing can be attributed")
    pairs = ((0, 1), (0, 2), (1, 2))
    values = [products[i, i] for i in range(3)] + [2.0 * products[i, j] for i, j in pairs]
    return dict(zip(TERMS, (float(value) / total for value in values), strict=True))
