"""A batch in parts has the gradient of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import errors
from lavit_jax.train import accumulation, objectives, phases
from lavit_jax.train import state as state_lib
from tests import micro


def _setup(stage, root, parts):
  cfg = micro.config(stage, root)
  cfg.accumulate = parts
  objective = objectives.build(cfg)
  (phase, *_) = phases.phases_of(cfg)
  state = jax.jit(lambda: state_lib.unbox(state_lib.init_fn(objective, 0)()))()
  return objective, phase, state, next(objective.batches(0))


def _run(objective, phase, state, batch, parts):
  made = accumulation.value_and_grad(objective, phase, parts)
  merge = lambda trainable: trainable
  run = jax.jit(lambda *args: made(merge, *args))
  return run(
    state.params, objective.frozen, state.extra, batch, jax.random.key(0)
  )


def test_parts_add_up_to_the_whole_batch(micro_runs):
  objective, phase, state, batch = _setup("pretrain", micro_runs, 4)
  (loss, (_, metrics)), grads = _run(objective, phase, state, batch, 1)
  (in_parts, (_, more)), added = _run(objective, phase, state, batch, 4)
  np.testing.assert_allclose(in_parts, loss, rtol=1e-5)
  assert set(more) == set(metrics)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=2e-5 * max(float(jnp.abs(b).max()), 1e-3)
    ),
    added,
    grads,
  )


def test_rows_of_a_device_stay_in_every_part():
  rows = accumulation.cut("x", jnp.arange(8), 2)
  np.testing.assert_array_equal(rows, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_batch_that_does_not_divide_is_an_error():
  with pytest.raises(errors.ConfigError, match="accumulate=3"):
    accumulation.cut("x", jnp.arange(8), 3)


def test_contrast_cannot_be_run_in_parts(micro_runs):
  setup = _setup("encoder", micro_runs, 2)
  with pytest.raises(errors.ConfigError, match="among all pictures"):
    _run(*setup, 2)
