"""One step on 8 devices equals one step on one, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import errors, sharding
from lavit_jax.train import loop, objectives, optimizer
from lavit_jax.train import state as state_lib
from tests import micro

_MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def _one_step(objective, phase, batch, sizes, count):
  """Loss, metrics, extra state and gradients of one step on `count` devices."""
  mesh = sharding.make_mesh(sizes, jax.devices()[:count])
  with sharding.use(mesh):
    init = state_lib.init_fn(objective, 0)
    layout = state_lib.shardings(jax.eval_shape(init), mesh)
    state = jax.jit(lambda: state_lib.unbox(init()), out_shardings=layout)()
    frozen = jax.device_put(objective.frozen, sharding.replicated(mesh))
    labels = objective.labels(phase, state.params)

    def step(state, frozen, batch):
      def loss_fn(trainable):
        params = optimizer.merge(trainable, state.params)
        rng = state_lib.step_rng(state)
        return objective.loss(phase, params, frozen, state.extra, batch, rng)

      trainable = optimizer.select(state.params, labels)
      return jax.value_and_grad(loss_fn, has_aux=True)(trainable)

    on_mesh = sharding.put_batch(batch, mesh)
    out = jax.jit(step)(state, frozen, on_mesh)
    leaves = jax.tree.leaves(state.params)
    replicated = [leaf.sharding.is_fully_replicated for leaf in leaves]
    return jax.device_get(out), replicated


@pytest.mark.parametrize(
  ("stage", "name"),
  [
    ("encoder", "train"),
    ("tokenizer", "joint"),
    ("tokenizer", "codes"),
    ("pixels", "train"),
    ("pretrain", "train"),
  ],
)
def test_sharded_equals_one_device(stage, name, micro_runs):
  cfg = micro.config(stage, micro_runs)
  objective = objectives.build(cfg)
  phase = next(p for p in loop.phases_of(cfg) if p.name == name)
  batch = next(objective.batches(0))
  one, _ = _one_step(objective, phase, batch, {}, 1)
  eight, replicated = _one_step(objective, phase, batch, _MESH, 8)
  assert not all(replicated), "no parameter was sharded"

  def close(path, a, b):
    scale = max(np.abs(a).max(), 1e-3)
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(b, a, atol=2e-4 * scale, err_msg=name)

  jax.tree_util.tree_map_with_path(close, one, eight)


def test_the_codebook_update_counts_every_device(micro_runs):
  """The codes phase on 8 devices moves the codebook as on one."""
  cfg = micro.config("tokenizer", micro_runs)
  objective = objectives.build(cfg)
  phase = next(p for p in loop.phases_of(cfg) if p.name == "codes")
  batch = next(objective.batches(3))
  one, _ = _one_step(objective, phase, batch, {}, 1)
  eight, _ = _one_step(objective, phase, batch, _MESH, 8)
  left, right = one[0][1][0]["codebook"], eight[0][1][0]["codebook"]
  np.testing.assert_allclose(left["counts"], right["counts"], atol=1e-5)
  np.testing.assert_allclose(left["codes"], right["codes"], atol=1e-4)
  tokens = float(left["counts"].sum())
  assert tokens > 0


def test_mesh_errors_say_what_to_change():
  with pytest.raises(errors.ConfigError, match="'model'"):
    sharding.make_mesh({"model": 2})
  with pytest.raises(errors.ConfigError, match="-1"):
    sharding.make_mesh({"data": 3})


def test_a_logical_axis_without_a_rule_is_an_error():
  import flax.linen as nn

  box = nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct((4, 4), jnp.float32), ("embed", "colour")
  )
  mesh = sharding.make_mesh({"data": -1})
  with pytest.raises(errors.ConfigError, match="colour"):
    sharding.param_shardings({"w": box}, mesh)


def test_a_dimension_that_does_not_divide_is_an_error():
  import flax.linen as nn

  box = nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct((6, 5), jnp.float32), ("embed", "mlp")
  )
  mesh = sharding.make_mesh({"data": 2, "tensor": 4})
  with pytest.raises(errors.ConfigError, match="5 % 4"):
    sharding.param_shardings({"w": box}, mesh)


def test_a_batch_that_does_not_divide_is_an_error():
  mesh = sharding.make_mesh({"data": -1})
  with pytest.raises(errors.ConfigError, match=r"config\.batch_size"):
    sharding.put_batch({"x": np.zeros((6, 2))}, mesh)
