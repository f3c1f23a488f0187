"""Everything the commands show of one model, in two passes over its tokens and bounded memory."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int32

from fp4jax.analysis.mean_bias import attribution, regeneration, spectrum
from fp4jax.analysis.mean_bias.capture import OPERATORS, SITES, Affine, capture
from fp4jax.models.qwen3 import Qwen3

LEADING = 8  # right singular vectors whose cosines are kept
BINS = np.linspace(-3.0, 3.0, 61)  # of the histogram of projections, in units of their root mean square

Chunks = Int32[np.ndarray, "chunks B T"]


def measure(model: Qwen3, chunks: Chunks, *, skip: int = 0, outliers: bool = True) -> dict[str, Any]:
    """Spectra, signs, attribution and operators by layer, as plain numbers and lists.

    Args:
      chunks: tokens; one chunk is in memory at a time.
      skip: leading positions of every row that are left out of all statistics.
      outliers: whether to make the second pass, which signs and attribution need.
    """
    moments, operators = _first_pass(model, chunks, skip)
    spectra = {name: [m.spectrum() for m in of_layers] for name, of_layers in moments.items()}
    second = _second_pass(model, chunks, skip, spectra) if outliers else {}
    sites = {}
    for name, of_layers in spectra.items():
        entries = [_site(s) for s in of_layers]
        for entry, extra in zip(entries, second.get(name, [{}] * len(entries)), strict=True):
            entry.update(extra)
        sites[name] = entries
    means = np.stack([s.mean for s in spectra[SITES[0]]])
    norms, cosines = spectrum.increments(means)
    embedding = np.asarray(model.embedding[...], np.float64)
    return {
        "sites": sites,
        "increments": {"norm": norms.tolist(), "cosine": cosines.tolist()},
        "growth": [spectrum.growth_exponent(mean) for mean in means],
        "expected_embedding": _expected(embedding, chunks[:, :, skip:], means[0]),
        "operators": operators,
    }


def _site(s: spectrum.Spectrum) -> dict[str, Any]:
    total = s.energy
    return {
        "ratio": s.ratio,
        "energy": {"mean": s.mean_energy / total, "spike": s.spike_energy / total, "tail": s.tail_energy / total},
        "identity_error": s.identity_error,
        "cosines": s.cosines(LEADING).tolist(),
        "norm": float(np.linalg.norm(s.mean)),
        "largest": float(np.abs(s.mean).max()),
    }


def _expected(embedding: np.ndarray, tokens: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """eq. 2 on the tokens themselves (exact), and from the frequencies of the other half of the tokens."""
    same = regeneration.expected_embedding(tokens, embedding)
    rows = tokens.reshape(-1, tokens.shape[-1])
    halves = [regeneration.expected_embedding(rows[i::2], embedding) for i in (0, 1)]
    uniform = embedding.mean(axis=0)
    return {
        "error": float(np.linalg.norm(same - measured) / np.linalg.norm(measured)),
        "cosine_of_halves": regeneration.cosine(*halves),
        "cosine_of_uniform": regeneration.cosine(uniform, measured),
    }


def _stream(record: dict, embedded: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    """(site, index, tokens): the residual stream's index 0 is the embedding, i + 1 what layer i leaves."""
    yield SITES[0], 0, embedded
    for name in SITES:
        for layer, x in enumerate(np.asarray(record["sites"][name])):
            yield name, layer + (name == SITES[0]), x


def _first_pass(model: Qwen3, chunks: Chunks, skip: int):
    layers, features = model.config.num_layers, model.config.hidden_size
    moments = {name: [spectrum.Moments(features) for _ in range(layers + (name == SITES[0]))] for name in SITES}
    sums: dict[str, dict[str, Any]] = {}
    for chunk in chunks:
        embedded, record = capture(model, jnp.asarray(chunk), skip=skip)
        for name, index, x in _stream(record, np.asarray(embedded)):
            moments[name][index].add(x)
        for group in ("sums", "energies", "squares", "softmax"):
            for name, value in record[group].items():
                kept = sums.setdefault(group, {})
                kept[name] = kept.get(name, 0.0) + np.asarray(value, np.float64)
    count = chunks.shape[0] * chunks.shape[1] * (chunks.shape[2] - skip)
    return moments, _operators(sums, count, len(chunks))


def _operators(sums: dict, count: int, chunks: int) -> dict[str, Any]:
    means = {name: sums["sums"][name] / count for name in OPERATORS}
    shares = {name: (count * (means[name] ** 2).sum(axis=-1) / sums["energies"][name]).tolist() for name in OPERATORS}
    gate, up = means["gate"], means["up"]
    deviation = np.sqrt(np.maximum(sums["squares"]["gate"] / count - gate**2, 0.0))
    covariance = sums["squares"]["gate up"] / count - gate * up
    predicted = {
        "silu(gate)": regeneration.gaussian_mean(regeneration.silu, gate, deviation),
        "SwiGLU output": regeneration.swiglu_mean(gate, deviation, up, covariance),
        "SwiGLU output, gate and up independent": regeneration.gaussian_mean(regeneration.silu, gate, deviation) * up,
        "attention output": means["values"],
    }
    return {
        "mean_share": shares,
        "uniform_attention": (sums["softmax"]["uniform"] / chunks).tolist(),
        "predicted": {name: _agreement(x, means[name.split(",")[0]]) for name, x in predicted.items()},
    }


def _agreement(predicted: Float64[np.ndarray, "L n"], measured: Float64[np.ndarray, "L n"]) -> dict[str, list[float]]:
    """Of a predicted mean with the measured one, by layer: the cosine and the relative error."""
    errors = np.linalg.norm(predicted - measured, axis=1) / np.linalg.norm(measured, axis=1)
    return {
        "cosine": [regeneration.cosine(a, b) for a, b in zip(predicted, measured, strict=True)],
        "error": errors.tolist(),
    }


def _second_pass(model: Qwen3, chunks: Chunks, skip: int, spectra: dict) -> dict[str, list[dict[str, Any]]]:
    top = {name: [attribution.TopEntries(s) for s in of_layers] for name, of_layers in spectra.items()}
    projections = {name: [[] for _ in of_layers] for name, of_layers in spectra.items()}
    for chunk in chunks:
        embedded, record = capture(model, jnp.asarray(chunk), skip=skip)
        for name, index, x in _stream(record, np.asarray(embedded)):
            top[name][index].add(x)
            projections[name][index].append(x.astype(np.float64) @ spectra[name][index].direction)
    return {
        name: [
            {"top": t.shares(), **_signs(np.concatenate(p))} for t, p in zip(top[name], projections[name], strict=True)
        ]
        for name in spectra
    }


def _signs(projections: Float64[np.ndarray, " tokens"]) -> dict[str, Any]:
    scale = max(float(np.sqrt(np.mean(projections**2))), 1e-300)
    counts, _ = np.histogram(np.clip(projections / scale, BINS[0], BINS[-1]), BINS)
    return {"sign_consistency": spectrum.sign_consistency(projections), "histogram": counts.tolist()}


def whitened_ratios(model: Qwen3, chunks: Chunks, *, skip: int = 0) -> dict[str, list[float]]:
    """R of the residual stream by layer when the embedding activation alone is as it is, centred or whitened.

    Whitening is W = sqrt(energy per feature) C^(-1/2), C the covariance with 1e-3 of its mean eigenvalue added.
    """
    features = model.config.hidden_size
    moments = spectrum.Moments(features)
    for chunk in chunks:
        moments.add(np.asarray(model.embedding[...])[chunk[:, skip:]].reshape(-1, features))
    mean = moments.sums / moments.count
    values, vectors = np.linalg.eigh(moments.gram / moments.count - np.outer(mean, mean))
    average = values.mean()
    root = (vectors * np.sqrt(average / (np.maximum(values, 0.0) + 1e-3 * average))) @ vectors.T
    centre = jnp.asarray(mean, jnp.float32)
    variants: dict[str, Affine | None] = {
        "as it is": None,
        "centred": (centre, jnp.eye(features)),
        "whitened": (centre, jnp.asarray(root, jnp.float32)),
    }
    return {name: _ratios(model, chunks, skip, affine) for name, affine in variants.items()}


def _ratios(model: Qwen3, chunks: Chunks, skip: int, affine: Affine | None) -> list[float]:
    layers = model.config.num_layers + 1
    count, sums, energies = 0, np.zeros((layers, model.config.hidden_size)), np.zeros(layers)
    for chunk in chunks:
        embedded, record = capture(model, jnp.asarray(chunk), affine, skip=skip)
        stream = (x.astype(np.float64) for x in (np.asarray(embedded), *np.asarray(record["sites"][SITES[0]])))
        for index, x in enumerate(stream):
            sums[index] += x.sum(axis=0)
            energies[index] += float(np.vdot(x, x))
        count += len(embedded)
    return np.sqrt((sums**2).sum(axis=1) / count / energies).tolist()
