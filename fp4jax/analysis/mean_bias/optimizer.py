"""Adam's second moment in the mean direction (section 7, derived reading)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Share(NamedTuple):
    """share: sum_i u_i² nu_i / sum_i nu_i; excess: over 1/inputs, that of a second moment equal for all inputs."""

    share: float
    excess: float


def second_moment_share(nu: Float[np.ndarray, "inputs outputs"], mean: Float[np.ndarray, " inputs"]) -> Share:
    """How much of a kernel's second moment lies in the direction u = mean / |mean| of what the kernel reads.

    nu_i is summed over the outputs. Adam keeps the diagonal alone, so this is E|u * g|² with the correlations between
    inputs left out; from the gradient itself the share would be larger where they agree in sign.

    Raises:
      ValueError: a mean or a second moment of 0.
    """
    of_inputs = nu.astype(np.float64).sum(axis=1)
    weights = mean.astype(np.float64) ** 2
    if not weights.sum() or not of_inputs.sum():
        raise ValueError("the mean or the second moment is 0; it has no direction")
    share = float(weights @ of_inputs / weights.sum() / of_inputs.sum())
    return Share(share, share * len(of_inputs))
