"""What the step of a run takes, and what XLA's account of it has."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lavit_jax.core import sharding
from lavit_jax.train import lowering, optimizer, phases
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import abstract_params


class _Sums:
  """A stage of one matrix, with frozen arrays of which it uses one."""

  config = ml_collections.ConfigDict({"accumulate": 1})
  init_shapes = base.Objective.init_shapes

  def init(self, rng):
    box = nn.LogicallyPartitioned(jnp.ones((8, 4)), ("embed", "mlp"))
    return {"net": {"kernel": box}}, {}

  def frozen_shapes(self):
    large = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    return {
      "used": jax.ShapeDtypeStruct((8,), jnp.float32),
      "split": nn.LogicallyPartitioned(large, ("embed", None)),
      "whole": jax.ShapeDtypeStruct((7, 3), jnp.bfloat16),
    }

  def batch_shapes(self):
    shapes = {"x": ((8, 8), np.float32), "number": ((8,), np.int32)}
    return abstract_params.arrays(shapes)

  labels = base.Objective.labels
  draws = base.Objective.draws
  update_extra = base.Objective.update_extra

  def sums(self, phase, params, frozen, extra, batch, draws):
    del phase, extra, draws
    out = (batch["x"] * frozen["used"]) @ params["net"]["kernel"]
    return {"square": jnp.square(out).sum()}, {}

  def combine(self, phase, sums):
    del phase
    return sums["square"], {}


_CONFIG = ml_collections.ConfigDict(
  dict(
    stage="sums",
    seed=0,
    steps=0,
    batch_size=8,
    optimizer=dict(
      b1=0.9, b2=0.9, weight_decay=0.0, clip_norm=1.0, groups=dict(base=1.0)
    ),
    schedule=("train",),
    phases=dict(train=dict(steps=1, lr=0.1, warmup=0, train={"all": "base"})),
  )
)


def test_memory_counts_all_that_lives_through_a_run_used_or_not():
  """Frozen arrays and columns of a batch that the step never reads."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  (phase,) = phases.phases_of(_CONFIG)
  lowered, arguments = lowering.lower(_Sums(), _CONFIG, phase, mesh)
  memory = lowered.compile().memory_analysis()
  assert memory.argument_size_in_bytes == sharding.bytes_per_device(arguments)
  _, frozen, batch = arguments
  assert sharding.bytes_per_device(frozen) == 4 * 8 + 4 * 64 * 32 // 2 + 2 * 21
  assert sharding.bytes_per_device(batch) == (4 * 8 * 8 + 4 * 8) // 4


@pytest.mark.parametrize(
  ("prefix", "branch", "trains"),
  [
    ("", "projection", True),
    ("all", "projection", True),
    ("projection", "projection", True),
    ("projection/unet_proj", "projection", True),
    ("projection_2", "projection", False),
    ("project", "projection", False),
    ("llm", "llm_proj", False),
  ],
)
def test_a_branch_trains_by_whole_names_too(prefix, branch, trains):
  phase = {"train": {prefix: "base"}}
  config = ml_collections.ConfigDict(
    {"schedule": ("a",), "phases": {"a": phase, "unused": {"train": {"": "x"}}}}
  )
  assert phases.trains(config, branch) == trains


def test_labels_go_by_whole_names():
  params = {
    "llm": {"head": 1},
    "llm_proj": {"kernel": 2},
    "selector": {"head": 3, "head_norm": 4},
  }
  phase = phases.Phase(
    name="train",
    start=0,
    stop=1,
    lr=0.1,
    train={"llm": "llm", "selector/head": "base"},
  )
  frozen = optimizer.FROZEN
  found = optimizer.labels_of(phase, params)
  assert found == {
    "llm": {"head": "llm"},
    "llm_proj": {"kernel": frozen},
    "selector": {"head": "base", "head_norm": frozen},
  }
