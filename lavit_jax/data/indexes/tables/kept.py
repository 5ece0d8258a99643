"""Keeps what the rows of a table hold, so that it is found once.

FOLDER/NAME.DIGEST.rows: a line of JSON, then the arrays of `scan.Scanned`, in
the folders of the indexes of archives (`indexes/stored.py`). DIGEST is of how
the table is read. Of a file that has changed, and where the kept one is
damaged, it is found again.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import files
from lavit_jax.data.indexes import stored
from lavit_jax.data.indexes.tables import (
  arrow_files,
  scan,
  tables,
  text_files,
)
from lavit_jax.data.indexes.tables.parquet import reader

_LOG = logging.getLogger(__name__)
_FORMAT = 3
_THREADS = 8  # tables that are read at once
_FEW = 4  # tables that are not worth a bar
_MOST_HEAD = 16 << 20  # bytes of the line of JSON
_MOST_NAME = 150  # bytes of a table's name, to which ours adds some
_ARRAYS = {
  "columns": scan.COLUMNS,
  "joined": scan.JOINED,
  "blocks": tables.BLOCKS,
}
_VALUES = ("faults", "unread", "texts", "stored")


@dataclasses.dataclass(frozen=True)
class Index:
  """What the rows of one table hold.

  Attributes:
    file: of the table.
    scanned: what was found.
    state: of the file then, see `tables.version_of`.
  """

  file: tables.File
  scanned: scan.Scanned
  state: Any

  def slim(self) -> "Index":
    """Returns an index without what is needed only once."""
    scanned = dataclasses.replace(
      self.scanned,
      columns=self.scanned.columns[:0].copy(),
      joined=self.scanned.joined[:0].copy(),
    )
    return dataclasses.replace(self, scanned=scanned)

  def open(self) -> tables.Table:
    """Opens the table.

    Raises:
      errors.DataError: it has changed.
      OSError: it cannot be read.
    """
    if tables.version_of(self.file.path)[1] != self.state:
      raise errors.DataError(f"{tables.Changed(self.file.path)}.")
    table = _open(self.file, self.scanned.blocks)
    if table.state != self.state:  # meanwhile
      raise errors.DataError(f"{tables.Changed(self.file.path)}.")
    return table


def of(found: Sequence[tables.File], *, quiet: bool = False) -> list[Index]:
  """Returns the index of each table, made where there is none.

  Args:
    found: the files.
    quiet: no progress bar.

  Raises:
    errors.DataError: a file does not exist or is damaged, its columns cannot
      be read, or the folder of the indexes cannot be written.
  """
  indexes = [_load(file) for file in found]
  missing = [i for i, index in enumerate(indexes) if index is None]
  shown = len(missing) >= _FEW and not quiet
  with (
    progress.Progress(
      len(missing),
      label=f"index {len(missing)} files",
      stream=None if shown else io.StringIO(),
    ) as bar,
    concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
  ):
    try:
      made = pool.map(_make, [found[i] for i in missing])
      for done, (i, index) in enumerate(zip(missing, made, strict=True), 1):
        indexes[i] = index
        bar.update(done)
    finally:
      pool.shutdown(cancel_futures=True)
  return [index for index in indexes if index is not None]


def _open(file: tables.File, blocks: np.ndarray) -> Any:
  if file.kind == "parquet":
    return reader.ParquetFile(file)
  if file.kind == "arrow":
    return arrow_files.ArrowFile(file)
  return text_files.TextFile(file, blocks)


def _make(file: tables.File) -> Index:
  """Makes and keeps the index of a table."""
  version, state = tables.version_of(file.path)
  try:
    table = _open(file, np.zeros(0, tables.BLOCKS))
    scanned = scan.of(table, file)
  except OSError as error:
    raise errors.DataError(
      f"{file.path} cannot be read ({error.strerror or error})."
    ) from error
  index = Index(file, scanned, state)
  if tables.version_of(file.path)[0] != version:
    raise errors.DataError(f"{tables.Changed(file.path)}.")
  _write(index, version)
  return index


def _write(index, version) -> None:
  arrays = [getattr(index.scanned, name) for name in _ARRAYS]
  parts = [array.tobytes() for array in arrays]
  head = {
    "format": _FORMAT,
    "table": os.fspath(index.file.path),
    "key": index.file.key(),
    "version": version,
    "sizes": [len(array) for array in arrays],
    "crc32": [zlib.crc32(part) for part in parts],
  }
  head |= {name: getattr(index.scanned, name) for name in _VALUES}
  parts = [json.dumps(head).encode(), b"\n", *parts]
  stored.keep(_path(index.file), index.file.path, parts)


def _load(file) -> Index | None:
  """Returns the kept index of a table; None if there is no valid one."""
  version, state = tables.version_of(file.path)
  path = _path(file)
  try:
    with path.open("rb") as stream:
      head = json.loads(stream.readline(_MOST_HEAD))
      expected = (_FORMAT, file.key(), version)
      if (head["format"], head["key"], head["version"]) != expected:
        return None
      found: dict[str, Any] = {}
      for (name, dtype), size, crc in zip(
        _ARRAYS.items(), head["sizes"], head["crc32"], strict=True
      ):
        data = stream.read(size * dtype.itemsize)
        if len(data) != size * dtype.itemsize or zlib.crc32(data) != crc:
          raise ValueError("its length or checksum is another")
        found[name] = np.frombuffer(data, dtype)
      if stream.read(1):
        raise ValueError("it is longer")
    found |= {name: head[name] for name in _VALUES}
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
    _LOG.warning("%s is damaged (%s) and made again", path, error)
    return None
  return Index(file, scan.Scanned(**found), state)


def _path(file) -> pathlib.Path:
  """Returns where the index of a table is kept."""
  parent, _, name = os.fspath(files.absolute(file.path)).rpartition("/")
  digest = lambda text: hashlib.sha256(os.fsencode(text)).hexdigest()[:32]
  if len(os.fsencode(name)) > _MOST_NAME:
    name = digest(name)
  how = digest(f"{file.name} {file.folder} {file.key()}")[:8]
  return stored.folder() / digest(parent) / f"{name}.{how}.rows"
