"""A user's file of JSON lines, as rows; what it is instead is named.

Read: one JSON object a line, or one JSON array of objects; either gzipped.
"""

import codecs
import contextlib
import gzip
import json
import math
import re
import zlib

from lavit_jax.core import errors
from lavit_jax.core.storage import files

_LONGEST = 64 << 20  # bytes of a line, characters of an array's item
_DEEPEST = 64  # objects and lists in one another in a line
_CHUNK = 1 << 20  # bytes read at once of an array
_EXPECTED = "expected a file with one JSON object a line"
_SIGNS = (  # how other files begin, what they are, what to do
  (
    b"PAR1",
    "a Parquet file",
    "write its rows with pandas' or datasets' to_json",
  ),
  (b"PK\x03\x04", "a zip archive", "unzip it"),
  (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
  (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
  (b"\xfd7zXZ", "compressed by xz", "unpack it with unxz"),
)
_SPACE = re.compile(r"[ \t\r\n]*")


_TWICE = object()  # the key of a field's name that an object has twice


class BadLine(ValueError):
  """A line that cannot be used; says why."""


def rows(path):
  """Yields (number, row) of each line that is not blank; numbers from 1.

  A row is a dict without the fields that are null or NaN, or the BadLine that
  says why it is none. The items of an array are numbered in place of lines.

  Raises:
    errors.DataError: no file to read, or of another kind; an array that is
      cut off or broken, as nothing behind the fault can be found.
  """
  try:
    with unpacked(path) as file:
      start = file.peek(4096)[:4096]
      _check(path, start)
      begin = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
      yield from (_items if begin == b"[" else _lines)(path, file)
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise errors.DataError(
      f"{path} is a damaged gzip file ({error}). Download or pack it again."
    ) from error
  except OSError as error:
    raise errors.DataError(
      f"{path} cannot be read ({error.strerror or error}); {_EXPECTED}."
    ) from error


@contextlib.contextmanager
def unpacked(path):
  """Opens a file to read its bytes; those of a gzip file as they were."""
  with files.open_bytes(path) as plain:
    packed = plain.peek(2)[:2] == b"\x1f\x8b"
    yield gzip.GzipFile(fileobj=plain) if packed else plain


def _check(path, start):
  """Raises DataError where the first bytes are of another kind of file."""
  for sign, what, way in _SIGNS:
    if start.startswith(sign):
      raise errors.DataError(f"{path} is {what}; {_EXPECTED}: {way} first.")
  if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (
    b"\0" in start[:4]
  ):
    raise errors.DataError(
      f"{path} is text in UTF-16 or UTF-32, expected UTF-8. Save it as UTF-8:"
      " iconv -f UTF-16 -t UTF-8 OLD > NEW."
    )
  first = start.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n")[0]
  if first.strip() == b"{":
    raise errors.DataError(
      f"{path} has JSON objects over several lines; {_EXPECTED}:"
      " jq -c . OLD > NEW writes them so. (Of one object that holds lists, as"
      " COCO's annotations are, make a line an image.)"
    )


def _lines(path, file):
  """(number, row) of JSON lines."""
  del path
  number = 0
  while line := file.readline(_LONGEST + 1):
    number += 1
    if len(line) > _LONGEST:
      while line and not line.endswith(b"\n"):
        line = file.readline(_LONGEST)
      yield (
        number,
        BadLine(
          f"is longer than {_LONGEST >> 20} MiB; expected one image or"
          " document a line"
        ),
      )
      continue
    if number == 1:
      line = line.removeprefix(codecs.BOM_UTF8)
    if line.strip():
      yield number, _parse(line)


def _parse(line):
  """One line as a dict, or a BadLine."""
  try:
    return _row(json.loads(line, object_pairs_hook=_object))
  except (ValueError, RecursionError) as error:
    start = line[:40].decode(errors="replace")
    return BadLine(f"is no JSON ({error}); begins with {start!r}")


def _object(pairs):
  """A JSON object; `_present` refuses one that says a field twice."""
  made = dict(pairs)
  if len(made) < len(pairs):
    names = [name for name, _ in pairs]
    made[_TWICE] = next(name for name in names if names.count(name) > 1)
  return made


def _row(value):
  """A JSON value as a dict without nulls, or a BadLine."""
  if not isinstance(value, dict):
    return BadLine(f"is a JSON {type(value).__name__}, expected an object")
  try:
    return _present(value)
  except BadLine as error:
    return error


def _present(value, depth=1):
  """The value without fields that are null: so tables write what is not there.

  {"text": null, "answers": [{"answer": "red", "by": NaN}]} becomes
  {"answers": [{"answer": "red"}]}. Raises BadLine where lists and objects are
  nested too deeply, so that whoever walks through a row need not count.
  """
  if isinstance(value, dict | list) and depth > _DEEPEST:
    raise BadLine(f"is nested more than {_DEEPEST} deep")
  if isinstance(value, dict):
    if _TWICE in value:
      raise BadLine(f"has the field {value[_TWICE]!r:.40} twice; keep one")
    found = {k: v for k, v in value.items() if not _missing(v)}
    return {k: _present(v, depth + 1) for k, v in found.items()}
  if isinstance(value, list):
    return [_present(v, depth + 1) for v in value if not _missing(v)]
  return value


def _missing(value):
  """Whether a value is null, or NaN as pandas has it."""
  return value is None or (isinstance(value, float) and math.isnan(value))


def _items(path, file):
  """(number, row) of the objects of one JSON array, a part at a time."""
  array, number, sign = _Array(path, file), 0, "["
  while True:
    found = array.character()
    if found == "]" and number:
      break
    if found != sign:
      array.fail(number, f"is followed by {found!r}, expected a comma")
    array.place += 1
    if not number and array.character() == "]":
      break
    number, sign = number + 1, ","
    yield number, _row(array.item(number))
  array.place += 1
  if rest := array.character():
    array.fail(number, f"is the last, but {rest!r} follows the array's end")


class _Array:
  """The text of a JSON array, read as it is needed."""

  def __init__(self, path, file):
    self.place = 0
    self._path, self._file, self._text = path, file, ""
    self._decoder = json.JSONDecoder(object_pairs_hook=_object)
    # What is no UTF-8 becomes lone surrogates, which an item is refused for.
    utf8 = codecs.getincrementaldecoder("utf-8-sig")
    self._decode = utf8("surrogateescape").decode

  def character(self):
    """The next character that is no white space, "" at the end."""
    while True:
      self.place = _SPACE.match(self._text, self.place).end()
      if self.place < len(self._text) or not self._read(_CHUNK):
        return self._text[self.place : self.place + 1]

  def item(self, number):
    """The JSON value that comes next."""
    size = _CHUNK
    while True:
      try:
        self.character()
        value, self.place = self._decoder.raw_decode(self._text, self.place)
        return value
      except RecursionError:
        self.fail(number, "is nested too deeply")
      except ValueError as error:
        # Each read is twice as long: a long item is not parsed many times.
        long = len(self._text) - self.place > _LONGEST
        if long or not self._read(size):
          self.fail(number, f"is no JSON, or is cut off ({error})")
        size *= 2

  def _read(self, size):
    """Takes more of the file in; False at its end."""
    data = self._file.read(size)
    more = self._decode(data, not data)
    self._text, self.place = self._text[self.place :] + more, 0
    return bool(data)

  def fail(self, number, why):
    """Raises DataError for an item, from which on nothing can be read."""
    raise errors.DataError(
      f"{self._path}: item {number} of its JSON array {why}. Mend the file, or"
      " write one JSON object a line, of which a broken one is left out."
    )
