"""Means of batches of unequal weight are means over all their elements."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import averages


def _batches():
  rng = np.random.default_rng(0)
  return [rng.normal(2.0, 1.0, size) for size in (1, 7, 30)]


def test_a_mean_does_not_depend_on_the_cut_into_batches():
  rows = [{"loss": averages.mean(x.sum(), x.size)} for x in _batches()]
  whole = np.concatenate(_batches()).mean()
  assert averages.merged(rows)["loss"] == pytest.approx(whole, rel=1e-12)
  assert abs(np.mean([x.mean() for x in _batches()]) - whole) > 0.01


def test_a_standard_deviation_is_that_of_all_elements():
  rows = [
    {"std": averages.Std(x.sum(), np.square(x).sum(), x.size)}
    for x in _batches()
  ]
  whole = np.concatenate(_batches()).std()
  assert averages.merged(rows)["std"] == pytest.approx(whole, rel=1e-6)


def test_a_batch_with_nothing_to_count_has_no_weight():
  zero = jnp.zeros(())
  rows = [{"visual": averages.mean(jnp.float32(6), jnp.float32(2))}]
  rows += [{"visual": averages.mean(zero, zero)}] * 3
  assert averages.merged(rows) == {"visual": 3.0}
  assert averages.merged(rows, finite=True) == {"visual": 3.0}
  assert averages.merged(rows[1:]) == {}  # nothing can be said of it
  assert math.isnan(averages.value(rows[1]["visual"]))


def test_counts_are_added_up_and_the_newest_rate_is_kept():
  rows = [
    {
      "tokens": averages.Sum(jnp.float32(x)),
      "rate": averages.last(jnp.float32(x)),
    }
    for x in (3, 5, 4)
  ]
  assert averages.merged(rows) == {"tokens": 12.0, "rate": 4.0}


def test_numbers_that_are_not_finite_are_left_out_on_request():
  losses = [2.0, math.nan, 4.0, math.inf]
  rows = [{"loss": averages.of_step(jnp.float32(x))} for x in losses]
  assert averages.merged(rows, finite=True) == {"loss": 3.0}
  assert math.isnan(averages.merged(rows)["loss"])
  only = averages.merged(rows[1:2], finite=True)
  assert math.isnan(only["loss"])
  assert averages.ratio(jnp.zeros(()), jnp.zeros(())) == 0


def test_no_batch_gives_no_numbers():
  assert averages.merged([]) == {}
