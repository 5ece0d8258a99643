"""Files of a run, on a disk or in an object store such as gs://.

Objects cannot be appended to: a log is kept in memory there, and put in place
of what was stored. Whole files are there at once or not at all in both.
"""

import os
import time

from etils import epath

from lavit_jax import errors

_PATTERN = "*?["  # what makes a name a pattern
_OFTEN = 10.0  # seconds between two uploads of a log that nobody asked for
_LEAST = 1.0  # seconds: a store takes one new version of an object a second


def is_remote(path) -> bool:
  """Whether a path is in an object store."""
  return "://" in os.fspath(path)


def path_of(path) -> epath.Path:
  """A path here or in an object store.

  Raises:
    errors.ConfigError: a store that this installation cannot reach.
  """
  path = os.fspath(path)
  if not is_remote(path):
    return epath.Path(path)
  if not path.startswith("gs://"):
    raise errors.ConfigError(
      f"{path} is in a store that is not known here. Give a folder, or"
      " gs://BUCKET/FOLDER."
    )
  found = epath.Path(path)
  try:
    found.exists()
  except ImportError as e:
    raise errors.ConfigError(
      f"{path} is in Google Cloud Storage, which needs more packages:"
      " pip install 'lavit_jax[gcs]'"
    ) from e
  return found


def absolute(path) -> epath.Path:
  """A path that stays what it is when the current folder changes."""
  found = path_of(path)
  return found if is_remote(path) else found.absolute()


def check_arrays_folder(path, *, write: bool) -> None:
  """Refuses folders whose names would lose the arrays that Orbax keeps there.

  Orbax finds what each process has written by a pattern that begins with the
  name of the folder, unescaped: with brackets nothing is found, with * or ?
  perhaps what is another folder's. TensorStore takes a backslash for a slash.

  Args:
    path: of a checkpoint, or of a folder that will hold some.
    write: whether arrays are to be written; what is there already can be read
      from a folder with brackets.

  Raises:
    errors.CheckpointError: there is such a character in its whole path.
  """
  whole = os.fspath(path) if is_remote(path) else os.path.abspath(path)
  found = [c for c in (_PATTERN if write else "") + "\\" if c in whole]
  found += ["**"] if "**" in whole and not write else []
  if found:
    raise errors.CheckpointError(
      f"{whole} has {' and '.join(found)} in its name: Orbax and TensorStore,"
      " which keep the arrays, would look for them elsewhere and lose them."
      " Give a folder without these characters"
      + ("." if write else ", or rename this one.")
    )


def write_whole(path: epath.Path, data: bytes) -> None:
  """Writes a file so that a kill leaves the old one or the new one."""
  if is_remote(path):
    path.write_bytes(data)
    return
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(data)
  partial.replace(path)


def open_log(path: epath.Path):
  """A binary file to append to, with `write`, `flush`, `sync`, `tell`, `close`.

  `flush` hands over to the system what was written, `sync` to the disk. In an
  object store `flush` does so now and then, `sync` always.
  """
  return _Remote(path) if is_remote(path) else _Local(path)


class _Local:
  """A file on a disk."""

  def __init__(self, path):
    self._file = path.open("ab")
    self.tell, self.flush = self._file.tell, self._file.flush

  def write(self, data: bytes) -> None:
    self._file.write(data)

  def sync(self) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    if not self._file.closed:
      self.sync()
      self._file.close()


class _Remote:
  """An object that is written anew each time."""

  def __init__(self, path):
    self._path = path
    self._data = bytearray(path.read_bytes() if path.exists() else b"")
    self._stored, self._when = len(self._data), time.monotonic()

  def write(self, data: bytes) -> None:
    self._data += data

  def tell(self) -> int:
    return len(self._data)

  def flush(self) -> None:
    if time.monotonic() - self._when >= _OFTEN:
      self.sync()

  def sync(self) -> None:
    if self._stored == len(self._data):
      return
    time.sleep(max(self._when + _LEAST - time.monotonic(), 0.0))
    self._path.write_bytes(bytes(self._data))
    self._stored, self._when = len(self._data), time.monotonic()

  def close(self) -> None:
    self.sync()
