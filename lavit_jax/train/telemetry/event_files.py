"""TensorBoard event files without TensorFlow.

The format: tensorboard/compat/proto/{event,summary,tensor}.proto, framed as
TFRecord (length, crc of it, bytes, crc of them; crc32c, masked). Only the few
messages that training writes are encoded, by hand.
"""

import io
import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from lavit_jax.core import closing
from lavit_jax.core.storage import files, log_files
from lavit_jax.train.telemetry import crc32c

_SERIAL = itertools.count()  # two writers in one second get two names
_SEGMENT = 4 << 20  # bytes of a file in an object store


class TensorBoardWriter:
  """One event file in `directory`, readable by TensorBoard as it grows.

  In an object store a new one is begun every few MB: see `log_files`.
  With `resume_step`, the file begins with a marker on which TensorBoard drops
  what earlier files hold of later steps.
  """

  def __init__(
    self, directory: str | os.PathLike, *, resume_step: int | None = None
  ):
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark = "events.out.tfevents."
    first = not any(p.name.startswith(mark) for p in files.listing(directory))
    self._directory = directory
    self._before = []  # what is still being stored of earlier files
    self._begin()
    if first or resume_step is not None:
      start = _int(1, 1)  # SessionLog.status = START; the second one purges
      self._event(0 if first else resume_step + 1, _bytes(7, start))

  def _begin(self) -> None:
    """Another file, which TensorBoard reads after those before it."""
    stamp = f"{int(time.time()):010d}.{socket.gethostname()}"
    # TensorBoard reads files in the order of their names: numbers are padded.
    name = f"events.out.tfevents.{stamp}.{os.getpid()}.{next(_SERIAL):06d}"
    self._file = log_files.open_object(self._directory / name)
    self._event(0, _bytes(3, b"brain.Event:2"))

  def _event(self, step: int, payload: bytes) -> None:
    if files.is_remote(self._directory) and self._file.size > _SEGMENT:
      self._before.append(self._file.finish())
      self._begin()
    head = _double(1, time.time()) + _int(2, int(step))
    self._file.write(frame(head + payload))

  def _summary(self, step: int, values: Sequence[bytes]) -> None:
    summary = b"".join(_bytes(1, value) for value in values)
    self._event(step, _bytes(5, summary))

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See `writers.MetricWriter`."""
    self._summary(
      step,
      [
        _bytes(1, name.encode()) + _float(2, float(value))
        for name, value in scalars.items()
      ],
    )

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """See `writers.MetricWriter`; ValueError for another dtype or shape."""
    values = []
    for name, batch in images.items():
      batch = np.asarray(batch)
      if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
        raise ValueError(
          f"images[{name!r}] is {batch.dtype}{list(batch.shape)}; write_images"
          " takes uint8[B, height, width, 3]."
        )
      height, width = batch.shape[1:3]
      parts = [b"%d" % width, b"%d" % height, *map(_png, batch)]
      values.append(_tensor_value(name, "images", parts))
    self._summary(step, values)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """See `writers.MetricWriter`."""
    values = [_tensor_value(k, "text", [t.encode()]) for k, t in texts.items()]
    self._summary(step, values)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """See `writers.MetricWriter`; shown on TensorBoard's HPARAMS page."""
    session = b"".join(
      _bytes(1, _bytes(1, name.encode()) + _bytes(2, _plain_value(value)))
      for name, value in hparams.items()
    ) + _double(5, time.time())
    content = _bytes(3, session)  # HParamsPluginData.session_start_info
    tag = _bytes(1, b"_hparams_/session_start_info")
    self._summary(0, [tag + _bytes(9, _metadata("hparams", content))])

  def flush(self) -> None:
    """See `writers.MetricWriter`."""
    self._file.flush()
    while self._before and self._before[0].done():
      self._before.pop(0).result()  # raises what storing it met

  def close(self) -> None:
    """See `writers.MetricWriter`; a second call closes nothing."""
    closing.each([self._file.close, *(one.result for one in self._before)])


def _png(image: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG")
  return buffer.getvalue()


# Protocol buffers, the few wire types that events need. A field is its number
# and wire type in one varint, then the value.


def _varint(value: int) -> bytes:
  value &= (1 << 64) - 1  # negative numbers are 64-bit two's complement
  out = bytearray()
  while value > 0x7F:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes(out) + bytes([value])


def _int(field: int, value: int) -> bytes:
  return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
  return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
  return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
  with np.errstate(over="ignore"):  # past float32: infinite, as TensorBoard has
    return _varint(field << 3 | 5) + np.float32(value).tobytes()


def _metadata(plugin: str, content: bytes = b"") -> bytes:
  """SummaryMetadata of a plugin; data_class 2 is TENSOR."""
  data = _bytes(1, plugin.encode()) + _bytes(2, content)
  return _bytes(1, data) + (b"" if content else _int(4, 2))


def _tensor_value(name: str, plugin: str, parts: Sequence[bytes]) -> bytes:
  """Summary.Value with a tensor of strings [len(parts)]."""
  shape = _bytes(2, _bytes(2, _int(1, len(parts))))
  strings = b"".join(_bytes(8, part) for part in parts)
  tensor = _int(1, 7) + shape + strings  # dtype 7 is DT_STRING
  metadata = _bytes(9, _metadata(plugin))
  return _bytes(1, name.encode()) + metadata + _bytes(8, tensor)


def _plain_value(value: Any) -> bytes:
  """google.protobuf.Value of a bool, a number, or anything's text."""
  if isinstance(value, (bool, np.bool_)):
    return _int(4, int(value))
  if isinstance(value, (int, float, np.number)):
    return _double(2, float(value))
  return _bytes(3, str(value).encode())


def frame(data: bytes) -> bytes:
  """One TFRecord: length, masked crc of it, data, masked crc of it."""
  length = struct.pack("<Q", len(data))
  return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
  crc = crc32c.crc32c(data)
  rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
  return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)
