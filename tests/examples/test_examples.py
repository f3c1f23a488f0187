"""The examples as shipped, on models of other packages: the loss falls, every linear layer and nothing else is FP4."""

import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import fp4jax

GEMMS = "fprop", "dgrad", "wgrad"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [
    pytest.mark.peer,
    pytest.mark.standard_promotion,
    pytest.mark.filterwarnings("default"),  # other packages' own
]


def example(name: str, package: str):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}; make test-examples installs it")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count(jaxpr, found=None) -> dict[str, int]:
    """(quantized products, other products) of a forward pass; a quantized one is a custom VJP."""
    found = {"quantized": 0, "other": 0} if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_vjp_call":
            found["quantized"] += 1
            continue
        found["other"] += equation.primitive.name == "dot_general"
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count(inner, found)
    return found


def falls(losses):
    return len(losses) == 20 and losses[-1] < 0.5 * losses[0]


@pytest.fixture
def reports(monkeypatch):
    """The reports that an example makes."""
    made, report = [], fp4jax.report

    def recording(*args, **kwargs):
        made.append(report(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(fp4jax, "report", recording)
    return made


def matrices(params, prefix: str) -> set[str]:
    """The paths of all parameters of two axes or more, as a report writes them."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join([prefix, *(str(key.key) for key in path)]) for path, leaf in leaves if leaf.ndim >= 2}


def test_gemma_transformer(capsys, reports):
    module = example("gemma_transformer", "gemma")
    model, layers, losses = module.main()
    assert falls(losses)
    assert "30 of 45 products" in capsys.readouterr().out
    plain = module.gm.nn.Transformer(config=module.CONFIG, dtype=jnp.float32)
    variables = plain.init(jax.random.key(0), module.TOKENS)
    weights = matrices(variables["params"], "state.params") - {"state.params.embedder.input_embedding"}
    assert len(weights) == 2 * 5
    (report,) = reports
    assert {(row.layer, row.gemm) for row in report.fp4} == set(itertools.product(weights, GEMMS))
    assert all(row.count == 1 and row.recipe == "averis" for row in report.fp4)
    forward = jax.make_jaxpr(model.apply)(variables, module.TOKENS)
    # Two products of attention a block and the head, which is the embedding, stay.
    assert count(forward.jaxpr) == {"quantized": 2 * 5, "other": 2 * 2 + 1}


def test_tunix_qwen3(capsys):
    nnx = pytest.importorskip("flax.nnx")
    module = example("tunix_qwen3", "tunix")
    plain = module.qwen3.Qwen3(module.CONFIG, rngs=nnx.Rngs(0))
    before = jax.tree.structure(nnx.state(plain))
    model, layers, losses = module.main()
    # Of three GEMMs each: seven linear layers in two blocks; besides, two products of attention a block, and the head.
    assert "42 of 57 products" in capsys.readouterr().out
    assert falls(losses)
    quantized = [path for path, recipe in layers.items() if recipe.name == "averis"]
    assert len(layers) == 15 and len(quantized) == 14 and "lm_head" not in quantized
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(nnx.state(plain, nnx.Param))
    model.eval()
    forward = jax.make_jaxpr(lambda tokens: module.loss(model, tokens))(module.TOKENS)
    # Two products of attention a layer and the head stay.
    assert count(forward.jaxpr) == {"quantized": 14, "other": 2 * 2 + 1}
    assert sorted(fp4jax.nnx.restore(model)) == sorted(quantized)
    assert jax.tree.structure(nnx.state(model)) == before


def test_flax_mnist(capsys):
    model, layers, losses = example("flax_mnist", "flax").main()
    assert "6 of 11 products" in capsys.readouterr().out  # two dense layers of three GEMMs
    assert falls(losses)
    assert {path: recipe.name for path, recipe in layers.items()} == {
        "Dense_0": "averis", "Dense_1": "averis", "Dense_2": "bf16",
    }  # fmt: skip


def test_equinox_refuses_with_the_cure():
    eqx = pytest.importorskip("equinox")
    quantize = fp4jax.equinox.quantize
    model = eqx.nn.MLP(16, 16, width_size=16, depth=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="rule 'mlp' matches none of the 2 linear layers, for example 'layers.0'"):
        quantize(model, fp4jax.Policy.of(("mlp", "averis")))
    with pytest.raises(ValueError, match="Dropout has no linear layer"):
        quantize(eqx.nn.Dropout(0.5), "averis")
    with pytest.raises(ValueError, match="layers.0 is quantized already: quantize the model as it was"):
        quantize(quantize(model, "nvfp4"), "averis")

    def loss(model, x):
        return jnp.sum(jax.vmap(quantize(model, "averis"))(x))

    with pytest.raises(ValueError, match="averis rounds gradients stochastically: pass key"):
        eqx.filter_eval_shape(eqx.filter_grad(loss), model, jnp.ones((32, 16)))


def test_equinox_mlp(capsys):
    module = example("equinox_mlp", "equinox")
    model, layers, losses = module.main()
    assert "5 of 8 products" in capsys.readouterr().out  # the first layer has no dgrad
    assert falls(losses) and len(layers) == 3
    x = jnp.ones((8, 16))

    def forward(model, x):
        return jax.vmap(fp4jax.equinox.quantize(model, "averis+nearest"))(x)

    eqx = pytest.importorskip("equinox")
    jaxpr = eqx.filter_make_jaxpr(forward)(model, x)[0]
    assert count(jaxpr.jaxpr) == {"quantized": 3, "other": 0}
