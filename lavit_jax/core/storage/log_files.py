"""Logs that grow, on a disk or in an object store such as gs://.

On a disk a log is one file. Objects cannot be appended to: there a log is cut
into segments, `metrics-00000.jsonl` and so on, and only the newest one, which
is small, is ever put there again. A thread does that, so that training waits
for no network; what it could not store is an error of the next call, and is
stored by the one after that if the store then can.
"""

import concurrent.futures
import logging
import os
import re
import time

from etils import epath

from lavit_jax.core import closing
from lavit_jax.core.storage import files

_LOG = logging.getLogger(__name__)
_OFTEN = 10.0  # seconds between two uploads of a log that nobody asked for
_LEAST = 1.0  # seconds: a store takes one new version of an object a second
SEGMENT = 1 << 20  # bytes, from which on a new segment is begun


def open_log(path: epath.Path):
  """A file to append whole records to: `write`, `flush`, `sync`, `close`.

  `flush` hands over to the system what was written, `sync` to the disk. In an
  object store `flush` does so now and then, `sync` as soon as it can, and only
  `close` waits for it. `empty` tells whether nothing was ever written.
  """
  if files.is_remote(path):
    return _Segments(path)
  before = pieces(path)
  return _Local(before[-1] if before else path)


def open_object(path: epath.Path):
  """The same, never cut: who writes it looks at `size`, and begins another."""
  return _Object(path) if files.is_remote(path) else _Local(path)


def pieces(path: epath.Path) -> list[epath.Path]:
  """What there is of a log, in order: one file, and segments.

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
  found = sorted(name for name in names if segment.fullmatch(name))
  whole = [path.name] if path.name in names else []
  return [path.parent / name for name in [*whole, *found]]


class _Local:
  """A file on a disk."""

  def __init__(self, path):
    self._file = path.open("ab")
    self.flush = self._file.flush

  @property
  def size(self) -> int:
    return self._file.tell()

  @property
  def empty(self) -> bool:
    return self.size == 0

  def write(self, data: bytes) -> None:
    self._file.write(data)

  def sync(self) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    if not self._file.closed:
      self.sync()
      self._file.close()


class _Object:
  """An object that is stored anew as it grows, by a thread."""

  def __init__(self, path):
    self._path, self._data = path, bytearray()
    self._when = time.monotonic()
    self._sent = 0  # bytes that are stored
    self._stored: float | None = None  # when the thread last did
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "lavit_log")
    self._upload: concurrent.futures.Future | None = None
    self._done: concurrent.futures.Future | None = None  # of `close`

  @property
  def size(self) -> int:
    return len(self._data)

  @property
  def empty(self) -> bool:
    return not self._data

  def write(self, data: bytes) -> None:
    self._data += data

  def flush(self) -> None:
    if time.monotonic() - self._when >= _OFTEN:
      self.sync()

  def sync(self) -> None:
    if self._upload is not None and not self._upload.done():
      return  # the next one takes along what is new
    self._raise()
    if self._sent < len(self._data):
      self._when = time.monotonic()
      self._upload = self._pool.submit(self._store, bytes(self._data))

  def _raise(self) -> None:
    """Waits for the upload, and raises what it met."""
    upload, self._upload = self._upload, None
    if upload is not None:
      upload.result()

  def _store(self, data: bytes) -> None:
    """Of the thread, which may wait where training may not."""
    if self._stored is not None:
      time.sleep(max(self._stored + _LEAST - time.monotonic(), 0.0))
    self._path.write_bytes(data)
    self._sent, self._stored = len(data), time.monotonic()

  def finish(self) -> concurrent.futures.Future:
    """Stores the rest without waiting; nothing may be written any more."""

    def last(before=self._upload, data=bytes(self._data)):
      # The upload before is over: the pool has one thread.
      if before is not None and (error := before.exception()):
        _LOG.warning("%s could not be stored: %s", self._path, error)
      if self._sent < len(data):
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

  def __init__(self, path):
    before = pieces(path)
    self._path, self._had = path, bool(before)
    self._number = 0
    if before and before[-1] != path:
      self._number = int(before[-1].name.rpartition(".")[0][-5:]) + 1
    self._object = _Object(self._segment())
    self._ending: list[concurrent.futures.Future] = []

  def _segment(self) -> epath.Path:
    stem, dot, suffix = self._path.name.rpartition(".")
    name = f"{stem}-{self._number:05d}{dot}{suffix}"
    return self._path.parent / name

  @property
  def empty(self) -> bool:
    return not self._had and self._number == 0 and self._object.empty

  def write(self, data: bytes) -> None:
    if self._object.size and self._object.size + len(data) > SEGMENT:
      self._ending.append(self._object.finish())
      self._number += 1
      self._object = _Object(self._segment())
    self._object.write(data)

  def flush(self) -> None:
    self._object.flush()

  def sync(self) -> None:
    self._object.sync()
    over = [ending for ending in self._ending if ending.done()]
    self._ending = [ending for ending in self._ending if ending not in over]
    closing.each(ending.result for ending in over)

  def close(self) -> None:
    closing.each([self._object.close, *(e.result for e in self._ending)])
