"""Values that no run can mean, named with what was expected."""

import importlib
import math
import pathlib

import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.train import loop, ranges
from tests import micro

_CONFIGS = sorted(
  f"{path.parent.name}.{path.stem}"
  for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*/*.py")
  if path.stem not in ("__init__", "common")
)


@pytest.mark.parametrize("name", _CONFIGS)
def test_every_config_that_is_shipped_may_be_run(name):
  module = importlib.import_module(f"lavit_jax.configs.{name}")
  ranges.check(module.get_config())


@pytest.mark.parametrize(
  ("field", "value", "says"),
  [
    ("seed", -1, "seed=-1: expected an integer from 0 to 4294967295"),
    ("phases.train.lr", math.inf, "phases.train.lr=inf: expected a number 0"),
    ("seed", 10**20, "seed=100000000000000000000: expected"),
    ("log.every", 0, "log.every=0: expected an integer 1 or more"),
    ("eval.every", 0, "eval.every=0"),
    ("eval.batches", 0, "eval.batches=0"),
    ("checkpoint.every", -5, "checkpoint.every=-5"),
    ("data.threads", -1, "data.threads=-1"),
    (
      "data.text_length",
      1,
      "data.text_length=1: expected an integer 2 or more",
    ),
    ("model.vit.mlp_dim", -3, "model.vit.mlp_dim=-3"),
    ("model.vit.depth", 0, "model.vit.depth=0"),
    ("model.embed_dim", 0, "model.embed_dim=0"),
    (
      "optimizer.clip_norm",
      -1.0,
      "clip_norm=-1.0: expected a number more than",
    ),
    ("optimizer.b1", 1.0, "b1=1.0: expected a number from 0 to less than 1"),
    ("optimizer.weight_decay", -5.0, "weight_decay=-5.0"),
    ("optimizer.groups.base", -1.0, "groups.base=-1.0"),
    ("phases.train.lr", -1.0, "phases.train.lr=-1.0"),
    ("phases.train.lr", math.nan, "phases.train.lr is not a number"),
    (
      "phases.train.contrast_weight",
      math.nan,
      "contrast_weight is not a number",
    ),
    (
      "phases.train.mask_share",
      2.0,
      "mask_share=2.0: expected a number from 0",
    ),
    ("phases.train.warmup", -5, "warmup=-5"),
  ],
)
def test_impossible_values_are_refused_before_anything_starts(
  tmp_path, field, value, says
):
  config = micro.config("encoder", tmp_path / "model")
  config.update_from_flattened_dict({field: value})
  with pytest.raises(errors.ConfigError) as caught:
    loop.train(config, tmp_path / "run", quiet=True)
  assert says in str(caught.value)
  assert not (tmp_path / "run").exists()


def test_numbers_of_other_kinds_that_mean_the_same_may_be_run():
  config = micro.config("encoder", "models")
  with config.ignore_type():
    config.batch_size, config.phases.train.steps = np.int64(8), 4.0
    config.optimizer.clip_norm = math.inf  # no clipping
    config.phases.train.lr = np.float32(1e-3)
  ranges.check(config)
