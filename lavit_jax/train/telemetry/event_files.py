"""TensorBoard event files, on a disk or in an object store.

Messages and records are TensorBoard's own, whose package needs no TensorFlow.
Its `EventFileWriter` is not used: it reopens a remote file to append every
record, and objects cannot be appended to. `log_files` stores segments instead.
"""

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.summary.writer import record_writer
from tensorboard.util import tensor_util

from lavit_jax.core import closing
from lavit_jax.core.storage import files, log_files

_PREFIX = "events.out.tfevents."
_SERIAL = itertools.count()  # two writers in one second get two names
_SEGMENT = 4 << 20  # bytes of a file in an object store


class TensorBoardWriter:
  """Writes one event file, which TensorBoard can read as it grows.

  In an object store another one is begun every few MB: see `log_files`.
  """

  def __init__(
    self, directory: str | os.PathLike[str], *, resume_step: int | None = None
  ):
    """Begins a file.

    Args:
      directory: of the event files, made if it is missing.
      resume_step: step from which an earlier run is resumed. The file begins
        with a marker on which TensorBoard drops the later steps of earlier
        files. None: nothing is dropped.
    """
    self._directory = epath.Path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    is_first = not any(
      path.name.startswith(_PREFIX) for path in files.listing(self._directory)
    )
    # Earlier files that are still being stored.
    self._unfinished: list[futures.Future] = []
    self._begin_file()
    if is_first:
      self._write(_session_start(step=0))
    elif resume_step is not None:
      self._write(_session_start(resume_step + 1))  # not the first one: purges

  def _begin_file(self) -> None:
    """Begins another file, which TensorBoard reads after those before it."""
    stamp = f"{int(time.time()):010d}.{socket.gethostname()}"
    # TensorBoard reads files in the order of their names: numbers are padded.
    name = f"{_PREFIX}{stamp}.{os.getpid()}.{next(_SERIAL):06d}"
    self._file: Any = log_files.open_object(self._directory / name)
    self._records = record_writer.RecordWriter(self._file)
    self._write(event_pb2.Event(file_version="brain.Event:2"))

  def _write(self, event: event_pb2.Event) -> None:
    if files.is_remote(self._directory) and self._file.size > _SEGMENT:
      self._unfinished.append(self._file.finish())
      self._begin_file()
    event.wall_time = time.time()
    self._records.write(event.SerializeToString())

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See `writers.MetricWriter`."""
    summary = summary_pb2.Summary()
    for name, value in scalars.items():
      summary.value.add(tag=name, simple_value=float(value))
    self._write(event_pb2.Event(step=int(step), summary=summary))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """See `writers.MetricWriter`; ValueError for another dtype or shape."""
    summary = summary_pb2.Summary()
    metadata = image_metadata.create_summary_metadata(None, None)
    for name, batch in images.items():
      batch = np.asarray(batch)
      if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
        raise ValueError(
          f"images[{name!r}] is {batch.dtype}{list(batch.shape)}; write_images"
          " takes uint8[B, height, width, 3]."
        )
      height, width = batch.shape[1:3]
      parts = [b"%d" % width, b"%d" % height, *map(_png, batch)]
      tensor = tensor_util.make_tensor_proto(parts, dtype=np.object_)
      summary.value.add(tag=name, metadata=metadata, tensor=tensor)
    self._write(event_pb2.Event(step=int(step), summary=summary))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """See `writers.MetricWriter`; shown on TensorBoard's HPARAMS page."""
    plain = {name: _plain(value) for name, value in hparams.items()}
    summary = hparams_summary.hparams_pb(plain)
    self._write(event_pb2.Event(summary=summary))

  def flush(self) -> None:
    """See `writers.MetricWriter`."""
    self._records.flush()
    while self._unfinished and self._unfinished[0].done():
      self._unfinished.pop(0).result()  # raises the error of its upload

  def close(self) -> None:
    """See `writers.MetricWriter`; a second call closes nothing."""
    pending = [upload.result for upload in self._unfinished]
    closing.each([self._records.close, *pending])


def _session_start(step: int) -> event_pb2.Event:
  """Returns the marker of a start; every one but the first purges."""
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  return event_pb2.Event(step=step, session_log=start)


def _png(image: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG")
  return buffer.getvalue()


def _plain(value: Any) -> bool | float | str:
  """Returns a value as HPARAMS shows it: a bool, a number or text."""
  if isinstance(value, np.generic):
    value = value.item()
  return value if isinstance(value, (bool, int, float)) else str(value)
