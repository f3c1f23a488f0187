"""What the recipes ask for, written down from their publications."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rule:
    """One operand of one GEMM.

    format          of `FORMATS`, or None for high precision
    stochastic      rounding of the elements
    scales          of E8M0: "down" or "up"
    square          square blocks
    six_or_four     four-over-six
    hadamard        width of the transform, or None; fresh: with signs drawn anew
    eden            None, or how the scales are rounded after the correction: "nearest" or "stochastic"
    split           None; "mean": residual X - 1 mean; "centered": X - 1 Q(mean); "low rank": X - U S V; "centered low
                    rank": X - Q(U) S Q(V)
    part            the Rule of what is split off
    per_sequence    a mean for every sequence
    copy            made from the forward's quantized copy
    """

    format: str | None = None
    stochastic: bool = False
    scales: str = "down"
    square: bool = False
    six_or_four: bool = False
    hadamard: int | None = None
    fresh: bool = False
    eden: str | None = None
    split: str | None = None
    part: "Rule | None" = None
    per_sequence: bool = False
    copy: bool = False


HIGH = Rule()
LOW_RANK = 0.015  # of the smaller side
RNE, SR = Rule("nvfp4"), Rule("nvfp4", stochastic=True)
GEMMS = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.x", "wgrad.g")


def _by_operand(x, w, g):
    return dict(zip(GEMMS, (x, w, g, w, x, g), strict=True))


def _two_stage(forward, backward):
    again = replace(backward, copy=True)
    return dict(zip(GEMMS, (forward, forward, backward, again, again, backward), strict=True))


def _ternary(weights):
    copy = Rule(copy=True)
    return dict(zip(GEMMS, (Rule("int8"), Rule(weights), HIGH, copy, copy, HIGH), strict=True))


def _averis(split, mean_of_g, hadamard=None):
    x, g = replace(RNE, split=split, part=RNE), replace(SR, split=split, part=mean_of_g)
    rules = _by_operand(x, RNE, g)
    for slot in ("wgrad.x", "wgrad.g"):
        rules[slot] = replace(rules[slot], hadamard=hadamard)
    return rules


def _nvidia():
    square = replace(RNE, square=True)
    transformed = replace(RNE, hadamard=16), replace(SR, hadamard=16)
    return dict(zip(GEMMS, (RNE, square, SR, square, *transformed), strict=True))


def _quartet2():
    return _two_stage(
        Rule("nvfp4-256", six_or_four=True), Rule("nvfp4-eden", hadamard=128, fresh=True, eden="stochastic")
    )


def _metis():
    forward, gradient = (replace(rule, split="low rank", part=rule) for rule in (RNE, SR))
    return _by_operand(forward, forward, gradient)


def _averis_best():
    best = Rule("nvfp4-256", six_or_four=True)
    x, g = (replace(r, split="centered low rank", part=best) for r in (best, replace(best, stochastic=True)))
    return _by_operand(x, best, g)


RECIPES = {
    "fp8": _by_operand(Rule("e4m3"), Rule("e4m3"), Rule("e5m2")),
    "mxfp8": _by_operand(Rule("mxfp8"), Rule("mxfp8"), Rule("mxfp8")),
    "mxfp4": _by_operand(Rule("mxfp4"), Rule("mxfp4"), Rule("mxfp4", stochastic=True, scales="up")),
    "nvfp4": _by_operand(RNE, RNE, SR),
    "nvfp4_hadamard": _nvidia(),
    "four_over_six": _by_operand(
        *(Rule("nvfp4-256", six_or_four=True),) * 2, Rule("nvfp4-256", stochastic=True, six_or_four=True)
    ),
    "averis": _averis("mean", SR),
    "averis_centered": _averis("centered", RNE),
    "averis_hadamard": _averis("mean", SR, 16),
    "averis_centered_hadamard": _averis("centered", RNE, 16),
    "averis_best": _averis_best(),
    "quartet2": _quartet2(),
    "tetrajet2": _two_stage(Rule("nvfp4/128"), Rule("nvfp4/128", stochastic=True, hadamard=16)),
    "metis": _metis(),
    "ternary": _ternary("sign"),
    "ternary_absmean": _ternary("ternary"),
}


def _rounded(rule, stochastic):
    if rule.part:
        rule = replace(rule, part=_rounded(rule.part, stochastic))
    if rule.format is None:
        return replace(rule, fresh=False)
    eden = "nearest" if rule.eden else None
    return replace(rule, stochastic=stochastic, scales="up" if stochastic else "down", fresh=False, eden=eden)


def _six_or_four(slot, rule):
    if rule.part:
        rule = replace(rule, part=_six_or_four(slot, rule.part))
    return replace(rule, format="nvfp4-256", six_or_four=True) if rule.format == "nvfp4" else rule


def _forward_in_high_precision(slot, rule):
    return HIGH if slot.startswith("fprop") else replace(rule, copy=False)


VARIANTS = {
    "nearest": lambda slot, rule: _rounded(rule, False),
    "sr_all": lambda slot, rule: _rounded(rule, True),
    "mean_bf16": lambda slot, rule: replace(rule, part=HIGH) if rule.split else rule,
    "x_only": lambda slot, rule: rule if slot.endswith("x") else replace(rule, split=None, part=None),
    "d_only": lambda slot, rule: rule if slot.endswith("g") else replace(rule, split=None, part=None),
    "per_sequence": lambda slot, rule: replace(rule, per_sequence=rule.split is not None),
    "2d": lambda slot, rule: replace(rule, square=True) if slot.endswith("w") else rule,
    "four_six": _six_or_four,
    "w_bf16": lambda slot, rule: Rule(hadamard=rule.hadamard, fresh=rule.fresh) if slot.endswith("w") else rule,
    "fwd_bf16": _forward_in_high_precision,
}


def plan(recipe):
    """{slot: Rule} of "name+variant+variant"."""
    name, *variants = recipe.split("+")
    rules = RECIPES[name]
    for variant in variants:
        rules = {slot: VARIANTS[variant](slot, rule) for slot, rule in rules.items()}
    return rules
