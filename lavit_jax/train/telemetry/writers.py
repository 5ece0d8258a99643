"""Metric writers: TensorBoard event files and JSON lines, without TensorFlow.

The methods are some of clu's `MetricWriter`, whose own implementation imports
TensorFlow. Only one process of a run may write: the caller ensures it.
"""

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from lavit_jax.core import closing
from lavit_jax.core.storage import files, log_files
from lavit_jax.train.telemetry import event_files

GOODPUT = "goodput.jsonl"  # beside metrics.jsonl; see `meter`


class MetricWriter(Protocol):
  """The interface of every writer here."""

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes {name: number}, of any type that `float` takes."""

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes {name: uint8[B, height, width, 3]}."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the settings of a run, once: flat names and JSON values."""

  def flush(self) -> None:
    """Puts everything written so far on disk."""

  def close(self) -> None:
    """Flushes and closes; nothing may be written any more."""


def create(
  workdir: str | os.PathLike[str], *, resume_step: int | None = None
) -> "MultiWriter":
  """Returns a writer of event files and `metrics.jsonl`.

  Args:
    workdir: where they are written, made if it is missing.
    resume_step: step of the checkpoint from which training is resumed. Rows of
      later steps, written by a killed run, are dropped. None keeps all.
  """
  folder = epath.Path(workdir)
  return MultiWriter(
    [
      event_files.TensorBoardWriter(folder, resume_step=resume_step),
      JsonLinesWriter(folder / "metrics.jsonl", resume_step=resume_step),
    ]
  )


class MultiWriter:
  """Passes every call on to each of its writers."""

  def __init__(self, writers: Sequence[MetricWriter]):
    """Takes the writers; without any, nothing is written."""
    self._writers = tuple(writers)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See `MetricWriter`."""
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """See `MetricWriter`."""
    for writer in self._writers:
      writer.write_images(step, images)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """See `MetricWriter`."""
    for writer in self._writers:
      writer.write_hparams(hparams)

  def flush(self) -> None:
    """See `MetricWriter`."""
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    """See `MetricWriter`."""
    closing.each(writer.close for writer in self._writers)


class JsonLinesWriter:
  """Writes one JSON object a line: `{"step": 3, "time": 17…, "loss": 0.5}`.

  A number that is not finite is written as null (JSON has no NaN). Images
  are left to the event files.
  """

  def __init__(
    self, path: str | os.PathLike[str], *, resume_step: int | None = None
  ):
    """Opens a file to append to; a line that a kill cut short is dropped.

    Args:
      path: of the file, made if it is missing.
      resume_step: last step to keep; None keeps all.
    """
    self._path = epath.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._drop_after(math.inf if resume_step is None else resume_step)
    self._file = log_files.open_log(self._path)

  def _drop_after(self, step: float) -> None:
    """Drops torn lines, and those of later steps.

    Steps only grow: pieces before one that is kept whole are kept whole, too.
    """
    for piece in reversed(log_files.pieces(self._path)):
      data = piece.read_bytes()
      kept = b"".join(
        line
        for line in data.splitlines(keepends=True)
        if (row := _parse_line(line)) is not None
        and ("step" not in row or row["step"] <= step)
      )
      if len(kept) == len(data) > 0:
        return
      if kept:
        files.write_whole(piece, kept)
      else:
        piece.unlink()

  def _write(self, row: Mapping[str, Any]) -> None:
    self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
    # On a disk a kill loses no whole line; in an object store those of the
    # last ten seconds and more (see `log_files`).
    self._file.flush()

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See `MetricWriter`."""
    row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    for name, value in scalars.items():
      number = float(value)
      row[name] = number if math.isfinite(number) else None
    self._write(row)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes nothing: images are in the event files."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes nothing: every line is a row, the settings are in config.json."""

  def flush(self) -> None:
    """Writes the file through to the disk, past the system's own buffer."""
    self._file.sync()

  def close(self) -> None:
    """See `MetricWriter`; a second call closes nothing."""
    self._file.close()


def _parse_line(line: bytes) -> dict[str, Any] | None:
  """Returns the row of one line; None for a torn or foreign one."""
  if not line.endswith(b"\n"):
    return None
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the rows of a metrics file or its segments, without torn lines.

  Raises:
    FileNotFoundError: `path` does not exist.
  """
  pieces = log_files.pieces(path)
  if not pieces:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
  lines = (line for p in pieces for line in p.read_bytes().splitlines(True))
  return [row for row in map(_parse_line, lines) if row is not None]


def curves(
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[tuple[int, float]]]:
  """Maps rows to `{metric: [(step, value), …]}`, finite numbers only."""
  points: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    for name, value in row.items():
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if number and name not in ("step", "time") and "step" in row:
        points.setdefault(name, []).append((row["step"], float(value)))
  return points
