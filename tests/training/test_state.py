import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax import models
from fp4jax.config import mesh_of
from fp4jax.training.mesh import make_mesh
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.state import create_state, model_template, state_shardings

pytestmark = pytest.mark.standard_promotion


def test_template_gives_the_model_back(config):
    model = models.build(config, nnx.Rngs(jax.random.key(config.seed)))
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    state = create_state(config, template, optimizer, make_mesh(mesh_of()))
    merged = template.merge(state.params)
    expected = nnx.to_flat_state(nnx.state(model, nnx.Param))
    found = dict(nnx.to_flat_state(nnx.state(merged, nnx.Param)))
    assert len(expected) == len(found) == len(state.params)
    for path, variable in expected:
        np.testing.assert_allclose(found[path][...], variable[...], rtol=1e-6, atol=1e-8)
        assert state.params[".".join(map(str, path))].shape == variable.shape


def test_every_array_is_created_in_its_shards(config):
    mesh = make_mesh(mesh_of(fsdp=4, tensor=2))
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    state = create_state(config, template, optimizer, mesh)
    expected = state_shardings(template, optimizer, mesh)
    jax.tree.map(
        lambda array, sharding: array.sharding.is_equivalent_to(sharding, array.ndim) or pytest.fail(), state, expected
    )
    sharded = {name for name, array in state.params.items() if array.addressable_shards[0].data.size * 8 == array.size}
    matrices = {name for name, axes in template.logical_axes.items() if {"mlp", "heads", "vocab"} & set(axes)}
    assert matrices and matrices <= sharded
    moments = next(part for part in state.opt_state if hasattr(part, "nu"))
    for name, array in state.params.items():
        assert moments.mu[name].sharding == moments.nu[name].sharding == array.sharding


def test_parameters_do_not_depend_on_the_mesh(config):
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    shapes = (mesh_of(), mesh_of(fsdp=4, tensor=2))
    one, eight = (create_state(config, template, optimizer, make_mesh(shape)).params for shape in shapes)
    jax.tree.map(np.testing.assert_array_equal, one, eight)


class Model(nnx.Module):
    def __init__(self, dtype, extra):
        self.weight = nnx.Param(jnp.zeros((2, 2), dtype))
        if extra:
            self.counter = nnx.Variable(jnp.zeros(()))


@pytest.mark.parametrize(
    ("dtype", "extra", "message"),
    [(jnp.bfloat16, False, "parameter weight is bfloat16"), (jnp.float32, True, "this model also holds counter")],
)
def test_model_that_the_step_cannot_train(config, monkeypatch, dtype, extra, message):
    monkeypatch.setattr(models, "build", lambda config, rngs: Model(dtype, extra))
    with pytest.raises(ValueError, match=message):
        model_template(config)
