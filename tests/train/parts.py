"""Holds a stage's batch in parts to the whole batch."""

import jax
import numpy as np

from lavit_jax.train import optimizer
from lavit_jax.train import step as step_lib


def assert_same(a, b, tolerance=2e-5):
  """Trees are close, on the scale of each leaf or 1e-4 of the largest."""
  largest = lambda x: float(np.abs(x).max(initial=0))
  floor = 1e-4 * max(map(largest, jax.tree.leaves(b)), default=0)

  def close(path, a, b):
    name = jax.tree_util.keystr(path)
    scale = tolerance * max(largest(b), floor)
    np.testing.assert_allclose(a, b, atol=scale, rtol=1e-5, err_msg=name)

  jax.tree_util.tree_map_with_path(close, a, b)


def assert_outcomes_same(found, expected):
  """Gradients, state and metrics, each metric on a scale of its own."""
  assert set(found[2]) == set(expected[2]) >= {"loss"}
  assert_same(found[0], expected[0])
  assert_same(found[1], expected[1])
  for name in expected[2]:
    assert_same(found[2][name], expected[2][name])


def assert_parts_are_the_whole(objective, phase, case):
  """Gradients, every metric, mean weights, codebook, revival, moments.

  Returns:
    (new state, metrics) of the whole.
  """
  one, four = (outcome(objective, phase, case, parts) for parts in (1, 4))
  assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(one[0]))
  assert_outcomes_same(four, one)
  return one[1:]


def outcome(objective, phase, case, parts):
  """(gradients, new state, metrics)."""
  made = step_lib.value_and_grad(objective, phase, parts)

  @jax.jit
  def run(params, frozen, extra, batch):
    merge = lambda trainable: optimizer.merge(trainable, params)
    trainable = optimizer.select(params, objective.labels(phase, params))
    (loss, (stats, metrics)), grads = made(
      merge, trainable, frozen, extra, batch, jax.random.key(5)
    )
    extra, more = objective.update_extra(phase, extra, stats, params)
    return grads, extra, metrics | more | {"value": loss}

  return jax.device_get(run(*case.args))
