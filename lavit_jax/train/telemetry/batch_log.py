"""`batches.jsonl`: a digest of the rows of each step's batch.

A digest depends on the rows of a global batch and their order alone, not on
how many processes read them: runs of 1, 2 and 4 processes can be compared.
"""

import os
import zlib
from collections.abc import Mapping

import jax
import numpy as np

from lavit_jax.core import hosts, sharding
from lavit_jax.train.telemetry import writers


def digests(
  batch: Mapping[str, np.ndarray], rows: np.ndarray | None = None
) -> np.ndarray:
  """Computes uint32[B]: crc32 of a row's arrays times 2 i + 1 for row i.

  Args:
    batch: arrays [B, ...] of equal B.
    rows: int[B], i of each in the global batch; 0 ... B - 1 by default.
  """
  count = len(next(iter(batch.values())))
  names = sorted(batch)
  crcs = np.zeros(count, np.uint32)
  for j in range(count):
    crc = 0
    for name in names:
      crc = zlib.crc32(np.ascontiguousarray(batch[name][j]).tobytes(), crc)
    crcs[j] = crc
  rows = np.arange(count) if rows is None else np.asarray(rows)
  # In uint32: bits beyond 32 are dropped.
  return crcs * (2 * rows.astype(np.uint32) + 1)


class BatchLog:
  """Writes a line a step: `{"step": 3, "crc32": …, "example": 24}`.

  With several processes their digests are summed on the devices, and a line is
  written one step late, so that nothing waits for it. Every process makes the
  same calls; the first one writes.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    *,
    resume_step: int | None = None,
  ):
    """Opens the log; lines after `resume_step`, of a killed run, are dropped.

    Args:
      path: of the log.
      mesh: of the run.
      batch_size: rows of a global batch.
      resume_step: last step to keep; None keeps all.
    """
    self._mesh, self._batch_size = mesh, batch_size
    self._rows = sharding.rows_of_process(mesh, batch_size)
    # (step, sum of the digests, number of the first example).
    self._pending: tuple[int, jax.Array | np.uint32, int] | None = None
    self._writer = None
    if hosts.is_lead():
      self._writer = writers.JsonLinesWriter(path, resume_step=resume_step)
    self._sum = jax.jit(
      lambda x: x.sum(dtype=x.dtype), out_shardings=sharding.replicated(mesh)
    )

  def add(
    self, step: int, batch: Mapping[str, np.ndarray], example: int
  ) -> None:
    """Takes this process's share of the batch of a step.

    Args:
      step: that the batch leads from.
      batch: host arrays of the rows of this process.
      example: number of the first row of the global batch in the data.
    """
    crcs = digests(batch, self._rows)
    self._write_pending()
    if jax.process_count() == 1:
      self._pending = (step, crcs.sum(dtype=np.uint32), example)
      self._write_pending()
      return
    on_mesh = sharding.put_batch({"x": crcs}, self._mesh, self._batch_size)
    self._pending = (step, self._sum(on_mesh["x"]), example)

  def _write_pending(self):
    if self._pending is None:
      return
    step, total, example = self._pending
    self._pending = None
    if self._writer:
      # Both are integers, and exact as floats up to 2 ** 53.
      self._writer.write_scalars(
        step, {"crc32": int(total), "example": example}
      )

  def flush(self) -> None:
    """Writes the pending line."""
    self._write_pending()
    if self._writer:
      self._writer.flush()

  def close(self) -> None:
    """Closes the log without the pending line: other processes may be dead."""
    if self._writer:
      self._writer.close()
