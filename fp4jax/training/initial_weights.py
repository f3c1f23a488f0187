"""The weights that a run continues from: read once, at its first step, and checked against its configuration."""

import dataclasses
import math

import ml_collections
from jaxtyping import Array, Float32

from fp4jax.config import ConfigError
from fp4jax.data.tokenizers import load_tokenizer
from fp4jax.models.pretrained import LoadedModel, MissingTokenizer, load_parameters
from fp4jax.models.registry import MODELS, name_of

# What a run may choose for itself, whatever the weights were trained with.
_FREE = ("init_std", "dtype", "remat", "attention", "capacity", "groups", "router_loss_coefficient")
# Two tokenizers that agree on this and on the end of a text are taken for the same: letters, digits, scripts, spaces.
_PROBE = "The 1,024 states' (e.g. Wisconsin's) naïve façade — 東京,\n\n\tdon't  re-read: x_1 += 3.14; 🙂"


def pretrained_parameters(config: ml_collections.ConfigDict) -> dict[str, Float32[Array, "..."]]:
    """The parameters of `config.init_from` by dotted path.

    Raises:
      ConfigError: they are of a model with another architecture or tokenizer; all differences are listed.
      ValueError: they cannot be read.
    """
    loaded = load_parameters(config.init_from)
    differences = _differences(config, loaded)
    if differences:
        raise ConfigError(
            f"init_from={config.init_from!r} is another model than the config's: {'; '.join(differences)}; "
            "give the config its values"
        )
    _check_tokenizer(config, loaded)
    return dict(loaded.params)


def _differences(config: ml_collections.ConfigDict, loaded: LoadedModel) -> list[str]:
    theirs = name_of(loaded.config)
    if config.model.name != theirs:
        return [f"model.name={config.model.name!r}, it is {theirs!r}"]
    ours = MODELS[theirs][1].from_config(config.model)
    names = [field.name for field in dataclasses.fields(ours) if field.name not in _FREE]
    pairs = {name: (getattr(ours, name), getattr(loaded.config, name)) for name in names}
    return [f"model.{name}={a}, it has {b}" for name, (a, b) in pairs.items() if not _agree(a, b)]


def _agree(a: object, b: object) -> bool:
    """Files hold some numbers in float32."""
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(b, float) else a == b


def _check_tokenizer(config: ml_collections.ConfigDict, loaded: LoadedModel) -> None:
    """Another tokenizer's ids would be read as this one's, and nothing else would notice.

    A folder without a tokenizer leaves the choice to the config.
    """
    if isinstance(loaded.tokenizer, MissingTokenizer):
        return
    ours = load_tokenizer(config.data.tokenizer)
    if (ours.end_of_text, ours.encode(_PROBE)) != (loaded.tokenizer.end_of_text, loaded.tokenizer.encode(_PROBE)):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} is not the tokenizer of init_from={config.init_from!r}; "
            f"set --config.data.tokenizer={loaded.tokenizer.name}"
        )
