"""Metrics of steps and held-out batches, as sums and counts to be merged.

A metric is a `clu.metrics.Metric`: it holds sums and counts, is merged over
batches, and only then divided. Thus the mean over batches of unequal weight is
the mean over their examples, and a batch with a count of 0 has no weight.

The sums that an objective differentiates are plain dicts and become metrics
only in `Objective.combine`: parts of a batch are added up before the loss, any
function of the sums, is known, and clu's metrics know division alone. Nor is
there a `clu.metrics.Collection`: it merges all metrics of a row or none, while
here one that is not finite is left out alone.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

Metric: TypeAlias = metrics.Metric
Metrics = dict[str, Metric]


@flax.struct.dataclass
class Sum(metrics.Metric):
  """A count that is summed, such as tokens or skipped steps."""

  total: jax.Array

  def merge(self, other: "Sum") -> "Sum":
    """Returns the sum of both."""
    return Sum(self.total + other.total)

  def compute(self) -> jax.Array:
    """Returns the sum."""
    return self.total


@flax.struct.dataclass
class Std(metrics.Std):
  """A standard deviation.

  clu's own (0.0.12) passes `a_min` to jax.numpy.clip, which JAX 0.10 removed.
  """

  def compute(self) -> jax.Array:
    """Returns sqrt(mean of squares - square of the mean)."""
    mean = self.total / self.count
    return jnp.sqrt(jnp.maximum(self.sum_of_squares / self.count - mean**2, 0))


def mean(total: jax.Array, count: jax.Array) -> metrics.Average:
  """Returns a mean as a metric, from its sum float[] and count float[]."""
  return metrics.Average(total=total, count=count)


def of_step(value: jax.Array) -> metrics.Average:
  """Returns a number float[] as a metric to which each step counts alike."""
  return metrics.Average(total=value, count=jnp.ones(()))


def last(value: jax.Array) -> metrics.LastValue:
  """Returns a number float[] as a metric whose last value is reported."""
  return metrics.LastValue(total=value, count=jnp.ones(()))


def ratio(total: jax.Array, count: jax.Array) -> jax.Array:
  """Returns the mean float[] of a sum; 0 for a count of 0, as for a loss."""
  return total / jnp.maximum(count, 1.0)


def value(metric: Metric) -> float:
  """Returns the number of a metric, NaN for a count of 0."""
  on_host = jax.tree.map(np.float64, jax.device_get(metric))
  return float(on_host.compute()) if _has_count(on_host) else math.nan


def merged(
  rows: Sequence[Metrics], *, finite: bool = False
) -> dict[str, float]:
  """Merges the metrics of several steps or batches.

  Args:
    rows: metrics of each, on devices or not, all with the same names.
    finite: leave out, metric by metric, values that are not finite. The result
      is NaN if none is.

  Returns:
    {name: float}, without metrics whose count is 0.
  """
  rows = jax.tree.map(np.float64, jax.device_get(list(rows)))
  numbers = {}
  for name in rows[0] if rows else ():
    column = [row[name] for row in rows]
    kept = [x for x in column if _is_finite(x) or not finite]
    if not kept:
      numbers[name] = math.nan
      continue
    metric: Any = functools.reduce(lambda a, b: a.merge(b), kept)
    if _has_count(metric):
      numbers[name] = float(metric.compute())
  return numbers


def _is_finite(metric) -> bool:
  return all(np.isfinite(x) for x in jax.tree.leaves(metric))


def _has_count(metric) -> bool:
  return getattr(metric, "count", 1) != 0
