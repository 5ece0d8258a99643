"""Keeps the index of each archive, so that it is made once.

FOLDER/NAME.index: a line of JSON that says what the index is of, then the
columns, the names and the captions of the samples (`tar_samples.py`). FOLDER is
one for each folder of archives, in XDG_CACHE_HOME or else ~/.cache;
$LAVIT_INDEXES names another root. An index of an archive that has changed, or
that is damaged, is made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import secrets
import stat
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import fetched, files
from lavit_jax.data.indexes import tar_members, tar_samples
from lavit_jax.data.workers import pool

_LOG = logging.getLogger(__name__)
_FORMAT = 2
_FEW = 8  # archives that are not worth other processes
_LONGEST = 3600.0  # seconds that one archive may take
_MOST_HEAD = 1 << 20  # bytes of the line of JSON
_MOST_NAME = 200  # bytes of an archive's name, to which ours adds some


@dataclasses.dataclass(frozen=True)
class Strings:
  """Where the names and captions of an archive's samples are on the disk.

  Attributes:
    file: of the index.
    names: offset of the first name in it.
    captions: offset of the first caption.
  """

  file: pathlib.Path
  names: int
  captions: int


@dataclasses.dataclass(frozen=True)
class Index:
  """The index of one archive.

  Attributes:
    path: of the archive.
    samples: what it holds; their names and captions are left on the disk.
    strings: where these are.
    texts: CRC-32 of all captions.
    state: of the archive when it was indexed, see `state_of`.
    version: a text that is another whenever the archive is.
  """

  path: Any
  samples: tar_samples.Samples
  strings: Strings
  texts: int
  state: tuple[int, ...]
  version: str


def folder() -> pathlib.Path:
  """Returns the root of all indexes."""
  if configured := os.environ.get("LAVIT_INDEXES"):
    return pathlib.Path(configured)
  return files.user_cache("indexes")


def of(paths: Sequence[Any], *, quiet: bool = False) -> list[Index]:
  """Returns the index of each archive, made where there is none.

  An archive whose index is made is kept at once: an interrupted call goes on
  where it stopped.

  Args:
    paths: of the archives, here or on gs://.
    quiet: no progress bar.

  Raises:
    errors.DataError: an archive does not exist or is none, or the folder of
      the indexes cannot be written.
  """
  found = [_load(path) for path in paths]
  missing = [
    path for path, index in zip(paths, found, strict=True) if not index
  ]
  if missing:
    _make_all(missing, quiet)
    found = [
      index or _load(path) for path, index in zip(paths, found, strict=True)
    ]
  indexes = []
  for path, index in zip(paths, found, strict=True):
    if index is None:
      raise errors.DataError(
        f"The index of {path} is not as it was made a moment ago: the archive,"
        f" or {folder()}, changes meanwhile. Try again when nothing writes"
        " there."
      )
    indexes.append(index)
  return indexes


def _make_all(paths, quiet):
  """Makes the indexes of archives, in several processes if they are many."""
  if len(paths) < _FEW:
    for path in paths:
      make(path)
    return
  for _ in pool.shown(
    f"index {len(paths)} archives",
    "lavit_jax.data.indexes.stored:maker",
    None,
    [os.fspath(path) for path in paths],
    quiet=quiet,
    timeout=_LONGEST,
  ):
    pass  # each is kept when it is made


def maker(setup: None) -> Callable[[str], None]:
  """Returns what makes the index of an archive, in a process of its own."""
  del setup
  return lambda path: make(files.input_path(path))


def make(path: Any) -> None:
  """Makes and keeps the index of one archive.

  Raises:
    errors.DataError: see `of`.
  """
  version, length, _ = _version(path)
  try:
    if not length:
      raise tar_members.NoTar("is an empty file")
    with _Reader(path) as read:
      samples = tar_samples.of(read, length)
  except tar_members.NoTar as error:
    raise errors.DataError(
      f"{path} {error}. Give tar archives, as WebDataset and img2dataset write"
      " them."
    ) from error
  except OSError as error:
    raise errors.DataError(
      f"{path} cannot be read ({error.strerror or error})."
    ) from error
  columns = samples.columns.tobytes()
  head = {
    "format": _FORMAT,
    "archive": os.fspath(path),
    "version": version,
    "samples": len(samples.columns),
    "names": len(samples.names),
    "captions": len(samples.captions),
    "faults": samples.faults,
    "crc32": [
      zlib.crc32(part) for part in (columns, samples.names, samples.captions)
    ],
  }
  parts = (json.dumps(head).encode(), b"\n", columns, samples.names)
  keep(_file(path), path, (*parts, samples.captions))


def keep(file: pathlib.Path, of: Any, parts: Iterable[bytes]) -> None:
  """Writes an index as a whole, whoever else writes it at the same time.

  Args:
    file: of the index, in `folder()`.
    of: what the index is of, for the message.
    parts: of its contents, one after the other.

  Raises:
    errors.DataError: it cannot be written.
  """
  unfinished = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as stream:
      stream.writelines(parts)
    os.replace(unfinished, file)
  except OSError as error:
    raise errors.DataError(
      f"The index of {of} cannot be written to {file.parent}"
      f" ({error.strerror or error}). Set LAVIT_INDEXES to a folder that can be"
      " written."
    ) from error
  finally:
    with contextlib.suppress(OSError):  # such as a parent that is no folder
      unfinished.unlink(missing_ok=True)


def _load(path) -> Index | None:
  """Returns the kept index of an archive; None if there is no valid one.

  Raises:
    errors.DataError: there is no such archive.
  """
  version, _, state = _version(path)
  file = _file(path)
  try:
    with file.open("rb") as stream:
      line = stream.readline(_MOST_HEAD)
      head = json.loads(line)
      if (head["format"], head["version"]) != (_FORMAT, version):
        return None
      size = head["samples"] * tar_samples.COLUMNS.itemsize
      # The strings of a hundred million samples stay where they are.
      strings = Strings(
        file, len(line) + size, len(line) + size + head["names"]
      )
      whole = strings.captions + head["captions"]
      if os.fstat(stream.fileno()).st_size != whole:
        raise ValueError("its length is another")
      body = stream.read(size)
    if zlib.crc32(body) != head["crc32"][0]:
      raise ValueError("its checksum is another")
    columns = np.frombuffer(body, tar_samples.COLUMNS)
    samples = tar_samples.Samples(columns, faults=head["faults"])
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, KeyError, TypeError) as error:
    _LOG.warning("%s is damaged (%s) and made again", file, error)
    return None
  return Index(path, samples, strings, head["crc32"][2], state, version)


def _file(path) -> pathlib.Path:
  """Returns where the index of an archive is kept."""
  parent, _, name = os.fspath(files.absolute(path)).rpartition("/")
  digest = lambda text: hashlib.sha256(os.fsencode(text)).hexdigest()[:32]
  if len(os.fsencode(name)) > _MOST_NAME:
    name = digest(name)
  return folder() / digest(parent) / f"{name}.index"


def state_of(status: os.stat_result) -> tuple[int, ...]:
  """Returns what changes when the contents of an archive do."""
  return status.st_size, status.st_mtime_ns, status.st_ino


def _version(path) -> tuple[str, int, tuple[int, ...]]:
  """Returns what changes whenever the archive does, its length and state."""
  try:
    if files.is_remote(path):
      stored = fetched.version(path)
      return json.dumps(stored, sort_keys=True), int(stored["size"]), ()
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
      raise errors.DataError(f"{path} is no file. Give tar archives.")
    state = state_of(status)
    # Times of contents can be set; that of the last change to a file cannot.
    return repr((*state, status.st_ctime_ns)), status.st_size, state
  except FileNotFoundError as error:
    raise errors.DataError(
      f"There is no archive {path}. Give the paths of tar archives, a folder of"
      " them, or a pattern such as 'data/{00000..00331}.tar'."
    ) from error
  except OSError as error:
    raise errors.DataError(
      f"{path} cannot be read ({error.strerror or error})."
    ) from error


class _Reader:
  """Reads parts of an archive: reader(start, size) gives bytes."""

  def __init__(self, path):
    self._path, self._file = path, -1

  def __enter__(self):
    if not files.is_remote(self._path):
      self._file = os.open(self._path, os.O_RDONLY)
    return self

  def __exit__(self, *unused):
    if self._file >= 0:
      os.close(self._file)

  def __call__(self, start: int, size: int) -> bytes:
    if self._file >= 0:
      return os.pread(self._file, size, start)
    return fetched.read_range(self._path, start, start + size)
