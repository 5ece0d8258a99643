"""Reads a user's file of JSON lines as rows, or says what the file is instead.

The file holds one JSON object a line, or one JSON array of objects, or COCO's
annotations (`annotations.py`), and may be compressed (`compressed.py`).
"""

import codecs
import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from lavit_jax.core import errors
from lavit_jax.core.storage import compressed, files
from lavit_jax.data.records import annotations

_MAX_LENGTH = 64 << 20  # bytes of a line, characters of an array's item
_MAX_DEPTH = 64  # nested objects and lists of a line
_CHUNK = 1 << 20  # bytes read at once of an array
_EXPECTED = "expected a file with one JSON object a line"
_SIGNATURES = (  # first bytes of other files, what they are, what to do
  (
    b"PAR1",
    "a Parquet file",
    "write its rows with pandas' or datasets' to_json",
  ),
  (b"PK\x03\x04", "a zip archive", "unzip it"),
  (b"\xff\xd8\xff", "an image", "give its folder, or write a list of images"),
  (b"\x89PNG", "an image", "give its folder, or write a list of images"),
)
_SPACE = re.compile(r"[ \t\r\n]*")

_TWICE = object()  # key under which a repeated field's name is stored


class BadLine(ValueError):
  """A line that cannot be used; the message says why."""


def rows(path: Any) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
  """Yields (number, row) of each line that is not blank; numbers from 1.

  A row is a dict without the fields that are null or NaN, or the BadLine that
  says why there is none. Of an array the items are numbered, not the lines.

  Args:
    path: of the file, here or on gs://.

  Raises:
    errors.DataError: the file cannot be read, or is of another kind; or its
      array is cut off or broken, so that nothing after the fault can be read.
  """
  try:
    with unpacked(path) as file:
      start = file.peek(4096)[:4096]
      text = start.removeprefix(codecs.BOM_UTF8)
      if annotations.is_likely(text):
        found = annotations.rows(path, file)
        if found is not None:
          for number, row in found:
            yield number, _row(row)
          return
        file.seek(0)
      _check(path, start)
      begin = text.lstrip()[:1]
      yield from (_items if begin == b"[" else _lines)(path, file)
  except compressed.Damaged as error:
    raise errors.DataError(
      f"{path} is {error}. Download or pack it again."
    ) from error
  except OSError as error:
    raise errors.DataError(
      f"{path} cannot be read ({error.strerror or error}); {_EXPECTED}."
    ) from error


@contextlib.contextmanager
def unpacked(path: Any) -> Iterator[io.BufferedReader]:
  """Opens a file to read its bytes, decompressed: see `compressed.py`."""
  with files.open_bytes(path) as plain:
    yield compressed.opened(plain)


def _check(path, start):
  """Raises DataError if the first bytes are those of another kind of file."""
  for signature, kind, advice in _SIGNATURES:
    if start.startswith(signature):
      raise errors.DataError(f"{path} is {kind}; {_EXPECTED}: {advice} first.")
  if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (
    b"\0" in start[:4]
  ):
    raise errors.DataError(
      f"{path} is text in UTF-16 or UTF-32, expected UTF-8. Save it as UTF-8:"
      " iconv -f UTF-16 -t UTF-8 OLD > NEW."
    )
  if b"\0" in start:
    raise errors.DataError(f"{path} is no text; {_EXPECTED}. Check the path.")
  first = start.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n")[0]
  if first.strip() == b"{":
    raise errors.DataError(
      f"{path} has JSON objects over several lines; {_EXPECTED}:"
      " jq -c . OLD > NEW writes it so. (Of one object that holds lists only"
      " COCO's annotations are read, of images and captions.)"
    )


def _lines(path, file):
  """Yields (number, row) of JSON lines."""
  del path
  number = 0
  while line := file.readline(_MAX_LENGTH + 1):
    number += 1
    if len(line) > _MAX_LENGTH:
      while line and not line.endswith(b"\n"):
        line = file.readline(_MAX_LENGTH)
      yield (
        number,
        BadLine(
          f"is longer than {_MAX_LENGTH >> 20} MiB; expected one image or"
          " document a line"
        ),
      )
      continue
    if number == 1:
      line = line.removeprefix(codecs.BOM_UTF8)
    if line.strip():
      yield number, _parse(line)


def _parse(line):
  """Returns one line as a dict, or a BadLine."""
  try:
    return _row(json.loads(line, object_pairs_hook=_object))
  except (ValueError, RecursionError) as error:
    start = line[:40].decode(errors="replace")
    return BadLine(f"is not JSON ({error}); begins with {start!r}")


def _object(pairs):
  """Returns a JSON object; marks one with a repeated field for `_present`."""
  value = dict(pairs)
  if len(value) < len(pairs):
    names = [name for name, _ in pairs]
    value[_TWICE] = next(name for name in names if names.count(name) > 1)
  return value


def _row(value):
  """Returns a JSON value as a dict without nulls, or a BadLine."""
  if not isinstance(value, dict):
    return BadLine(f"is a JSON {type(value).__name__}, expected an object")
  try:
    return _present(value) | paired(value, lambda item: _present(item, 3))
  except BadLine as error:
    return error


def paired(
  row: Mapping[str, Any], plain: Callable[[Any], Any]
) -> dict[str, list[Any]]:
  """Returns the images and texts of OBELICS, where a null has a place.

  Args:
    row: of any form, with its nulls; {} is returned for one without these.
    plain: what is to be done to each of the items that are not null.
  """
  found = [(name, row.get(name)) for name in ("images", "texts")]
  if not all(isinstance(some, list) for _, some in found):
    return {}
  return {
    name: [None if _missing(item) else plain(item) for item in some or ()]
    for name, some in found
  }


def _present(value, depth=1):
  """Returns the value without null fields, by which tables mean absent ones.

  {"text": null, "answers": [{"answer": "red", "by": NaN}]} becomes
  {"answers": [{"answer": "red"}]}. Raises BadLine if lists and objects are
  nested too deeply, so that functions that walk through a row need not count.
  """
  if isinstance(value, dict | list) and depth > _MAX_DEPTH:
    raise BadLine(f"is nested more than {_MAX_DEPTH} deep")
  if isinstance(value, dict):
    if _TWICE in value:
      raise BadLine(f"has the field {value[_TWICE]!r:.40} twice; keep one")
    kept = {k: v for k, v in value.items() if not _missing(v)}
    return {k: _present(v, depth + 1) for k, v in kept.items()}
  if isinstance(value, list):
    return [_present(v, depth + 1) for v in value if not _missing(v)]
  return value


def _missing(value):
  """Whether a value is null, or NaN, as pandas writes it."""
  return value is None or (isinstance(value, float) and math.isnan(value))


def _items(path, file):
  """Yields (number, row) of the objects of one JSON array, read in parts."""
  array, number, expected = _Array(path, file), 0, "["
  while True:
    character = array.character()
    if character == "]" and number:
      break
    if character != expected:
      array.fail(number, f"is followed by {character!r}, expected a comma")
    array.position += 1
    if not number and array.character() == "]":
      break
    number, expected = number + 1, ","
    yield number, _row(array.item(number))
  array.position += 1
  if rest := array.character():
    array.fail(number, f"is the last, but {rest!r} follows the array's end")


class _Array:
  """The text of a JSON array, read from the file as needed."""

  def __init__(self, path, file):
    self.position = 0
    self._path, self._file, self._text = path, file, ""
    self._decoder = json.JSONDecoder(object_pairs_hook=_object)
    # Bytes that are not UTF-8 become lone surrogates; such items are refused.
    utf8 = codecs.getincrementaldecoder("utf-8-sig")
    self._decode = utf8("surrogateescape").decode

  def character(self):
    """Returns the next character that is not white space, "" at the end."""
    while True:
      self.position = _SPACE.match(self._text, self.position).end()
      if self.position < len(self._text) or not self._read(_CHUNK):
        return self._text[self.position : self.position + 1]

  def item(self, number):
    """Returns the next JSON value."""
    size = _CHUNK
    while True:
      try:
        self.character()
        value, self.position = self._decoder.raw_decode(
          self._text, self.position
        )
        return value
      except RecursionError:
        self.fail(number, "is nested too deeply")
      except ValueError as error:
        # Each read is twice as long: a long item is not parsed many times.
        long = len(self._text) - self.position > _MAX_LENGTH
        if long or not self._read(size):
          self.fail(number, f"is not JSON, or is cut off ({error})")
        size *= 2

  def _read(self, size):
    """Reads more of the file; False at its end."""
    data = self._file.read(size)
    more = self._decode(data, not data)
    self._text, self.position = self._text[self.position :] + more, 0
    return bool(data)

  def fail(self, number: int, reason: str) -> NoReturn:
    """Raises DataError for an item after which nothing can be read."""
    raise errors.DataError(
      f"{self._path}: item {number} of its JSON array {reason}. Correct the"
      " file, or write one JSON object a line: then only a broken line is"
      " skipped."
    )
