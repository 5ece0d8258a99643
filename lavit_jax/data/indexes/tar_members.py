"""Finds the files in a tar archive, without reading what is in them.

Reads the formats v7, ustar, GNU and pax. Names are only names here: nothing is
ever unpacked, so that a path that leads out of a folder, a link or a device
does no harm; all that are no plain files are left out and counted.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lavit_jax.data.indexes import tar_runs

_BLOCK = 512
_RECORD = 20 * _BLOCK  # to which archives are padded
_NEAR = 1 << 20  # bytes read at once where files are small
_FAR = 1 << 12  # and where the next header is far away
_LARGE = 1 << 16  # bytes of a file after which the next header is far away
_SHORT = 8  # files of a run that was not worth looking for
_MOST_WAIT = 1024  # headers that are read one by one after short runs
_MOST_NAME = 1 << 20  # bytes of an extended header
_PLAIN = b"0\x007"  # kinds of members: plain files, in all formats
_EXTENDED = b"LKxg"  # what follows is about the next member
_NO_FILES = {
  b"1": "a hard link",
  b"2": "a symbolic link",
  b"3": "a device",
  b"4": "a device",
  b"6": "a pipe",
  b"S": "a sparse file",
}
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

# Reads `size` bytes from an offset; fewer at the end of the file.
Read = Callable[[int, int], bytes]


class Member(NamedTuple):
  """A plain file in an archive.

  Attributes:
    name: its path in the archive, in whatever encoding.
    start: offset of its first byte.
    size: in bytes.
  """

  name: bytes
  start: int
  size: int


class Odd(NamedTuple):
  """Something in an archive that is no plain file.

  Attributes:
    name: its path in the archive, or a place in it.
    reason: what it is instead, such as "is a symbolic link".
  """

  name: bytes
  reason: str


class NoTar(ValueError):
  """The file is no tar archive, or none that can be read in place."""


def loses_more(reason: str) -> bool:
  """Returns whether the reason of an `Odd` is that an archive ends with it."""
  return "cut off" in reason or "the rest of the archive" in reason


def members(window: "Window") -> Iterator[Member | Odd]:
  """Yields the plain files of an archive in order, and what else it holds.

  See `runs`, whose files are taken one by one.
  """
  for found in runs(window):
    if isinstance(found, tar_runs.Run):
      for name, start, size in found.files():
        if not name.endswith(b"/"):
          yield Member(name, start, size)
    else:
      yield found


def runs(window: "Window") -> Iterator[tar_runs.Run | Member | Odd]:
  """Yields the plain files of an archive in order, and what else it holds.

  Files are found many at once where that is possible. A name of a run that ends
  in a slash is that of a folder.

  A file that is cut off, or a header that is none, is an `Odd`; nothing is
  found behind it.

  Args:
    window: on the archive.

  Raises:
    NoTar: the first header is none.
  """
  at, length, far = 0, window.length, False
  name, size = None, None  # of the next member, from an extended header
  wait, next_wait = 0, _SHORT  # headers before a run is looked for again
  while at < length:
    if not (wait or far or name or size):
      run = tar_runs.find(window.piece(at, _NEAR), at, length)
      if len(run.sizes):
        yield run
      at, far = run.end, bool((run.sizes[-1:] > _LARGE).any())
      if len(run.sizes) < _SHORT:
        wait, next_wait = next_wait, min(2 * next_wait, _MOST_WAIT)
      else:
        next_wait = _SHORT
      continue
    wait = max(0, wait - 1)
    header = window.read(at, _BLOCK, _FAR if far else _NEAR)
    if len(header) < _BLOCK:
      if not at:
        raise NoTar("is shorter than one header of an archive")
      yield Odd(b"byte %d" % at, "is cut off in a header")
      return
    if header[257:262] != b"ustar" and not _is_v7(header):
      if not header.strip(b"\0"):
        at, hole = _behind_zeros(window, at)
        if hole:
          yield Odd(b"byte %d" % at, "follows zeros where files should be")
        continue
      if not at:
        raise NoTar(_what_else(header))
      yield Odd(
        b"byte %d" % at, "is no header: the rest of the archive is lost"
      )
      return
    kind, start = header[156:157], at + _BLOCK
    extended = kind in _EXTENDED
    try:  # a size that an extended header gives is that of the file
      declared = _number(header[124:136])
      if size is not None and not extended:
        declared = size
    except ValueError:
      yield Odd(b"byte %d" % at, "has no size: the rest of the archive is lost")
      return
    if start + declared > length:
      yield Odd(name or _name(header), "is cut off")
      return
    at = start + (declared + _BLOCK - 1) // _BLOCK * _BLOCK
    far = declared > _LARGE
    if extended:
      if declared > _MOST_NAME:
        yield Odd(
          b"byte %d" % start, "is an extended header of more than 1 MiB"
        )
        return
      data = window.read(start, declared)
      if kind == b"L":
        name = data.rstrip(b"\0")
      elif kind == b"x":
        records = _records(data)
        name, size = records.get(b"path", name), _size(records, size)
      continue
    found, name, size = name or _name(header), None, None
    if kind in _PLAIN and not found.endswith(b"/"):
      yield Member(found, start, declared)
    elif kind in _NO_FILES:
      yield Odd(found, f"is {_NO_FILES[kind]}")
  if at > length:  # within what fills up the last file
    yield Odd(b"byte %d" % length, "is where the archive is cut off")


class Window:
  """Reads an archive by large pieces, of which the last two are kept.

  Attributes:
    length: of the archive, in bytes.
  """

  def __init__(self, read: Read, length: int) -> None:
    """Reads nothing yet."""
    self.length, self._read = length, read
    self._buffer, self._base = b"", 0
    self._earlier, self._earlier_base = b"", 0

  def read(self, start: int, size: int, piece: int = _NEAR) -> bytes:
    """Returns `size` bytes from `start`; fewer at the end of the archive.

    Args:
      start: offset of the first byte.
      size: number of bytes.
      piece: how many are read, if these are not there yet.
    """
    offset = start - self._base
    if 0 <= offset <= len(self._buffer) - size:
      return self._buffer[offset : offset + size]
    offset = start - self._earlier_base
    if 0 <= offset <= len(self._earlier) - size:
      return self._earlier[offset : offset + size]
    if size > piece:
      return self._read(start, size)
    return self.piece(start, piece)[:size]

  def piece(self, start: int, size: int) -> bytes:
    """Returns what is there from `start`, read if that is not a whole block.

    Args:
      start: offset of the first byte.
      size: number of bytes that are read; fewer at the end of the archive.
    """
    offset = start - self._base
    if not 0 <= offset <= len(self._buffer) - _BLOCK:
      self._earlier, self._earlier_base = self._buffer, self._base
      self._base, self._buffer = start, self._read(start, size)
      offset = 0
    return self._buffer[offset:] if offset else self._buffer


def _behind_zeros(window, at):
  """Returns where zeros end, and whether they are no end of an archive.

  Behind the end of one there may be another: archives may be joined, and each
  is padded to whole records.
  """
  while at < window.length:
    data = window.read(at, min(_NEAR, window.length - at))
    rest = data.lstrip(b"\0")
    if rest or not data:
      at += (len(data) - len(rest)) // _BLOCK * _BLOCK
      return (at, at % _RECORD != 0) if data else (window.length, False)
    at += len(data)
  return at, False


def _name(header):
  """Returns the name in a header, with the prefix that ustar has."""
  name = header[:100].partition(b"\0")[0]
  if header[257:263] == b"ustar\0" and header[345]:
    name = header[345:500].partition(b"\0")[0] + b"/" + name
  return name


def _number(field):
  """Returns a number of a header: octal digits, or GNU's big-endian bytes."""
  if not field[-1] and field[:-1].isdigit():
    return int(field[:-1], 8)  # nearly all of them
  if field[0] & 0x80:
    number = int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    if field[0] & 0x40 or number < 0:
      raise ValueError("a negative number")
    return number
  digits = field.strip(b"\0 ") or b"0"
  if not digits.isdigit():  # `int` takes a sign and underscores, too
    raise ValueError("no octal digits")
  return int(digits, 8)


def _records(data):
  """Returns the records of a pax header: "27 path=a name\\n" and others."""
  records, at = {}, 0
  while (space := data.find(b" ", at)) > 0:
    count = data[at:space]
    if not count.isdigit() or not (size := int(count)) > space - at:
      break
    name, _, value = data[space + 1 : at + size - 1].partition(b"=")
    records[name] = value
    at += size
  return records


def _size(records, size):
  """Returns the size of a pax header, `size` if it has none."""
  value = records.get(b"size", b"")
  return int(value) if value.isdigit() else size


def _is_v7(header):
  """Whether a header without ustar's mark has the right checksum."""
  try:
    stored = _number(header[148:156])
  except ValueError:
    return False
  return stored == sum(header) - sum(header[148:156]) + 8 * ord(" ") and any(
    header[:100]
  )


def _what_else(header):
  """Returns what a file is whose first block is no header."""
  if header.startswith(_GZIP):
    return "is compressed by gzip: unpack it with gunzip to read it in place"
  if header.startswith(_ZSTD):
    return "is compressed by zstd: unpack it with unzstd to read it in place"
  return "is no tar archive"
