"""Policies: the first rule that matches wins, and a rule that matches nothing is a mistake; shipped ones; files."""

import json
import re

import pytest

from fp4jax.policy import Policy, PolicyFile, describe, policy, self_contained
from fp4jax.recipes import Recipe, recipe


def paths_of(layers):
    linears = ("attention.q_proj", "mlp.gate_proj", "mlp.down_proj")
    return [f"layers.{layer}.{name}" for layer in range(layers) for name in linears]


PATHS = paths_of(3)
RULES = ((r"layers\.2\.", "bf16"), ("down_proj", "nvfp4+nearest"), (".", "run"))


def test_the_first_match_wins():
    chosen = Policy.of((r"layers\.2\.", "bf16"), ("down_proj", "nvfp4"), ("mlp", "averis")).assign(PATHS)
    assert list(chosen) == PATHS
    assert {path: value.name for path, value in chosen.items()} == {
        **{f"layers.{i}.attention.q_proj": "bf16" for i in range(3)},  # no match: high precision
        **{f"layers.{i}.mlp.gate_proj": "averis" for i in range(2)},
        **{f"layers.{i}.mlp.down_proj": "nvfp4" for i in range(2)},
        **{f"layers.2.mlp.{name}_proj": "bf16" for name in ("gate", "down")},
    }


def test_recipe_for_searches_anywhere_in_the_path():
    rules = Policy.of(("q_proj$", "averis"), ("^layers", "nvfp4"))
    assert rules.recipe_for("layers.0.attention.q_proj") is recipe("averis")
    assert rules.recipe_for("layers.0.attention.k_proj") is recipe("nvfp4")
    assert rules.recipe_for("lm_head").is_high_precision


def test_a_rule_may_hold_a_recipe_of_ones_own():
    mine = Recipe("mine")
    assert Policy.of((".", mine)).recipe_for("anything") is mine


def test_a_rule_that_matches_nothing_is_named():
    rules = Policy.of(("mlp", "averis"), ("down_prj", "nvfp4"))
    with pytest.raises(ValueError, match="rule 'down_prj' matches none of the 9 linear layers, for example 'layers.0"):
        rules.assign(PATHS)
    with pytest.raises(ValueError, match="matches none of the 0 linear layers$"):
        rules.assign([])


def test_a_shadowed_rule_is_not_an_error():
    """It matches layers, though earlier rules take them all."""
    assert Policy.of((".", "averis"), ("mlp", "bf16")).assign(PATHS)[PATHS[1]].name == "averis"


def test_bad_rules():
    with pytest.raises(ValueError, match=r"rule 'mlp\(' is not a regular expression"):
        Policy.of(("mlp(", "averis"))
    with pytest.raises(ValueError, match="unknown recipe 'averes'"):
        Policy.of(("mlp", "averes"))


def test_policies_are_values():
    for name in ("all_linear", "nvidia"):
        assert policy(name, "averis", PATHS) == policy(name, "averis", PATHS) != policy(name, "nvfp4", PATHS)
        assert hash(policy(name, "averis", PATHS)) == hash(policy(name, "averis", PATHS))


# ---------------------------------------------------------------- shipped


def test_all_linear():
    chosen = policy("all_linear", "averis+nearest", PATHS).assign(PATHS)
    assert set(chosen.values()) == {recipe("averis+nearest")}


@pytest.mark.parametrize(
    ("layers", "first", "last"),
    [(62, 2, 8), (2, 0, 1), (4, 0, 1), (12, 0, 2), (16, 0, 3), (20, 0, 3), (28, 1, 4), (34, 1, 4), (100, 3, 13)],
)
def test_nvidia_keeps_first_and_last_blocks(layers, first, last):
    paths = paths_of(layers)
    chosen = policy("nvidia", "averis", paths).assign(paths)
    kept = [path for path, value in chosen.items() if value.name == "bf16"]
    blocks = [*range(first), *range(layers - last, layers)]
    assert kept == [path for path in paths if int(path.split(".")[1]) in blocks]
    assert {value.name for value in chosen.values()} == {"averis", "bf16"}


def test_nvidia_keeps_sixteen_percent_of_deep_models():
    for layers in range(10, 130):
        paths = paths_of(layers)
        chosen = policy("nvidia", "averis", paths).assign(paths)
        share = sum(value.is_high_precision for value in chosen.values()) / len(paths)
        assert abs(share - 10 / 62) <= 0.5 / layers


@pytest.mark.parametrize(("paths", "blocks"), [(paths_of(1), 1), (["encoder.q_proj"], 0), (["my_layers.3.q"], 0)])
def test_nvidia_on_a_model_without_a_block_to_spare(paths, blocks):
    message = f"this model has {blocks}: nothing would be quantized; use policy='all_linear'"
    with pytest.raises(ValueError, match=message):
        policy("nvidia", "averis", paths)


def test_unknown_policy_says_what_is_accepted():
    message = "unknown policy 'nvida'; known: all_linear, nvidia, a policy file (its name ends in .json), or rules"
    for ask in (lambda: policy("nvida", "averis", PATHS), lambda: self_contained("nvida")):
        with pytest.raises(ValueError, match=re.escape(message)):
            ask()


def test_describe():
    chosen = policy("nvidia", "averis", paths_of(28)).assign(paths_of(28))
    assert describe(chosen) == "averis in 69 of 84 linear layers, bf16 in 15"
    assert describe(policy("all_linear", "nvfp4", PATHS).assign(PATHS)) == "nvfp4 in 9 of 9 linear layers"


# ---------------------------------------------------------------- files


def test_round_trip(tmp_path):
    written = PolicyFile(RULES, {"command": "scan --keep=15%", "gap": 0.03, "steps": [1, 2]})
    written.save(tmp_path / "scan.json")
    assert PolicyFile.load(tmp_path / "scan.json") == written
    lines = (tmp_path / "scan.json").read_text().splitlines()
    assert sum('"run"' in line for line in lines) == 1, "one rule a line"


@pytest.mark.parametrize("name", ["averis", "nvfp4+sr_all"])
def test_a_file_gives_the_runs_recipe_where_it_says_so(tmp_path, name):
    PolicyFile(RULES).save(tmp_path / "scan.json")
    chosen = policy(str(tmp_path / "scan.json"), name, PATHS)
    assert chosen == Policy.of((r"layers\.2\.", "bf16"), ("down_proj", "nvfp4+nearest"), (".", name))
    mine = Recipe("mine")
    assert policy(str(tmp_path / "scan.json"), mine, PATHS).recipe_for("layers.0.mlp.gate_proj") is mine


def test_rules_written_out_are_the_file_without_the_file(tmp_path):
    PolicyFile(RULES, {"command": "scan"}).save(tmp_path / "scan.json")
    text = self_contained(str(tmp_path / "scan.json"))
    (tmp_path / "scan.json").unlink()
    assert policy(text, "averis", PATHS) == PolicyFile(RULES).policy("averis")
    assert self_contained(text) == text
    assert self_contained("nvidia") == "nvidia"


def content(**changes):
    return {"fp4jax_policy": 1, "provenance": {}, "rules": [[".", "run"]]} | changes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: Expecting"),
        ("[1]", "must have exactly the keys fp4jax_policy, provenance, rules; it has a list"),
        (json.dumps({"rules": []}), "must have exactly the keys fp4jax_policy, provenance, rules; it has rules"),
        (json.dumps(content(rule=1)), "it has fp4jax_policy, provenance, rules, rule"),
        (json.dumps(content(fp4jax_policy=2)), "is of version 2; this code reads version 1"),
        (json.dumps(content(rules={})), "provenance must be an object and rules a list"),
        (json.dumps(content(rules=[])), "a policy needs at least one rule, for example ['.', 'run']"),
        (
            json.dumps(content(rules=[["a", "run"], ["b"]])),
            """rule 2 is ["b"]; a rule is [regular expression, recipe or 'run']""",
        ),
        (json.dumps(content(rules=[["a", None]])), 'rule 1 is ["a", null]'),
        (json.dumps(content(rules=["ab"])), 'rule 1 is "ab"'),
        (json.dumps(content(rules=[["mlp(", "run"]])), "policy rule 'mlp(' is not a regular expression"),
        (json.dumps(content(rules=[[".", "averiz"]])), "unknown recipe 'averiz'"),
        (
            json.dumps(content(rules=[[".", "run+nearest"]])),
            "rule '.' has recipe 'run+nearest'; 'run' takes no variants here",
        ),
    ],
)
def test_bad_file_gives_one_line_with_its_name(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        policy(str(tmp_path / "bad.json"), "averis", PATHS)
    assert str(caught.value).startswith(f"policy file {tmp_path / 'bad.json'}") and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"none.json cannot be read: No such file or directory"):
        PolicyFile.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.json is not JSON: .utf-8. codec"):
        PolicyFile.load(tmp_path / "binary.json")


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="must end in .json"):
        PolicyFile(RULES).save(tmp_path / "scan.txt")
    for value in (float("nan"), {1, 2}):
        with pytest.raises(ValueError, match="provenance of policy file .* is not JSON"):
            PolicyFile(RULES, {"gap": value}).save(tmp_path / "scan.json")
    assert not list(tmp_path.iterdir())


def test_bad_rules_written_out():
    with pytest.raises(ValueError, match=r"policy='\[\[\"a\"' is not JSON"):
        policy('[["a"', "averis", PATHS)
    with pytest.raises(ValueError, match='rule 1 is "a"'):
        policy('["a"]', "averis", PATHS)
    with pytest.raises(ValueError, match="at least one rule"):
        policy("[]", "averis", PATHS)
