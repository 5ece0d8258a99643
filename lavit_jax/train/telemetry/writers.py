"""Metric writers: TensorBoard event files (no TensorFlow) and JSON lines.

The methods are those of clu's `MetricWriter`, whose own implementation imports
TensorFlow. Only one process of a run may write; the caller sees to that.
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
  """What every writer here can do; scalars are anything `float` takes."""

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes one number a name."""

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes uint8[B, height, width, 3] a name."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes one text a name (TensorBoard shows it as Markdown)."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes what identifies the run, once: flat names and plain values."""

  def flush(self) -> None:
    """Puts everything written so far on disk."""

  def close(self) -> None:
    """Flushes, and writes no more."""


def create(
  workdir: str | os.PathLike, *, resume_step: int | None = None
) -> "MultiWriter":
  """Event files and `metrics.jsonl` in `workdir`, made if it is missing.

  `resume_step` is the step of the checkpoint that training goes on from: what
  an earlier, killed run wrote after it is dropped. None keeps everything.
  """
  workdir = epath.Path(workdir)
  return MultiWriter(
    [
      event_files.TensorBoardWriter(workdir, resume_step=resume_step),
      JsonLinesWriter(workdir / "metrics.jsonl", resume_step=resume_step),
    ]
  )


class MultiWriter:
  """Hands every call on to each of its writers."""

  def __init__(self, writers: Sequence[MetricWriter]):
    self._writers = tuple(writers)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See `MetricWriter`."""
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """See `MetricWriter`."""
    for writer in self._writers:
      writer.write_images(step, images)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """See `MetricWriter`."""
    for writer in self._writers:
      writer.write_texts(step, texts)

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
  """One JSON object a line: `{"step": 3, "time": 17…, "loss": 0.5}`.

  A number that is not finite is written as null (JSON has no NaN). Images
  are left to the event files. A line that a kill cut short is dropped when the
  file is opened again, and so are, with `resume_step`, later steps than it.
  """

  def __init__(
    self, path: str | os.PathLike, *, resume_step: int | None = None
  ):
    self._path = epath.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._drop_after(math.inf if resume_step is None else resume_step)
    self._file = log_files.open_log(self._path)

  def _drop_after(self, step: float) -> None:
    """Steps only grow: nothing is to be dropped before a piece that is kept."""
    for piece in reversed(log_files.pieces(self._path)):
      data = piece.read_bytes()
      kept = [
        line
        for line in data.splitlines(keepends=True)
        if (row := _parse_line(line)) is not None
        and ("step" not in row or row["step"] <= step)
      ]
      if len(whole := b"".join(kept)) == len(data) > 0:
        return
      if kept:
        files.write_whole(piece, whole)
      else:
        piece.unlink()

  def _write(self, row: Mapping[str, Any]) -> None:
    self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
    # On a disk a kill loses no whole line; in an object store those of the
    # last ten seconds and more (see `log_files`).
    self._file.flush()

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See `MetricWriter`."""
    row = {"step": int(step), "time": round(time.time(), 3)}
    for name, value in scalars.items():
      value = float(value)
      row[name] = value if math.isfinite(value) else None
    self._write(row)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes nothing: images are in the event files."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """See `MetricWriter`."""
    row = {"step": int(step), "time": round(time.time(), 3)}
    self._write(row | {"texts": dict(texts)})

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """See `MetricWriter`; at the head of a new file only."""
    if self._file.empty:
      plain = json.loads(json.dumps(dict(hparams), default=str))
      self._write({"hparams": _finite(plain)})

  def flush(self) -> None:
    """Hands the file to the disk, past the system's own buffer."""
    self._file.sync()

  def close(self) -> None:
    """See `MetricWriter`; a second call closes nothing."""
    self._file.close()


def _finite(value: Any) -> Any:
  """The same JSON value with null for every number that is not finite."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_finite(item) for item in value]
  broken = isinstance(value, float) and not math.isfinite(value)
  return None if broken else value


def _parse_line(line: bytes) -> dict[str, Any] | None:
  """The row of one whole line; None for a torn or foreign one."""
  if not line.endswith(b"\n"):
    return None
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The whole rows of a metrics file or its segments, torn lines left out.

  Raises:
    FileNotFoundError: `path` does not exist.
  """
  pieces = log_files.pieces(path)
  if not pieces:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
  lines = (line for p in pieces for line in p.read_bytes().splitlines(True))
  return [row for row in map(_parse_line, lines) if row is not None]


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple]]:
  """Rows to `{metric: [(step, value), …]}`, finite numbers only."""
  found: dict[str, list[tuple]] = {}
  for row in rows:
    for name, value in row.items():
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if number and name not in ("step", "time") and "step" in row:
        found.setdefault(name, []).append((row["step"], float(value)))
  return found
