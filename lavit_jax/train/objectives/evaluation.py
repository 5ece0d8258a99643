"""Held-out evaluation of an objective, on one device or a mesh."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import averages, sharding
from lavit_jax.train.objectives import base


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The result of an evaluation.

  Attributes:
    metrics: {name: value} over all held-out batches together.
    images: uint8[N, H, W, 3] of the batch with the most valid images; None for
      stages whose metrics have no images.
  """

  metrics: dict[str, float]
  images: np.ndarray | None = None


class Evaluator:
  """Evaluates an objective on its held-out batches.

  Its program is compiled at the first call and kept for the next ones.
  """

  def __init__(
    self, objective: base.Objective, mesh: jax.sharding.Mesh | None = None
  ):
    """Prepares to evaluate; nothing is compiled yet.

    Args:
      objective: of a stage.
      mesh: whose devices share each batch; None for the first device. With
        several processes each reads its rows, and all get the same result.
    """
    self._objective, self._mesh = objective, mesh
    self._metrics = jit_metrics(objective, mesh)

  def evaluate(
    self, params: base.Params, frozen: base.Frozen, extra: base.Extra
  ) -> Evaluation:
    """Merges `held_out_metrics` of all held-out batches.

    A metric that counted nothing is left out; `best_metric` is NaN then.

    Args:
      params: of the stage.
      frozen: see `Objective.load_frozen`.
      extra: of the train state.
    """
    rows: list[dict[str, Any]] = []
    images, most_valid = None, 0
    size, mesh = self._objective.config.batch_size, self._mesh
    share = None if mesh is None else sharding.rows_of_process(mesh, size)
    for batch in self._objective.held_out_batches(share):
      if mesh is not None:
        batch = sharding.put_batch(batch, mesh, size)  # type: ignore[assignment]  # jit takes both
      row, valid = jax.device_get(self._metrics(params, frozen, extra, batch))
      shown = row.pop("images", None)
      if shown is not None and valid.sum() > most_valid:
        images, most_valid = shown[valid[: len(shown)] > 0], valid.sum()
      rows.append(row)
    best = {self._objective.best_metric: math.nan}
    return Evaluation(best | averages.merged(rows), images)


def jit_metrics(
  objective: base.Objective, mesh: jax.sharding.Mesh | None
) -> Any:
  """Jits (params, frozen, extra, batch) -> (held-out metrics, valid images).

  Args:
    objective: of a stage.
    mesh: whose devices share a batch; None for the first device.
  """

  def metrics(params, frozen, extra, batch):
    measured = objective.held_out_metrics(params, frozen, extra, batch)
    return measured, batch.get("valid", jnp.ones(1))

  # Every process reads the metrics, so they are whole on each.
  layout = None if mesh is None else sharding.replicated(mesh)
  return jax.jit(metrics, out_shardings=layout)
