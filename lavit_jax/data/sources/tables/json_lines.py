"""Reads many or large files of JSON lines in place, as a Source.

A line is one of `sources/jsonl.py`, where one file of moderate size is held in
memory. Here only a few numbers a line are; where each block of lines begins is
found once, and kept. Images are numbered by line: one that several lines name
is an image of each.

Files may be compressed (.gz, .zst, .bz2, .xz); such a file is unpacked once,
beside the indexes, because what is packed can only be read from its start.
"""

import os
from typing import Any

from lavit_jax.core.storage import fetched, files
from lavit_jax.data.indexes import archives
from lavit_jax.data.indexes.tables import tables as tables_lib
from lavit_jax.data.records import columns
from lavit_jax.data.sources.tables import source

SUFFIXES = (
  *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz"),
  *(".json.gz", ".json.zst", ".ndjson", ".ndjson.gz"),
)
_LARGE = 256 << 20  # bytes of a file that is not read into memory
_LARGE_PACKED = 64 << 20  # bytes of one that is compressed


class JsonLinesSource(source.TableSource):
  """The lines of files, those of one file after those of another."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    image_size: int,
    *,
    image_column: str = columns.IMAGE,
    text_column: str = columns.TEXT,
    allow_absolute: bool = False,
    **kwargs: Any,
  ) -> None:
    """Reads the lines of the files once; later their index.

    Args:
      path: a file, a folder of them or a pattern: see `archives.of`.
      image_size: images are resized to this square.
      image_column: field of the image; "image" also finds it under the other
        names of `sources/jsonl.py`.
      text_column: field of the words; "caption" also finds the others.
      allow_absolute: let images lie outside the folder of a file.
      **kwargs: as of `source.TableSource`: split, limit_share and so on.

    Raises:
      errors.DataError: there are no such files, or one cannot be read; no line
        can be used, or too many cannot.
      errors.ConfigError: there is no such split.
    """
    super().__init__(
      os.fspath(path).rstrip("/").rpartition("/")[2],
      tables_lib.beside_images(
        "text",
        files_of(path),
        image=image_column,
        text=text_column,
        allow_absolute=allow_absolute,
      ),
      image_size,
      **kwargs,
    )


def files_of(path: str | os.PathLike[str]) -> list[Any]:
  """Returns the files of JSON lines that a path names, in order.

  Raises:
    errors.DataError: there are none.
  """
  return archives.of(path, SUFFIXES, "file of JSON lines")


def is_meant(path: str | os.PathLike[str]) -> bool:
  """Returns whether files are read in place: several, or a large one."""
  path = os.fspath(path)
  if files.is_remote(path):
    if any(c in path for c in "*{[") or not path.endswith((*SUFFIXES, ".json")):
      return True
    try:
      size = int(fetched.version(files.path_of(path))["size"])
    except OSError:
      return False  # what reads it says why
  elif not os.path.isfile(path):
    return os.path.isdir(path) or any(c in path for c in "*{[")
  else:
    size = os.path.getsize(path)
  packed = path.endswith((".gz", ".zst", ".bz2", ".xz"))
  return size > (_LARGE_PACKED if packed else _LARGE)


def is_folder(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is a folder with files of JSON lines.

  Beside archives, or as a list of images, they are something else.
  """
  if files.is_remote(path) or not os.path.isdir(path):
    return False
  names = [name.lower() for name in os.listdir(path)]
  if any(name.endswith(".tar") for name in names):
    return False
  return any(n.endswith(SUFFIXES) for n in names if n != "metadata.jsonl")
