"""A run's position in its data, in examples: rows of the endless data.

Examples are not steps times the batch size where a run was resumed with another
batch size, or skipped the batches up to a bad one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors


@dataclasses.dataclass(frozen=True)
class Position:
  """Batch `step` begins with example `step * batch_size + skip`."""

  batch_size: int
  skip: int = 0

  def example(self, step: int) -> int:
    """Returns the first example of the batch that leads from `step`."""
    return step * self.batch_size + self.skip

  def meta(self, step: int) -> dict[str, int]:
    """Returns the checkpoint's entry `data`, which `resume` reads."""
    return {"next_example": self.example(step), "batch_size": self.batch_size}


def resume(
  meta: Mapping[str, Any],
  step: int,
  batch_size: int,
  batch_size_may_change: bool,
) -> Position:
  """Returns the position of a checkpoint, for batches of this run's size.

  Args:
    meta: of the checkpoint.
    step: of the checkpoint.
    batch_size: of this run.
    batch_size_may_change: whether rows do not depend on the size of their
      batch.

  Raises:
    errors.ConfigError: they do, and the batch size has changed.
  """
  data = meta["data"]
  size = int(data.get("batch_size", batch_size))
  if size != batch_size and not batch_size_may_change:
    raise errors.ConfigError(
      f"config.batch_size={batch_size}, but this run has had batches of {size}"
      " so far, and all images of one of its batches have the same size: with"
      f" another batch size the data would change. Set batch_size={size}, or"
      " train in another --workdir."
    )
  # Checkpoints of earlier versions counted batches.
  start = int(data.get("next_example", step * batch_size))
  return Position(batch_size, start - step * batch_size)
