"""Keeps compressed files unpacked beside the indexes, to be read from anywhere.

FOLDER/NAME.VERSION.unpacked, in the folders of the indexes of archives
(`stored.py`). Made once, as a whole; anew of a file that has changed, whose
older copies go.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import secrets
from typing import Any

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import compressed, files
from lavit_jax.data.indexes import stored

_CHUNK = 4 << 20  # bytes
_LARGE = 64 << 20  # bytes that are worth a bar
# Times its size that a file may unpack to; texts do to three or ten.
_MOST = 500
_MOST_NAME = 150  # bytes of a file's name, to which ours adds some


def of(path: Any, version: str, *, quiet: bool = False) -> Any:
  """Returns the path of what a file holds: of the file itself, or of a copy.

  Args:
    path: of the file, here or on gs://.
    version: a text that is another whenever the file is.
    quiet: no progress bar.

  Raises:
    errors.DataError: it is damaged or cannot be read, or the copy cannot be
      written.
  """
  try:
    with files.open_bytes(path) as plain:
      if not compressed.kind_of(plain.peek(6)[:6]):
        return path
      copy = _copy_of(path, version)
      if not copy.exists():
        _unpack(path, plain, copy, quiet)
      return copy
  except compressed.Damaged as error:
    raise errors.DataError(
      f"{path} is {error}. Download or pack it again."
    ) from error
  except OSError as error:
    raise errors.DataError(
      f"{path} cannot be unpacked ({error.strerror or error}). Where the copy"
      f" lies, {stored.folder()}, LAVIT_INDEXES names another folder."
    ) from error


def _copy_of(path, version) -> pathlib.Path:
  parent, _, name = os.fspath(files.absolute(path)).rpartition("/")
  digest = lambda text: hashlib.sha256(os.fsencode(text)).hexdigest()[:32]
  if len(os.fsencode(name)) > _MOST_NAME:
    name = digest(name)
  name = f"{name}.{digest(version)[:16]}.unpacked"
  return stored.folder() / digest(parent) / name


def _unpack(path, plain, copy, quiet) -> None:
  """Writes the copy of a file as a whole, and deletes older ones."""
  size = plain.seek(0, io.SEEK_END)
  plain.seek(0)
  copy.parent.mkdir(parents=True, exist_ok=True)
  unfinished = copy.with_name(f"{copy.name}.{secrets.token_hex(8)}.tmp")
  shown = size >= _LARGE and not quiet
  label = f"unpack {os.fspath(path).rpartition('/')[2]}"
  written = 0
  try:
    with (
      unfinished.open("wb") as target,
      progress.Progress(
        size >> 20, label=label, stream=None if shown else io.StringIO()
      ) as bar,
    ):
      reader = compressed.opened(plain)
      while data := reader.read(_CHUNK):
        written += len(data)
        if written > max(_MOST * size, _LARGE):
          raise errors.DataError(
            f"{path} unpacks to more than {_MOST} times its size, as no text"
            " does. Look at what it holds."
          )
        target.write(data)
        bar.update(plain.tell() >> 20)
    os.replace(unfinished, copy)
  finally:
    with contextlib.suppress(OSError):
      unfinished.unlink(missing_ok=True)
  start, _, end = copy.name.rpartition(".")[0].rpartition(".")
  for older in copy.parent.glob(f"{_escaped(start)}.{'?' * len(end)}.unpacked"):
    if older != copy:
      older.unlink(missing_ok=True)


def _escaped(name: str) -> str:
  """Returns a pattern that matches a name alone."""
  return "".join(f"[{c}]" if c in "*?[" else c for c in name)
