"""The tables on stdout, from what `measure` returned."""

from collections.abc import Mapping
from typing import Any

from fp4jax.analysis.mean_bias.attribution import TERMS
from fp4jax.analysis.mean_bias.capture import OPERATORS, SITES
from fp4jax.analysis.mean_bias.figures import depths


def mean_bias(result: Mapping[str, Any]) -> str:
    """Signs, cosines, R and the energies at four depths of every site, with the mechanism's numbers."""
    lines = [f"{'site':>17} {'depth':>9} {'R':>6} {'mean':>6} {'spike':>6} {'tail':>6} {'signs':>6} {'cos v1':>6}"]
    for site, entries in result["sites"].items():
        for depth, index in _depths(site, entries).items():
            e = entries[index]
            parts = "".join(f" {e['energy'][part]:6.3f}" for part in ("mean", "spike", "tail"))
            signs, cosine = e["sign_consistency"], e["cosines"][0]
            lines.append(f"{site:>17} {depth:>9} {e['ratio']:6.3f}{parts} {signs:6.3f} {cosine:6.3f}")
    worst = max(entry["identity_error"] for entries in result["sites"].values() for entry in entries)
    expected, growth = result["expected_embedding"], result["growth"]
    cosines = result["increments"]["cosine"]
    lines += [
        f"energy identity (eq. 6-7): largest relative error {worst:.1e}",
        f"expected embedding (eq. 2): relative error {expected['error']:.1e}; one half of the text against the other: "
        f"cos {expected['cosine_of_halves']:.3f}; all words alike: cos {expected['cosine_of_uniform']:.3f}",
        f"increments (eq. 4): {sum(c > 0 for c in cosines)} of {len(cosines)} layers add along the mean",
        f"growth with width (eq. 5): exponent {growth[0]:.2f} (embedding), {min(growth):.2f} to {max(growth):.2f}",
    ]
    for label, ratios in result.get("whitened", {}).items():
        shown = ", ".join(f"{name} {ratios[index]:.3f}" for name, index in depths(len(ratios)).items())
        lines.append(f"R with the embedding {label}: {shown}")
    for name, (share, excess) in result.get("second_moments", {}).items():
        lines.append(f"Adam's second moment along the mean, {name}: {share:.4f}, {excess:.2f} times an equal share")
    return "\n".join(lines)


def outliers(result: Mapping[str, Any]) -> str:
    """What makes the top 0.1 % entries at four depths of every site, cross terms included."""
    lines = [f"{'site':>17} {'depth':>9}" + "".join(f" {term:>13}" for term in TERMS)]
    for site, entries in result["sites"].items():
        for depth, index in _depths(site, entries).items():
            lines.append(f"{site:>17} {depth:>9}" + "".join(f" {entries[index]['top'][term]:13.3f}" for term in TERMS))
    return "\n".join(lines)


def operators(result: Mapping[str, Any]) -> str:
    """The mean's share of energy in the operators' inputs and outputs, and how well eq. 3 predicts the outputs."""
    measured = result["operators"]
    count = len(measured["uniform_attention"])
    chosen = {name: index - 1 for name, index in depths(count + 1).items() if index}
    lines = [f"{'mean share of energy':>40}" + "".join(f" {name:>8}" for name in chosen)]
    for name in OPERATORS:
        lines.append(f"{name:>40}" + "".join(f" {measured['mean_share'][name][i]:8.3f}" for i in chosen.values()))
    lines.append(f"{'softmax weights, 1 for uniform':>40}" + "".join(
        f" {measured['uniform_attention'][i]:8.3f}" for i in chosen.values()))  # fmt: skip
    lines.append("relative error of the predicted mean (eq. 3)")
    for name, agreement in measured["predicted"].items():
        lines.append(f"{name:>40}" + "".join(f" {agreement['error'][i]:8.3f}" for i in chosen.values()))
    return "\n".join(lines)


def _depths(site: str, entries: list) -> dict[str, int]:
    """Where the tables look: the residual stream has an entry before the first layer."""
    if site == SITES[0]:
        return depths(len(entries))
    return {name: index - 1 for name, index in depths(len(entries) + 1).items() if index}
