"""Where a run is in its data, in examples: rows of the endless data.

Steps and examples part company where a run was resumed with another batch
size, or left out the batches behind a bad one.
"""

import dataclasses
from typing import Any

from lavit_jax.core import errors


@dataclasses.dataclass(frozen=True)
class Position:
  """Batch `step` begins with example `step * batch_size + skip`."""

  batch_size: int
  skip: int = 0

  def example(self, step: int) -> int:
    """The first example of the batch that leads from `step`."""
    return step * self.batch_size + self.skip

  def meta(self, step: int) -> dict[str, int]:
    """What a checkpoint says of it; `resume` reads it."""
    return {"next_example": self.example(step), "batch_size": self.batch_size}


def resume(
  meta: dict[str, Any], step: int, batch_size: int, batch_size_may_change: bool
) -> Position:
  """The position of a checkpoint, for batches that may differ in size.

  Args:
    meta: of the checkpoint.
    step: of the checkpoint.
    batch_size: of this run.
    batch_size_may_change: whether rows are the same in a batch of another size.

  Raises:
    errors.ConfigError: the rows come in batches of one fixed size.
  """
  data = meta["data"]
  size = int(data.get("batch_size", batch_size))
  if size != batch_size and not batch_size_may_change:
    raise errors.ConfigError(
      f"config.batch_size={batch_size}, but this run has had batches of {size}"
      " so far, and its rows are put together by batch (all of one image"
      f" size): another size would be other data. Set batch_size={size}, or"
      " train in another --workdir."
    )
  # Checkpoints of earlier versions counted batches.
  start = int(data.get("next_example", step * batch_size))
  return Position(batch_size, start - step * batch_size)
