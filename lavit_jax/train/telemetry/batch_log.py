"""`batches.jsonl`: which rows each step was given, in one number a step.

The number depends on the rows of a global batch and their order alone, not on
how many processes read them: runs of 1, 2 and 4 processes can be compared.
"""

import zlib
from collections.abc import Mapping

import jax
import numpy as np

from lavit_jax.core import hosts, sharding
from lavit_jax.train.telemetry import writers


def digests(batch: Mapping[str, np.ndarray], rows=None) -> np.ndarray:
  """uint32[B]: of each row, crc32 of its arrays times 2 i + 1 for row i.

  Args:
    batch: arrays [B, ...], of equal B.
    rows: int[B], i of each in the global batch; 0 ... B - 1 by default.
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
  rows = np.arange(count) if rows is None else np.asarray(rows)
  # In uint32: what is beyond 32 bits is dropped.
  return found * (2 * rows.astype(np.uint32) + 1)


class BatchLog:
  """Writes a line a step: `{"step": 3, "crc32": …, "example": 24}`.

  With several processes their digests are summed on the devices, and a line is
  written one step late, so that nothing waits for it. Every process makes the
  same calls; the first writes.
  """

  def __init__(
    self, path, mesh, batch_size: int, *, resume_step: int | None = None
  ):
    """Drops what a killed run wrote after `resume_step`."""
    self._mesh, self._batch_size = mesh, batch_size
    self._rows = sharding.rows_of_process(mesh, batch_size)
    self._pending = None
    self._writer = None
    if hosts.is_lead():
      self._writer = writers.JsonLinesWriter(path, resume_step=resume_step)
    self._sum = jax.jit(
      lambda x: x.sum(dtype=x.dtype), out_shardings=sharding.replicated(mesh)
    )

  def add(self, step: int, batch, example: int) -> None:
    """Takes the share of this process of the batch of a step.

    Args:
      step: that the batch leads from.
      batch: host arrays of the rows of this process.
      example: number of the first row of the global batch in the data.
    """
    found = digests(batch, self._rows)
    self._write_pending()
    if jax.process_count() == 1:
      total = found.sum(dtype=np.uint32)
    else:
      put = sharding.put_batch({"x": found}, self._mesh, self._batch_size)
      total = self._sum(put["x"])
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
