"""What a step or a held-out batch measures, as sums that can be added up.

A metric is a `clu.metrics.Metric`: it holds sums and counts, is merged over
batches, and only then divided. So a mean over batches of unequal weight is the
mean over what they hold, and a batch with nothing to count weighs nothing.
"""

import functools
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

Metrics = dict[str, metrics.Metric]


@flax.struct.dataclass
class Sum(metrics.Metric):
  """A count that is added up: tokens, steps left out."""

  total: jax.Array

  def merge(self, other):
    """The sum of both."""
    return Sum(self.total + other.total)

  def compute(self):
    """The sum."""
    return self.total


@flax.struct.dataclass
class Std(metrics.Std):
  """clu's standard deviation, whose `compute` asks jax.numpy.clip for `a_min`.

  JAX 0.10 has no such argument any more (clu 0.0.12).
  """

  def compute(self):
    """sqrt(mean of squares - square of the mean)."""
    mean = self.total / self.count
    return jnp.sqrt(jnp.maximum(self.sum_of_squares / self.count - mean**2, 0))


def mean(total: jax.Array, count: jax.Array) -> metrics.Average:
  """A mean of which float[] sum and float[] count are known."""
  return metrics.Average(total=total, count=count)


def of_step(value: jax.Array) -> metrics.Average:
  """A number float[] of a step, in which every step counts alike."""
  return metrics.Average(total=value, count=jnp.ones(()))


def last(value: jax.Array) -> metrics.LastValue:
  """A number float[] of which the newest is asked for."""
  return metrics.LastValue(total=value, count=jnp.ones(()))


def ratio(total: jax.Array, count: jax.Array) -> jax.Array:
  """The mean float[] of a sum; 0 of nothing, which is no loss."""
  return total / jnp.maximum(count, 1.0)


def value(metric: metrics.Metric) -> float:
  """The number of one metric; NaN if there was nothing to count."""
  found = jax.tree.map(np.float64, jax.device_get(metric))
  return float(found.compute()) if _counted(found) else math.nan


def merged(rows: Sequence[Metrics], *, finite: bool = False):
  """The numbers of several steps or batches together.

  Args:
    rows: metrics of each, on devices or not; all of them have the same names.
    finite: leave out, metric by metric, what is not finite; NaN where nothing
      else is there.

  Returns:
    {name: float}, without the names of which there was nothing to count.
  """
  rows = jax.tree.map(np.float64, jax.device_get(list(rows)))
  found = {}
  for name in rows[0] if rows else ():
    column = [row[name] for row in rows]
    kept = [x for x in column if _is_finite(x) or not finite]
    if not kept:
      found[name] = math.nan
      continue
    whole = functools.reduce(lambda a, b: a.merge(b), kept)
    if _counted(whole):
      found[name] = float(whole.compute())
  return found


def _is_finite(metric) -> bool:
  return all(np.isfinite(x) for x in jax.tree.leaves(metric))


def _counted(metric) -> bool:
  return getattr(metric, "count", 1) != 0
