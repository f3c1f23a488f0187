"""`fp4jax.report` names every matrix product of a function, how it runs and why it is not in FP4."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import fp4jax
from fp4jax import scopes
from fp4jax.reporting import Precision

Shape = jax.ShapeDtypeStruct
ROWS_BY_FEATURES = (((1,), (0,)), ((), ()))
KEY = jax.random.key(0)
GEMMS = {"fprop", "dgrad", "wgrad"}


def array(*shape, dtype=jnp.float32):
    return Shape(shape, dtype)


def product(x, w, recipe="averis", key=None):
    return fp4jax.dot_general(x, w, ROWS_BY_FEATURES, recipe=recipe, key=key)


def traced(function, *args, **kwargs):
    return fp4jax.report(function, *args, compile_program=False, **kwargs)


def by_layer(report):
    """layer → {GEMM: row}, of the products that are a layer's."""
    found = {}
    for row in report.rows:
        if row.gemm in GEMMS:
            of_layer = found.setdefault(row.layer, {})
            assert row.gemm not in of_layer
            of_layer[row.gemm] = row
    return found


def chain(params, x, key, recipe="averis"):
    """The loss of one product after another."""
    for w in params.values():
        x = jnp.tanh(product(x, w, recipe, key))
    return jnp.sum(x)


def test_a_contraction_of_8_stays_in_high_precision_and_says_so():
    params = {"first": array(32, 8), "second": array(8, 32), "third": array(32, 32)}
    report = traced(jax.grad(chain, (0, 1)), params, array(16, 32), KEY)
    found = by_layer(report)
    assert set(found) == {"params.first", "params.second", "params.third"}
    assert all(set(of_layer) == GEMMS for of_layer in found.values())
    high = {(layer, gemm) for layer, of_layer in found.items() for gemm, row in of_layer.items() if row.reason}
    assert high == {("params.first", "dgrad"), *(("params.second", gemm) for gemm in GEMMS)}
    assert {found[layer][gemm].reason for layer, gemm in high} == {"contraction 8 < 16"}
    assert "4 in high precision: contraction 8 < 16 (4)" in report.summary()
    assert report.fp4_percent == pytest.approx(100 * (2 * 8 + 3 * 32) / (6 * 8 + 3 * 32))


@pytest.mark.parametrize(
    ("recipe", "precision", "reason"),
    [("bf16", Precision.HIGH, "recipe bf16"), ("mxfp8", Precision.EIGHT, "recipe mxfp8"),
     ("nvfp4+w_bf16", Precision.HALF, "recipe nvfp4+w_bf16"), ("averis", Precision.FP4, "")],
)  # fmt: skip
def test_precision_and_reason_of_a_recipe(recipe, precision, reason):
    report = traced(jax.grad(chain), {"w": array(32, 32)}, array(16, 32), KEY, recipe)
    assert report.rows[0].recipe == recipe
    assert (report.rows[0].precision, report.rows[0].reason) == (precision, reason)


def test_a_model_in_high_precision_reports_nothing_in_fp4():
    report = traced(jax.grad(chain, (0, 1)), {"a": array(32, 32), "b": array(32, 32)}, array(16, 32), KEY, "bf16")
    assert (report.products, report.fp4, report.fp4_percent) == (6, (), 0.0)
    assert {layer: set(rows) for layer, rows in by_layer(report).items()} == {"params.a": GEMMS, "params.b": GEMMS}
    assert report.summary() == "0 of 6 products, 0.0 % of matrix FLOPs, in FP4; 6 in high precision: recipe bf16 (6)"


def test_attention_and_layers_of_others():
    def loss(params, x):
        x = jnp.tanh(x @ params["foreign"])
        scores = jax.nn.softmax(x @ x.T)
        return jnp.sum((scores @ x) @ params["head"])

    report = traced(jax.value_and_grad(loss), {"foreign": array(16, 32), "head": array(32, 4)}, array(24, 16))
    found = by_layer(report)
    assert set(found) == {"params.foreign", "params.head"}
    assert set(found["params.head"]) == GEMMS
    assert {row.reason for rows in found.values() for row in rows.values()} == {"not given to fp4jax"}
    attention = [row for row in report.rows if row.gemm not in GEMMS]
    assert sorted(row.gemm for row in attention) == ["backward"] * 4 + ["forward"] * 2
    assert {row.reason for row in attention} == {"not a layer: activation x activation"}
    assert all(row.layer.startswith("test_report.py:") for row in attention)


def test_a_gradient_that_nobody_asks_for_is_not_there():
    def loss(w, x, key):
        return jnp.sum(product(x, w, key=key))  # whose gradient does not depend on the product's value

    args = array(32, 32), array(16, 32), KEY
    assert set(by_layer(traced(jax.value_and_grad(loss), *args))["w"]) == {"fprop", "wgrad"}
    assert set(by_layer(traced(jax.grad(loss), *args))["w"]) == {"wgrad"}


def test_corrections_and_preparation_are_not_counted():
    args = {"w": array(64, 64)}, array(32, 64), KEY
    plain, metis = (traced(jax.grad(chain), *args, recipe) for recipe in ("nvfp4", "metis"))
    assert plain.apart == ()
    assert {row.reason for row in metis.apart} == {"correction of a split", "preparation of an operand"}
    assert plain.products == metis.products == 2
    assert plain.flops == metis.flops


def test_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            quantized = fp4jax.linen.dot_general_cls("averis")
            for i in range(2):
                x = nn.relu(nn.Dense(32, dot_general_cls=quantized, name=f"block_{i}")(x))
            return nn.Dense(4, name="head")(x)

    model, x = Model(), array(16, 32)
    variables = jax.eval_shape(model.init, KEY, x)

    def loss(variables, x, key):
        return jnp.sum(model.apply(variables, x, rngs={"fp4": key}))

    report = traced(jax.jit(jax.grad(loss)), variables, x, KEY)
    found = by_layer(report)
    assert set(found) == {f"variables.params.{name}" for name in ("block_0", "block_1", "head")}
    in_fp4 = {layer for layer, rows in found.items() if all(row.precision is Precision.FP4 for row in rows.values())}
    assert in_fp4 == {"variables.params.block_0", "variables.params.block_1"}
    assert "variables.params.block_0-1" in str(report)


@pytest.mark.parametrize(
    ("jit", "abstract"), [(nnx.jit, True), (lambda function: function, False)], ids=["nnx.jit, shapes", "plain, arrays"]
)
def test_nnx(jit, abstract):
    class Model(nnx.Module):
        def __init__(self, rngs):
            slot = lambda: fp4jax.nnx.DotGeneral("averis", rngs=rngs)  # noqa: E731
            self.layers = nnx.List([nnx.Linear(32, 32, dot_general=slot(), rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.relu(layer(x))
            return self.head(x)

    @jit
    def step(model, x):
        return nnx.value_and_grad(lambda model: jnp.sum(model(x)))(model)

    def build():
        return Model(nnx.Rngs(0))

    report = traced(step, nnx.eval_shape(build) if abstract else build(), array(16, 32))
    found = by_layer(report)
    assert set(found) == {"model.layers.0", "model.layers.1", "model.head"}
    assert {layer for layer, rows in found.items() if rows["wgrad"].precision is Precision.FP4} == {
        "model.layers.0",
        "model.layers.1",
    }
    assert set(found["model.layers.1"]) == GEMMS


class Vision(nn.Module):
    """A model whose root owns a matrix that it multiplies nothing by: the whole of it is traced as one layer."""

    positions: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(64, 32, name="embed")
        x = embed(tokens)
        if self.positions:
            x = x + self.param("positions", nn.initializers.normal(), (16, 32))
        q, k, v = (nn.Dense(32, name=name)(x) for name in "qkv")
        x = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
        return embed.attend(nn.Dense(32, name="high")(x))


class NnxVision(nnx.Module):
    def __init__(self, positions, rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.positions = nnx.Param(jnp.ones((16, 32))) if positions else None
        self.q, self.k, self.v, self.high = (nnx.Linear(32, 32, rngs=rngs) for _ in range(4))

    def __call__(self, tokens):
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions[...]
        q, k, v = (layer(x) for layer in (self.q, self.k, self.v))
        x = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
        return self.embed.attend(self.high(x))


def report_of_vision(library, positions):
    policy = fp4jax.Policy.of(("high", "bf16"), (".", "nvfp4+nearest"))
    tokens = array(2, 16, dtype=jnp.int32)
    if library == "linen":
        model = fp4jax.linen.quantize(Vision(positions), policy)
        params = jax.eval_shape(model.init, KEY, tokens)["params"]
        return traced(
            jax.grad(lambda params, tokens: jnp.sum(model.apply({"params": params}, tokens) ** 2)), params, tokens
        )
    model = NnxVision(positions, nnx.Rngs(0))
    fp4jax.nnx.quantize(model, policy)

    def loss(params, tokens):
        return nnx.grad(lambda params: jnp.sum(params(tokens) ** 2))(params)

    return traced(loss, model, tokens)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_root_that_owns_a_matrix_leaves_its_layers_their_names(library):
    with_positions, without = (report_of_vision(library, positions) for positions in (True, False))
    assert with_positions.rows == without.rows
    found = by_layer(with_positions)
    assert set(found) == {"params.q", "params.k", "params.v", "params.high", "params.embed.embedding"}
    assert all(set(rows) == GEMMS for rows in found.values())
    assert {row.layer for row in with_positions.fp4} == {"params.q", "params.k", "params.v"}
    assert found["params.high"]["fprop"].reason == ("recipe bf16" if library == "linen" else "not given to fp4jax")
    assert sum(row.reason == "not a layer: activation x activation" for row in with_positions.rows) == 2 + 4


def test_one_line_for_layers_and_attention():
    def multiply(a, b):
        return a @ b

    def loss(params, x):
        x = jnp.tanh(multiply(x, params["a"]))
        scores = multiply(x, x.T)
        return jnp.sum(multiply(scores, jnp.tanh(multiply(x, params["b"]))) ** 2)

    report = traced(jax.value_and_grad(loss), {"a": array(16, 16), "b": array(16, 16)}, array(24, 16))
    found = by_layer(report)
    assert {layer: set(rows) for layer, rows in found.items()} == {"params.a": {"fprop", "wgrad"}, "params.b": GEMMS}
    attention = sorted(row.gemm for row in report.rows if row.gemm not in GEMMS)
    assert attention == ["backward"] * 4 + ["forward"] * 2


def test_static_arguments_take_no_name_from_arrays():
    def forward(scale, x, flag, params, *more):
        return x @ params["w"] * scale @ (more[0] if flag else more[1])

    args = 2, array(16, 32), False, {"w": array(32, 32)}, array(32, 8), array(32, 4)
    rows = traced(jax.jit(forward, static_argnums=(0, 2)), *args).rows
    assert [row.layer for row in rows] == ["params.w", "more.1"]
    by_name = jax.jit(lambda x, flag, w: x @ w if flag else x, static_argnames="flag")
    assert [row.layer for row in traced(by_name, args[1], True, w=array(32, 8)).rows] == ["w"]
    by_nnx = nnx.jit(lambda flag, w, x: jnp.tanh(x) @ w if flag else x, static_argnums=0)
    assert [row.layer for row in traced(by_nnx, True, array(32, 8), array(16, 32)).rows] == ["w"]


def test_remat_shows_what_runs_again():
    def loss(w, x, key):
        layer = jax.checkpoint(lambda x, w: jnp.tanh(product(x, w, key=key)))
        return jnp.sum(layer(layer(x, w["a"]), w["b"]))

    report = traced(jax.value_and_grad(loss), {"a": array(32, 32), "b": array(32, 32)}, array(16, 32), KEY)
    once = [row for row in report.rows if not row.recomputed]
    again = [row for row in report.rows if row.recomputed]
    assert {(row.layer, row.gemm) for row in once} >= {("w.a", "fprop"), ("w.a", "wgrad")} | {
        ("w.b", gemm) for gemm in GEMMS
    }
    assert again and {row.gemm for row in again} == {"fprop"}
    assert report.fp4 == report.rows


@pytest.mark.parametrize(
    ("weights", "shape"), [((32, 32), "[4,16,32] x [32,32]"), ((4, 32, 32), "[4,16,32] x [4,32,32]")]
)
def test_vmap(weights, shape):
    """Over activations: more tokens of one product; over weights too: a batch of products, all in one."""
    mapped = jax.vmap(product, in_axes=(0, 0 if len(weights) == 3 else None, None, None))

    def loss(w, x, key):
        return jnp.sum(mapped(x, w, "averis", key))

    report = traced(jax.value_and_grad(loss, (0, 1)), array(*weights), array(4, 16, 32), KEY)
    found = by_layer(report)
    assert set(found) == {"w"} and set(found["w"]) == GEMMS
    assert found["w"]["fprop"].shape == shape
    assert report.products == 3 and report.flops == 3 * 2 * 4 * 16 * 32 * 32
    assert report.fp4_percent == 100


def test_loops_and_branches():
    def program(w, x, key):
        x, _ = lax.scan(lambda x, w: (product(x, w, key=key), None), x, w["scanned"])
        x = lax.cond(jnp.sum(x) > 0, lambda x: x @ w["cond"], lambda x: x, x)
        return lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x @ w["while"], x)

    w = {"scanned": array(5, 32, 32), "cond": array(32, 32), "while": array(32, 32)}
    rows = {row.layer: row for row in traced(program, w, array(16, 32), KEY).rows}
    assert {layer: row.count for layer, row in rows.items()} == {"w.scanned": 5, "w.cond": 1, "w.while": 1}
    assert rows["w.scanned"].flops == 5 * 2 * 16 * 32 * 32
    assert rows["w.cond"].note == "one of 2 branches" and rows["w.while"].note == "each iteration of a while loop"


def test_shards_are_counted_each():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])

    def local(x, w):
        return product(x, w)

    parts = PartitionSpec("data"), PartitionSpec()
    program = jax.shard_map(local, mesh=mesh, in_specs=parts, out_specs=parts[0])
    (row,) = traced(program, array(64, 32), array(32, 32)).rows
    assert (row.count, row.flops, row.shape) == (4, 2 * 64 * 32 * 32, "[16,32] x [32,32]")


def test_convolution_and_ragged_dot_of_others():
    def program(image, kernel, x, w, sizes):
        return lax.conv(image, kernel, (1, 1), "SAME"), lax.ragged_dot(x, w, sizes)

    args = array(2, 3, 8, 8), array(5, 3, 3, 3), array(24, 16), array(4, 16, 8), array(4, dtype=jnp.int32)
    conv, ragged = traced(program, *args).rows
    assert conv.layer == "kernel" and conv.flops == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    assert ragged.layer == "w" and ragged.flops == 2 * 24 * 8 * 16


def test_the_function_is_never_run():
    def program(x, w):
        jax.debug.callback(lambda: pytest.fail("ran"))
        return product(x, w)

    report = fp4jax.report(program, array(16, 32), jnp.ones((32, 32)))
    jax.effects_barrier()
    assert report.fp4_percent == 100


def test_compiled_program_keeps_the_quantization():
    report = fp4jax.report(
        jax.grad(chain), {"a": array(32, 32), "b": array(32, 32)}, array(16, 32), KEY, "nvfp4+nearest"
    )
    compiled = report.compiled
    assert compiled.platform == "cpu" and compiled.folded == ()
    assert compiled.operands == compiled.coded >= 10  # five GEMMs
    assert {kind[1] for kind in compiled.execution} == GEMMS
    assert all(row.execution.startswith("emulated in ") for row in report.rows)
    loaded = json.loads(report.to_json())
    assert loaded["compiled"]["coded"] == compiled.coded and len(loaded["rows"]) == 5
    assert loaded["fp4_products"] == 5


def test_a_quantization_that_is_gone_is_found():
    def program(x, w):
        claimed = fp4jax.quantize(x, fp4jax.NVFP4, axis=-1)
        with scopes.of_recipe("broken"), scopes.of_gemm("fprop"), scopes.of_operands(claimed, claimed):
            return x @ w

    compiled = fp4jax.report(program, array(32, 64), array(64, 32)).compiled
    assert (compiled.operands, compiled.coded) == (2, 0)
    assert "NOT QUANTIZED" in str(compiled)


def test_what_cannot_be_looked_into_is_named():
    def program(x):
        return jax.pure_callback(lambda x: x, array(4, 4), x)

    report = traced(program, array(4, 4))
    assert report.opaque == ("pure_callback",)
    assert "not looked into: pure_callback" in str(report) and "no matrix product" in str(report)


@pytest.mark.standard_promotion  # jax.nn.dot_product_attention
def test_cudnns_attention_counts_as_its_products(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)  # to trace it where there is no GPU
    q, k = array(2, 64, 4, 16, dtype=jnp.bfloat16), array(2, 64, 2, 16, dtype=jnp.bfloat16)

    def report(implementation):
        def loss(q, k, v):
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
            return jnp.sum(mixed.astype(jnp.float32))

        return traced(jax.value_and_grad(loss, argnums=(0, 1, 2)), q, k, k)

    flash, plain = report("cudnn"), report("xla")
    scores = 2 * 2 * 4 * 64 * 64 * 16
    assert flash.opaque == () and flash.flops == (2 + 5) * scores
    assert plain.flops == (2 + 4) * scores  # which keeps the scores for the backward


def test_only_functions_have_reports():
    with pytest.raises(ValueError, match="report takes a function and its arguments, got float"):
        fp4jax.report(1.0)
