"""`batches.jsonl`: which rows each step was given, in one number a step.

The number depends on the rows of a global batch and their order alone, not on
how many processes read them: runs of 1, 2 and 4 processes can be compared.
"""

import zlib
from collections.abc import Mapping

import jax
import numpy as np

from lavit_jax import hosts, sharding
from lavit_jax.train import writers


def digests(batch: Mapping[str, np.ndarray], first: int = 0) -> np.ndarray:
  """uint32[B]: of each row, crc32 of its arrays times 2 i + 1 for row i.

  Args:
    batch: arrays [B, ...], of equal B.
    first: i of the first of these rows in the global batch.
  """
  count = len(next(iter(batch.values())))
  found = np.zeros(count, np.uint32)
  names = sorted(batch)
  for j in range(count):
    value = 0
    for name in names:
      row = np.ascontiguousarray(batch[name][j])
      value = zlib.crc32(row.view(np.uint8).reshape(-1), value)
    found[j] = value
  place = 2 * (first + np.arange(count, dtype=np.uint32)) + 1
  return found * place  # uint32: what is beyond 32 bits is dropped


class BatchLog:
  """Writes a line a step: `{"step": 3, "crc32": …, "example": 24}`.

  With several processes their digests are summed on the devices, and a line is
  written one step late, so that nothing waits for it. Every process makes the
  same calls; the first writes.
  """

  def __init__(self, path, mesh, *, resume_step: int | None = None):
    """Drops what a killed run wrote after `resume_step`."""
    self._mesh = mesh
    self._pending = None
    self._writer = None
    if hosts.first():
      self._writer = writers.JsonLinesWriter(path, resume_step=resume_step)
    self._sum = jax.jit(
      lambda x: x.sum(dtype=x.dtype), out_shardings=sharding.replicated(mesh)
    )

  def add(self, step: int, batch, example: int) -> None:
    """Takes the share of this process of the batch of a step.

    Args:
      step: that the batch leads from.
      batch: host arrays [B / n, ...].
      example: number of the first row of the global batch in the data.
    """
    share = len(next(iter(batch.values())))
    found = digests(batch, jax.process_index() * share)
    self._write_pending()
    if jax.process_count() == 1:
      total = found.sum(dtype=np.uint32)
    else:
      total = self._sum(sharding.put_batch({"x": found}, self._mesh)["x"])
    self._pending = (step, total, example)
    if jax.process_count() == 1:
      self._write_pending()

  def _write_pending(self):
    if self._pending is None:
      return
    step, total, example = self._pending
    self._pending = None
    if self._writer:
      # `example` is a whole number, and exact as a float up to 2 ** 53.
      self._writer.write_scalars(
        step, {"crc32": int(total), "example": example}
      )

  def flush(self) -> None:
    """Writes what is waiting."""
    self._write_pending()
    if self._writer:
      self._writer.flush()

  def close(self) -> None:
    """Writes no more. What is waiting is dropped: others may have died."""
    if self._writer:
      self._writer.close()
