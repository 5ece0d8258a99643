"""Checkpoints on a disk that fills up: named, and nothing complete is lost."""

import contextlib
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import checkpoints, errors, sharding
from lavit_jax.train import run_checkpoints

# Random numbers: what compresses well would fit below the limit.
_STATE = {
  "w": jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), "float32")
}


@contextlib.contextmanager
def _full_disk(limit=1 << 18):
  """Writes past `limit` bytes of a file fail, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path):
  run = run_checkpoints.RunCheckpoints(tmp_path)
  run.save(1, _STATE, {"data": 1})
  run.wait()
  with _full_disk():
    run.save(2, {"w": _STATE["w"] + 1}, {"data": 2})
    with pytest.raises(errors.CheckpointError, match="Make room"):
      run.wait()
  run.close()

  again = run_checkpoints.RunCheckpoints(tmp_path)
  assert again.latest_step() == 1
  assert again.meta(1) == {"data": 1}
  np.testing.assert_array_equal(again.restore(1, _STATE)["w"], _STATE["w"])
  again.save(2, _STATE, {"data": 2})
  again.close()
  assert again.latest_step() == 2


def test_a_full_disk_leaves_the_part_that_was_there(tmp_path):
  checkpoints.save_part(tmp_path, "llm", _STATE, {"step": 1})
  changed = {"w": _STATE["w"] + 1}
  named = pytest.raises(errors.CheckpointError, match="could not be written")
  with _full_disk(), named:
    checkpoints.save_part(tmp_path, "llm", changed, {"step": 2})
  part = checkpoints.load_part(tmp_path, "llm")
  assert part.meta["step"] == 1
  np.testing.assert_array_equal(part.params["w"], _STATE["w"])


def test_a_half_precision_part_is_read_within_the_mesh_of_a_run(tmp_path):
  tree = {"a": jnp.arange(6.0), "n": jnp.arange(3)}
  checkpoints.save_part(tmp_path, "llm", tree, {}, dtype=jnp.float16)
  mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})
  with sharding.use(mesh):
    found = checkpoints.load_part(tmp_path, "llm").params
    stored = checkpoints.load_part(tmp_path, "llm", dtype=None).params
  assert found["a"].dtype == jnp.float32
  assert found["n"].dtype == stored["n"].dtype == tree["n"].dtype
  assert stored["a"].dtype == jnp.float16
  np.testing.assert_array_equal(found["a"], tree["a"])
