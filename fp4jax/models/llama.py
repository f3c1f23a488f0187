"""Llama, dense (arXiv 2302.13971, with the grouped heads of 2307.09288): Qwen3 without the norms of its heads.

SmolLM2 (arXiv 2502.02737) is one.
"""

import dataclasses
from typing import ClassVar

from fp4jax.models.qwen3 import Qwen3, Qwen3Config


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Qwen3Config):
    """The architecture; its fields are those of Qwen3."""

    qk_norm: ClassVar[bool] = False


class Llama(Qwen3):
    """tokens → logits, built from a `LlamaConfig`; its parameters are Qwen3's but for `q_norm` and `k_norm`."""
