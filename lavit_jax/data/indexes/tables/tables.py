"""What a table is to those who read it: blocks of rows, and images in them.

A table is a file that is read in blocks: the row groups of a Parquet file
(`parquet/reader.py`), the batches of an Arrow file (`arrow_files.py`), some
lines of a text (`text_files.py`).
"""

import contextlib
import dataclasses
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import fetched, files
from lavit_jax.data.indexes import stored
from lavit_jax.data.indexes.tables import arrow
from lavit_jax.data.records import columns

# Of each block the number of its rows, and where it begins in a text.
BLOCKS = np.dtype([("rows", "<u4"), ("start", "<u8")])


@dataclasses.dataclass(frozen=True)
class File:
  """A file with a table.

  Attributes:
    kind: "parquet", "arrow" or "text".
    path: of the file.
    name: of the table, in the names of its rows: NAME:ROW.
    folder: that paths of images are relative to.
    image: column of the images, see `columns.layout`.
    text: column of the words.
    allow_absolute: let images lie outside the folder.
    features: of the columns, where the file itself may not have them.
    listing: whether the rows list images beside them: `file_name` and so on.
  """

  kind: str
  path: Any
  name: str
  folder: Any
  image: str = columns.IMAGE
  text: str = columns.TEXT
  allow_absolute: bool = False
  features: Any = None
  listing: bool = False

  def key(self) -> str:
    """Returns what decides, beside its bytes, how the table is read."""
    return json.dumps(
      [
        *(self.kind, self.image, self.text, self.allow_absolute),
        *(self.features, self.listing),
      ]
    )


def beside_images(
  kind: str, paths: Iterable[Any], **options: Any
) -> list[File]:
  """Returns the tables in files beside which their images lie.

  Args:
    kind: of `File`; likewise options.
    paths: of the files.
    **options: see there.
  """
  return [
    File(
      kind,
      path,
      name=os.fspath(path).rpartition("/")[2],
      folder=path.parent,
      **options,
    )
    for path in paths
  ]


class Rows(Protocol):
  """Some rows that follow one another, without the bytes of images."""

  nbytes: int

  def __len__(self) -> int:
    """Returns the number of rows."""

  def values(self, j: int) -> dict[str, Any]:
    """Returns row j, as `table_rows.Reader.read` takes it.

    Raises:
      lines.BadLine: it cannot be read.
    """

  def name(self, j: int, column: str, place: int) -> str | None:
    """Returns the name that an image of row j has in the table, if any."""

  def plain(self) -> "Plain | None":
    """Returns the rows as texts, where they are nothing else."""


@dataclasses.dataclass(frozen=True)
class Plain:
  """Rows of one text each, or of one image that the table holds and a text.

  Attributes:
    texts: of each row, None where there is none.
    names: of the images, None where they have none.
    images: whether there are images.
  """

  texts: Sequence[str | None]
  names: Sequence[str | None]
  images: bool


class Cells(Protocol):
  """The images in one column of a block."""

  nbytes: int

  def value(self, j: int, place: int) -> bytes | str | None:
    """Returns an image of row j: its bytes, or else its path, or None."""


class Table(Protocol):
  """A table that is open. Several threads may read of it at once."""

  layout: columns.Layout | None  # None: its rows are JSON lines as they are

  def scan(self) -> Iterator[tuple[int, int, Rows]]:
    """Yields (block, where it begins, some of its rows), from first to last.

    Raises:
      errors.DataError: the file is cut off or damaged.
    """

  def rows(self, block: int) -> Rows:
    """Returns the rows of a block, without images.

    Raises:
      errors.DataError: as `scan`, or the file has changed.
    """

  def numbers(self, block: int) -> Rows:
    """Returns the columns of numbers of a block, read or not.

    Raises:
      errors.DataError: as `rows`.
    """

  def cells(self, block: int, column: str) -> Cells:
    """Returns the images in a column of a block.

    Raises:
      OSError: they cannot be read, or the file has changed.
    """

  def sample(self, count: int) -> list[dict[str, Any]]:
    """Returns columns that are not read, of the first rows."""

  def stored(self) -> int:
    """Returns a checksum of where the images are."""


class Changed(OSError):
  """A file is not the one that was indexed."""

  def __init__(self, path):
    super().__init__(
      f"{path} has changed since it was opened; start again, and leave the"
      " files as they are meanwhile"
    )


def version_of(path: Any) -> tuple[str, Any]:
  """Returns what changes whenever a file does, and when its contents do.

  Raises:
    errors.DataError: there is no such file, or it cannot be read.
  """
  try:
    if files.is_remote(path):
      info = fetched.version(path)
      return json.dumps(info, sort_keys=True), info
    status = os.stat(path)
  except FileNotFoundError as error:
    raise errors.DataError(
      f"There is no file {path}. Give the paths of existing files, a folder of"
      " them, or a pattern such as 'data/{00000..00331}.parquet'."
    ) from error
  except OSError as error:
    raise errors.DataError(
      f"{path} cannot be read ({error.strerror or error})."
    ) from error
  if not stat.S_ISREG(status.st_mode):
    raise errors.DataError(f"{path} is no file. Give the paths of files.")
  # Times of contents can be set; that of the last change to a file cannot.
  state = stored.state_of(status)
  return repr((*state, status.st_ctime_ns)), state


class Bytes:
  """A file of which several threads read; it must stay as it is.

  Attributes:
    path: of the file.
    size: of the file, in bytes.
    state: see `version_of`.
  """

  def __init__(self, path: Any) -> None:
    """Opens the file.

    Raises:
      OSError: it cannot be opened.
      errors.DataError: there is no such file.
    """
    self.path, self._descriptor = path, -1
    _, self.state = version_of(path)
    if files.is_remote(path):
      self.size = int(self.state["size"])
      return
    self._descriptor = os.open(path, os.O_RDONLY)
    status = os.fstat(self._descriptor)
    self.size, self.state = status.st_size, stored.state_of(status)

  def __del__(self, close=os.close):  # `os` may be gone when Python ends
    if self._descriptor >= 0:
      close(self._descriptor)

  def read(self, start: int, stop: int) -> bytes:
    """Returns bytes of the file, fewer behind its end.

    Raises:
      OSError: they cannot be read, or the file has changed.
    """
    if self._descriptor < 0:
      return fetched.read_range(self.path, start, stop) if stop > start else b""
    if stored.state_of(os.fstat(self._descriptor)) != self.state:
      raise Changed(self.path)
    parts, at = [], start
    while at < stop:  # Linux reads 2 GB at once at the most
      part = os.pread(self._descriptor, stop - at, at)
      if not part:
        break
      parts.append(part)
      at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def stream(self) -> "Stream":
    """Returns a stream of its own position."""
    return Stream(self)


class Stream(io.RawIOBase):
  """Reads `Bytes` from a position, as PyArrow asks for it."""

  def __init__(self, file: Bytes) -> None:
    """Begins at the start of the file."""
    self._file, self._at = file, 0

  def readable(self) -> bool:
    """Returns True."""
    return True

  def seekable(self) -> bool:
    """Returns True."""
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    """Moves the position, and returns it."""
    base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}
    self._at = base[whence] + offset
    return self._at

  def tell(self) -> int:
    """Returns the position."""
    return self._at

  def read(self, size: int | None = -1) -> bytes:
    """Returns bytes from the position on; all without a size."""
    rest = max(self._file.size - self._at, 0)
    size = rest if size is None or size < 0 else min(size, rest)
    data = self._file.read(self._at, self._at + size)
    self._at += len(data)
    return data

  def readinto(self, buffer: Any) -> int:
    """Fills a buffer with bytes from the position on."""
    data = self.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


def damaged(path: Any, kind: str, reason: str) -> errors.DataError:
  """Returns the error of a file that is cut off or damaged."""
  return errors.DataError(
    f"{path} cannot be read as {kind}: it is cut off or damaged ({reason})."
    " Download or write it again, or leave it out of the path."
  )


@contextlib.contextmanager
def named(path: Any, kind: str) -> Iterator[None]:
  """Turns what PyArrow raises of a file into errors that name the file.

  Args:
    path: of the file.
    kind: what it should be, for the message.
  """
  try:
    yield
  except errors.LavitError:
    raise
  except Changed as error:
    raise errors.DataError(f"{error}.") from error
  except Exception as error:  # PyArrow has errors of many classes
    raise damaged(path, kind, arrow.words_of(error)) from error


def check_start(path: Any, start: bytes, kind: str) -> None:
  """Refuses a file that is known by its first bytes to be something else.

  Raises:
    errors.DataError: it is so.
  """
  if start.startswith(b"version https://git-lfs"):
    raise errors.DataError(
      f"{path} is a pointer of Git LFS, not the file itself. Fetch that: git"
      " lfs pull."
    )
  if kind == "a Parquet file" and not start.startswith(b"PAR1"):
    more = (
      " It is encrypted, which is not read." if start[:4] == b"PARE" else ""
    )
    raise errors.DataError(
      f"{path} is no Parquet file: it begins with {start[:8]!r}, expected"
      f" b'PAR1'.{more} Give Parquet files, or leave it out of the path."
    )
