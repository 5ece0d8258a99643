"""Objectives by shape alone are those with weights and data."""

import jax
import pytest

from lavit_jax.core import errors, sharding
from lavit_jax.train import objectives
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives.frozen import artifacts
from tests import micro
from tests.train import sharding_test

_STAGES = ("encoder", "tokenizer", "pixels", "autoencoder", "pretrain")


def _shapes(tree):
  return {
    jax.tree_util.keystr(path): (tuple(x.shape), x.dtype)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize("stage", _STAGES)
def test_batches_and_frozen_arrays_have_the_shapes_that_are_promised(
  stage, micro_codes
):
  objective = objectives.build(sharding_test.stage_config(stage, micro_codes))
  batch = next(objective.batches(0))
  abstract = objective.batch_shapes()
  assert {k: x.shape for k, x in batch.items()} == {
    k: x.shape for k, x in abstract.items()
  }
  for name, array in batch.items():
    assert jax.dtypes.canonicalize_dtype(array.dtype) == abstract[name].dtype
  frozen = _shapes(sharding.unbox(objective.frozen_shapes()))
  real = _shapes(objective.load_frozen())
  assert {k: frozen[k] for k in real} == real


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain"])
def test_an_abstract_objective_has_the_shapes_of_the_real_one(
  stage, micro_codes
):
  cfg = micro.config(stage, micro_codes)
  real = objectives.build(cfg)
  cfg = micro.assuming(cfg)
  outline = objectives.build(cfg, artifacts.AbstractArtifacts(cfg))
  assert outline.batch_shapes() == real.batch_shapes()
  for shapes in (
    lambda o: jax.eval_shape(step_lib.init_fn(o, 0)),
    lambda o: o.frozen_shapes(),
  ):
    assert _shapes(shapes(outline)) == _shapes(shapes(real))


def test_without_parts_and_without_assumptions_the_error_says_what_to_do(
  micro_codes,
):
  cfg = micro.config("pretrain", micro_codes)
  with pytest.raises(errors.ConfigError, match=r"config\.assumed"):
    artifacts.AbstractArtifacts(cfg)
