"""Held-out numbers: sums over tokens and images, however they are cut."""

import math

import numpy as np
import pytest

from lavit_jax.train.objectives import base, evaluation
from tests.train import outlines, stubs


def _evaluate(case, *batches):
  objective = case.objective
  objective.held_out_batches = lambda rows: iter(batches)
  params, frozen, extra = case.args[:3]
  evaluator = evaluation.Evaluator(objective)
  return evaluator.evaluate(params, frozen, extra).metrics


@pytest.fixture(scope="module")
def pretrain():
  case = outlines.Case(stubs.pretrain())
  case.params["llm"]["head"] = 100 * case.params["llm"]["head"]
  return case


def _rows(batch, *rows):
  return {name: x[list(rows)] for name, x in batch.items()}


def test_held_out_losses_are_means_over_targets(pretrain):
  """Row i has 2^i of them, so that batches weigh as they hold."""
  batch = pretrain.batch
  whole = _evaluate(pretrain, batch)
  cut = _evaluate(pretrain, _rows(batch, 0), _rows(batch, *range(1, 8)))
  assert set(whole) == {"loss", "text_loss", "visual_loss"}
  assert cut == pytest.approx(whole, rel=1e-5)
  each = [_evaluate(pretrain, _rows(batch, i))["loss"] for i in (0, 7)]
  assert abs(np.mean(each) - whole["loss"]) > 1e-3


def test_batches_without_visual_targets_weigh_nothing(pretrain):
  batch = pretrain.batch
  text = batch | {"targets": np.full_like(batch["targets"], 5)}
  alone = _evaluate(pretrain, batch)
  both = _evaluate(pretrain, batch, text)
  assert both["visual_loss"] == pytest.approx(alone["visual_loss"], rel=1e-6)
  assert abs(both["text_loss"] - alone["text_loss"]) > 1e-3
  assert "visual_loss" not in _evaluate(pretrain, text)


def test_nothing_to_learn_from_is_no_number_for_the_best(pretrain):
  batch = pretrain.batch
  empty = batch | {"weights": np.zeros_like(batch["weights"])}
  found = _evaluate(pretrain, empty)
  assert list(found) == ["loss"]
  assert math.isnan(found["loss"])


def test_images_are_of_the_fullest_batch_and_valid():
  case = outlines.Case(stubs.pixels())
  objective, batch = case.objective, case.batch
  real = objective.held_out_metrics

  def metrics(params, frozen, extra, batch):
    made = real(params, frozen, extra, batch)
    return made | {"images": batch["image"][:3]}

  objective.held_out_metrics = metrics
  batches = _rows(batch, 0, 1), _rows(batch, 1, 2, 3)
  objective.held_out_batches = lambda rows: iter(batches)
  evaluator = evaluation.Evaluator(objective)
  found = evaluator.evaluate(*case.args[:3])
  np.testing.assert_array_equal(found.images, batch["image"][[2, 3]])
  assert set(found.metrics) == {
    "loss",
    "eps_mse",
    "eps_mse_noisy",
    "picture_mse",
  }


def test_a_stage_without_a_loss_is_no_objective():
  class Nothing(base.Objective):
    """Implements nothing."""

  with pytest.raises(TypeError, match=r"abstract.*combine"):
    Nothing(None)
