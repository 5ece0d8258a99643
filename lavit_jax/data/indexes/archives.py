"""Which archives a path names: one, a folder of them, or a pattern."""

import fnmatch
import functools
import glob
import itertools
import logging
import os
import re
from typing import Any

from lavit_jax.core import errors
from lavit_jax.core.storage import files

_LOG = logging.getLogger(__name__)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)|([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])")
_MOST = 1_000_000  # archives that a pattern may name
_SUFFIX = ".tar"
# Archives that cannot be read in place.
COMPRESSED = (".tgz", ".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2")
_DATA = (_SUFFIX, ".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".arrow")
_LOOKED_AT = 1000  # entries of a folder


def is_named(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path names archives, rather than a file of JSON lines.

  A folder does, a pattern, and a file of that suffix or with their mark.
  """
  path = os.fspath(path)
  if path.lower().endswith((_SUFFIX, *COMPRESSED)):
    return True
  if os.path.isfile(path):
    with open(path, "rb") as file:
      return file.read(512)[257:262] == b"ustar"
  lines = (".jsonl", ".json", ".ndjson")
  bare = path.removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2")
  pattern = any(character in path for character in "*{[")
  return os.path.isdir(path) or (pattern and not bare.endswith(lines))


def of(
  path: str | os.PathLike[str],
  suffix: str | tuple[str, ...] = _SUFFIX,
  kind: str = "tar archive",
) -> list[Any]:
  """Returns the archives that a path names, in order.

  Args:
    path: of an archive; of a folder, whose .tar files are meant; or a pattern:
      "data/{00000..00331}.tar", "data/{train,val}*.tar", here or on gs://. A
      bracket that is part of a name is [[] in a pattern.
    suffix: of the files of a folder that are meant, where others than archives
      are looked for; or several.
    kind: what these are, for the message.

  Raises:
    errors.DataError: there are none; or a folder has compressed archives, which
      would be left out.
  """
  path = os.fspath(path)
  suffixes = (suffix,) if isinstance(suffix, str) else suffix
  found: list[str] = []
  for one in [path] if _exists(path) else _unbraced(path):
    found += _matching(one, suffixes)
  if not files.is_remote(path) and os.path.isdir(path):
    _check_others(path, suffixes)
  if not found:
    raise errors.DataError(
      f"{path} names no {kind}. Give one, a folder with {suffixes[0]} files, or"
      f" a pattern such as 'data/{{00000..00331}}{suffixes[0]}'."
    )
  if len(set(found)) < len(found):
    twice = next(p for p in found if found.count(p) > 1)
    raise errors.DataError(f"{path} names {twice} twice. Name each once.")
  return [files.input_path(one) for one in found]


def _exists(path):
  return os.path.exists(path) if not files.is_remote(path) else False


def _unbraced(path):
  """Returns the paths that braces stand for, in order.

  Raises:
    errors.DataError: they are too many.
  """
  if re.search(r"\{[^{}]*\{", path):
    raise errors.DataError(
      f"{path} has braces in braces. Write what they stand for, such as"
      " {a,b,c} for {a,{b,c}}."
    )
  parts = _BRACES.split(path)  # text, inside, text, inside, …, text
  choices = [
    _choices(part) if i % 2 else [part] for i, part in enumerate(parts)
  ]
  count = 1
  for choice in choices:
    count *= len(choice)
  if count > _MOST:
    raise errors.DataError(
      f"{path} names {count} files, more than {_MOST}. Check its braces."
    )
  return ["".join(some) for some in itertools.product(*choices)]


def _choices(inside):
  """Returns what braces stand for: "08..10" is 08, 09, 10."""
  if not (match := _RANGE.fullmatch(inside)):
    # As in a shell, braces around one word are part of the name.
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]
  if not match[1]:
    first, last = sorted(inside.split(".."))
    letters = [chr(c) for c in range(ord(first), ord(last) + 1)]
    return letters if inside.startswith(first) else letters[::-1]
  first, last = match[1], match[2]
  if abs(int(last) - int(first)) >= _MOST:
    return [""] * (_MOST + 1)
  step = 1 if int(first) <= int(last) else -1
  width = len(first) if first.startswith("0") or len(last) == len(first) else 0
  numbers = range(int(first), int(last) + step, step)
  return [str(number).zfill(width) for number in numbers]


def _matching(path, suffix):
  """Returns the archives of a folder or a pattern; the path itself if none."""
  if files.is_remote(path):
    return _remote(path, suffix)
  if os.path.isdir(path):
    paths = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    return [
      p for p in paths if p.lower().endswith(suffix) and os.path.isfile(p)
    ]
  if os.path.exists(path) or not glob.has_magic(path):
    return [path]
  return sorted(glob.glob(path))


@functools.cache  # said once
def _check_others(path, suffixes) -> None:
  """Warns of data in a folder that are not read; refuses packed archives."""
  names = sorted(os.listdir(path))
  read = [name for name in names if name.lower().endswith(suffixes)]
  stems = {name.partition(".")[0] for name in read}
  packed = [
    name
    for name in names
    if name.lower().endswith(COMPRESSED) and name.partition(".")[0] not in stems
  ]
  if packed and _SUFFIX in suffixes:
    raise errors.DataError(
      f"{os.path.join(path, packed[0])} is compressed, and can only be read in"
      " place when it is unpacked: gunzip or unzstd it, or leave it out by a"
      f" pattern such as '{os.path.join(path, '*.tar')}'."
    )
  others = [
    name
    for name in names
    if name.lower().endswith(_DATA)
    and name not in read
    and name.partition(".")[0] not in stems  # img2dataset's own table
  ]
  folders = [
    f"{name}/"
    for name in names[:_LOOKED_AT]
    if os.path.isdir(inner := os.path.join(path, name))
    and any(n.lower().endswith(suffixes) for n in _first(inner))
  ]
  if left := others + folders:
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    example = os.path.join(path, "*", f"*{suffixes[0]}")
    _LOG.warning(
      "%s: only %s files in it are read, not %s%s. Name others by a pattern,"
      " such as '%s'.",
      path,
      suffixes[0],
      left[0],
      more,
      example if left == folders else os.path.join(path, left[0]),
    )


def _first(folder) -> list[str]:
  """Returns the names of some entries: there may be a million images."""
  with os.scandir(folder) as entries:
    return [entry.name for entry in itertools.islice(entries, _LOOKED_AT)]


def _remote(path, suffix):
  """Returns the same of an object store."""
  if not glob.has_magic(path) and path.endswith(suffix):
    return [path]
  folder, _, pattern = path.rpartition("/")
  if not glob.has_magic(path):
    folder, pattern = path.rstrip("/"), "*"
  names = [os.fspath(found) for found in files.listing(files.path_of(folder))]
  named = glob.has_magic(path)
  return sorted(
    name
    for name in names
    if fnmatch.fnmatch(name.rpartition("/")[2], pattern)
    and (named or name.endswith(suffix))
  )
