"""Growing logs, on a disk or in an object store such as gs://.

On a disk a log is one file. Objects cannot be appended to: there a log is split
into segments, `metrics-00000.jsonl` and so on, and only the newest, small one
is uploaded again as it grows. A thread uploads it, so that training does not
wait for the network. A failed upload is raised by the next call; the call after
that tries again.
"""

import concurrent.futures
import logging
import os
import re
import time
from typing import Protocol

from etils import epath

from lavit_jax.core import closing
from lavit_jax.core.storage import files

_LOG = logging.getLogger(__name__)
_FLUSH_SECONDS = 10.0  # between uploads by `flush`
_MIN_SECONDS = 1.0  # a store accepts one new version of an object per second
SEGMENT = 1 << 20  # bytes, from which on a new segment is begun


class Log(Protocol):
  """A file to which complete records are appended.

  `flush` passes written records to the operating system, `sync` to the disk.
  In an object store `flush` uploads them every few seconds, `sync` as soon as
  possible, and only `close` waits for the upload.
  """

  def write(self, data: bytes) -> None:
    """Appends complete records."""

  def flush(self) -> None:
    """Passes records on, or uploads them every few seconds."""

  def sync(self) -> None:
    """Writes records to the disk, or uploads them as soon as possible."""

  def close(self) -> None:
    """Writes or uploads all records, and closes the log."""


class SizedLog(Log, Protocol):
  """A log that knows its size."""

  @property
  def size(self) -> int:
    """Returns the bytes written."""


def open_log(path: epath.Path) -> Log:
  """Opens a log; in an object store it is split into segments."""
  if files.is_remote(path):
    return _Segments(path)
  existing = pieces(path)
  return _Local(existing[-1] if existing else path)


def open_object(path: epath.Path) -> SizedLog:
  """Opens a log that is not split; the caller does so, by its `size`."""
  return _Object(path) if files.is_remote(path) else _Local(path)


def pieces(path: epath.Path) -> list[epath.Path]:
  """Returns the files of a log, in order: a single file, then segments.

  Args:
    path: as `open_log` takes it.
  """
  path = epath.Path(path)
  stem, dot, suffix = path.name.rpartition(".")
  segment = re.compile(re.escape(stem) + r"-\d{5}" + re.escape(dot + suffix))
  try:
    names = [other.name for other in path.parent.iterdir()]
  except FileNotFoundError:
    return []
  segments = sorted(name for name in names if segment.fullmatch(name))
  single = [path.name] if path.name in names else []
  return [path.parent / name for name in [*single, *segments]]


class _Local:
  """A file on a disk."""

  def __init__(self, path):
    self._file = path.open("ab")

  @property
  def size(self) -> int:
    return self._file.tell()

  def write(self, data: bytes) -> None:
    self._file.write(data)

  def flush(self) -> None:
    self._file.flush()

  def sync(self) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    if not self._file.closed:
      self.sync()
      self._file.close()


class _Object:
  """An object that a thread uploads again as it grows."""

  def __init__(self, path: epath.Path):
    self._path, self._data = path, bytearray()
    self._last_upload = time.monotonic()
    self._uploaded = 0  # bytes in the store
    self._finished_at: float | None = None  # end of the last upload
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "lavit_log")
    self._upload: concurrent.futures.Future | None = None
    self._done: concurrent.futures.Future | None = None  # of `close`

  @property
  def size(self) -> int:
    return len(self._data)

  def write(self, data: bytes) -> None:
    self._data += data

  def flush(self) -> None:
    if time.monotonic() - self._last_upload >= _FLUSH_SECONDS:
      self.sync()

  def sync(self) -> None:
    if self._upload is not None and not self._upload.done():
      return  # the next upload includes the new records
    self._raise_error()
    if self._uploaded < len(self._data):
      self._last_upload = time.monotonic()
      self._upload = self._pool.submit(self._store, bytes(self._data))

  def _raise_error(self) -> None:
    """Waits for the upload, and raises its error."""
    upload, self._upload = self._upload, None
    if upload is not None:
      upload.result()

  def _store(self, data: bytes) -> None:
    """Uploads in the thread, which may wait where training may not."""
    if self._finished_at is not None:
      next_at = self._finished_at + _MIN_SECONDS
      time.sleep(max(next_at - time.monotonic(), 0.0))
    self._path.write_bytes(data)
    self._uploaded, self._finished_at = len(data), time.monotonic()

  def finish(self) -> concurrent.futures.Future:
    """Uploads the rest without waiting; no records may follow."""

    def last(previous=self._upload, data=bytes(self._data)):
      # The previous upload is over: the pool has one thread.
      if previous is not None and (error := previous.exception()):
        _LOG.warning("%s could not be uploaded: %s", self._path, error)
      if self._uploaded < len(data):
        self._store(data)

    done, self._upload = self._pool.submit(last), None
    self._pool.shutdown(wait=False)
    return done

  def close(self) -> None:
    if self._done is None:
      self._done = self.finish()
    self._done.result()


class _Segments:
  """A log of several objects."""

  def __init__(self, path: epath.Path):
    existing = pieces(path)
    self._path = path
    self._number = 0
    if existing and existing[-1] != path:
      self._number = int(existing[-1].name.rpartition(".")[0][-5:]) + 1
    self._object = _Object(self._segment())
    self._finishing: list[concurrent.futures.Future] = []

  def _segment(self) -> epath.Path:
    stem, dot, suffix = self._path.name.rpartition(".")
    name = f"{stem}-{self._number:05d}{dot}{suffix}"
    return self._path.parent / name

  def write(self, data: bytes) -> None:
    if self._object.size and self._object.size + len(data) > SEGMENT:
      self._finishing.append(self._object.finish())
      self._number += 1
      self._object = _Object(self._segment())
    self._object.write(data)

  def flush(self) -> None:
    self._object.flush()

  def sync(self) -> None:
    self._object.sync()
    finished = [upload for upload in self._finishing if upload.done()]
    self._finishing = [x for x in self._finishing if x not in finished]
    closing.each(upload.result for upload in finished)

  def close(self) -> None:
    uploads = [upload.result for upload in self._finishing]
    closing.each([self._object.close, *uploads])
