"""Optimizers: what their moments cost, and that all of them learn."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lavit_jax.core import errors
from lavit_jax.train import optimizer, phases

_CONFIG = {
  "b1": 0.9,
  "b2": 0.98,
  "weight_decay": 0.0,
  "clip_norm": 1.0,
  "groups": {"base": 1.0},
}
_PHASE = phases.Phase(name="train", start=0, stop=200, lr=0.05, warmup=5)


def _boxed(params):
  """Parameters with axes: of matrices rows and columns, the rest stacks."""

  def box(x):
    stacks = ("layers",) * (x.ndim - 2)
    return nn.LogicallyPartitioned(x, (*stacks, "embed", "mlp")[-x.ndim :])

  return jax.tree.map(box, params)


def _make(kind, params):
  labels = jax.tree.map(lambda _: "base", params)
  config = _CONFIG | ({"moments": kind} if kind else {})
  return optimizer.make(config, _PHASE, labels, _boxed(params))


def _bytes(tx, params):
  state = jax.eval_shape(tx.init, params)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@pytest.mark.parametrize("kind", [None, *optimizer.MOMENTS])
def test_a_matrix_is_learnt_with_every_kind_of_moments(kind):
  target = jax.random.normal(jax.random.key(0), (4, 128, 160))
  params = {"layer": {"kernel": jnp.zeros_like(target)}}
  tx = _make(kind, params)

  def loss(params):
    return jnp.square(params["layer"]["kernel"] - target).mean()

  @jax.jit
  def run(params):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, 200)[0][0]

  assert loss(run(params)) < 0.02 * loss(params)


def test_moments_take_the_documented_bytes():
  params = {"layer": {"kernel": jnp.zeros((4, 256, 256))}}
  size = params["layer"]["kernel"].size
  small = 4 * 4 * 2 * 256 + 4096  # sums over rows and columns, counters
  sizes = {k: _bytes(_make(k, params), params) for k in optimizer.MOMENTS}
  assert 8 * size <= sizes["float32"] < 8 * size + 4096
  assert 6 * size <= sizes["bfloat16"] < 6 * size + 4096
  assert 2 * size <= sizes["factored"] < 2 * size + small


def test_absent_moments_are_those_of_optax_adamw():
  params = {"a": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
  grads = jax.tree.map(lambda x: 0.01 * x, params)
  config = _CONFIG | {"weight_decay": 0.1}
  labels = jax.tree.map(lambda _: "base", params)
  tx = optimizer.make(config, _PHASE, labels, _boxed(params))
  updates, _ = tx.update(grads, tx.init(params), params)
  reference = optax.adamw(
    optimizer.lr_schedule(_PHASE),
    b1=0.9,
    b2=0.98,
    weight_decay=0.1,
    mask={"a": {"kernel": True, "bias": False}},
  )
  expected, _ = reference.update(grads, reference.init(params), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected
  )


def test_unknown_moments_are_an_error():
  with pytest.raises(errors.ConfigError, match="'float8'"):
    _make("float8", {"kernel": jnp.zeros((2, 2))})
