"""Opens compressed files: gzip, bzip2, xz and Zstandard, known by their start.

Zstandard needs PyArrow, an extra.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from lavit_jax.core import errors

_CHUNK = 1 << 20  # bytes read at once


class Damaged(Exception):
  """A compressed file is cut off or damaged; the message says which kind."""


def kind_of(start: bytes) -> str:
  """Returns how a file that begins so is compressed; "" if it is not.

  Args:
    start: at least six bytes of the file, fewer of a shorter one.
  """
  for mark, kind in _MARKS.items():
    if start.startswith(mark):
      return kind
  return ""


def opened(plain: io.BufferedReader) -> io.BufferedReader:
  """Returns a reader of what a file holds, decompressed.

  It can be sought to its start again. What is not compressed is returned as it
  is.

  Args:
    plain: the open file, at its start.

  Raises:
    errors.DataError: a library is missing.
    Damaged: when it is read, if the file is cut off or damaged.
  """
  if not (kind := kind_of(plain.peek(6)[:6])):
    return plain
  return io.BufferedReader(_Unpacked(plain, kind), _CHUNK)


class _Unpacked(io.RawIOBase):
  """The contents of a compressed file."""

  def __init__(self, plain, kind):
    self._plain, self._kind = plain, kind
    self._stream = _OPENERS[kind](plain)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    """Returns to the start, which is all that is possible."""
    if (offset, whence) != (0, io.SEEK_SET):
      raise io.UnsupportedOperation("only the start of the file can be sought")
    self._plain.seek(0)
    self._stream = _OPENERS[self._kind](self._plain)
    return 0

  def readinto(self, buffer: Any) -> int:
    try:
      data = self._stream.read(len(buffer))
    except OSError as error:
      if error.errno is not None:  # of the disk
        raise
      raise self._damaged(error) from error
    except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
      raise self._damaged(error) from error
    buffer[: len(data)] = data
    return len(data)

  def _damaged(self, error):
    reason = " ".join(str(error).split())
    return Damaged(f"a damaged {self._kind} file ({reason[:120]})")


def _zstandard(plain):
  try:
    import pyarrow  # optional extra
  except ImportError as error:
    raise errors.DataError(
      "Files compressed by Zstandard need PyArrow, which is not installed: pip"
      " install 'lavit_jax[parquet]'. Or unpack them: unzstd FILE."
    ) from error
  return pyarrow.CompressedInputStream(pyarrow.PythonFile(plain, "r"), "zstd")


_MARKS = {
  b"\x1f\x8b": "gzip",
  b"BZh": "bzip2",
  b"\xfd7zXZ": "xz",
  b"\x28\xb5\x2f\xfd": "Zstandard",
}
_OPENERS: dict[str, Callable[[Any], Any]] = {
  "gzip": lambda plain: gzip.GzipFile(fileobj=plain),
  "bzip2": bz2.BZ2File,
  "xz": lzma.LZMAFile,
  "Zstandard": _zstandard,
}
