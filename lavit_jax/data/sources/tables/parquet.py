"""Reads Parquet files in place, as a Source.

A row is what a JSON line of `sources/jsonl.py` is: its columns are the fields
of one, but for its images, which the file may hold itself. A column of images
is found by its type, or by the name of a field:

  {bytes, path}          as the library `datasets` writes images; of bytes that
                         are null the path counts, relative to the file
  bytes                  encoded images, in a column such as image, img, jpg
  text                   paths relative to the file, in image or file_name
  a list of these        several images of a row

Features of `datasets` are found in the schema, and not needed: the numbers of
a ClassLabel become names. They are captions where a row has no other words.

Of several images beside words the words belong to the first, and the others
are images alone; messages are read as those of a JSON line. A row group is
decoded as a whole, and of a row group only the columns that are read.
"""

import os
import re
from typing import Any

from lavit_jax.core import errors
from lavit_jax.core.storage import files
from lavit_jax.data.indexes import archives
from lavit_jax.data.indexes.tables import tables as tables_lib
from lavit_jax.data.records import columns
from lavit_jax.data.sources.tables import source

SUFFIX = ".parquet"
# How the hub of `datasets` names files: train-00000-of-00005.parquet.
_OF_SPLIT = re.compile(
  r"(train|training|test|testing|val|valid|validation|dev|eval)[-_.]"
)


class ParquetSource(source.TableSource):
  """The rows of Parquet files, those of one file after those of another."""

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
    """Reads the texts of the files once; later their index.

    Args:
      path: a file, a folder of them or a pattern: see `archives.of`.
      image_size: images are resized to this square.
      image_column: column of the images; "image" also finds one of another
        name.
      text_column: column of the words; "caption" also finds others.
      allow_absolute: let images lie outside the folder of a file.
      **kwargs: as of `source.TableSource`: split, limit_share and so on.

    Raises:
      errors.DataError: there are no such files, or one cannot be read; no row
        can be used, or too many cannot; PyArrow is not installed.
      errors.ConfigError: there is no such split.
    """
    super().__init__(
      os.fspath(path).rstrip("/").rpartition("/")[2],
      tables_lib.beside_images(
        "parquet",
        files_of(path),
        image=image_column,
        text=text_column,
        allow_absolute=allow_absolute,
      ),
      image_size,
      **kwargs,
    )


def is_named(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path names Parquet files: by suffix, or as a folder.

  In a folder with archives or a dataset they are taken for something else.
  """
  path = os.fspath(path)
  if path.lower().endswith(SUFFIX):
    return True
  if files.is_remote(path):
    return False
  if os.path.isfile(path):
    with open(path, "rb") as file:
      return file.read(4) == b"PAR1"
  if not os.path.isdir(path):
    return False
  names = [name.lower() for name in os.listdir(path)]
  if any(name.endswith(".tar") for name in names):
    return False  # img2dataset has a table of its downloads by each archive
  return any(n.endswith(SUFFIX) for n in names if n != "metadata.parquet")


def files_of(path: str | os.PathLike[str]) -> list[Any]:
  """Returns the Parquet files that a path names.

  Raises:
    errors.DataError: there are none, or it is a folder with those of several
      splits.
  """
  found = archives.of(path, SUFFIX, "Parquet file")
  folder = files.input_path(path)
  if any(file.parent != folder for file in found):
    return found  # not those of a folder
  named = (_OF_SPLIT.match(file.name) for file in found)
  splits = sorted({match[1] for match in named if match})
  if len(splits) > 1:
    raise errors.DataError(
      f"{path} has files of the splits {', '.join(splits)}, and to train on all"
      f" of them is hardly meant. Name some: '{folder}/{splits[-1]}*{SUFFIX}'."
    )
  return found
