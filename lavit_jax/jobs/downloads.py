"""Reads what img2dataset says of images that it could not download.

Beside 00000.tar it writes 00000.parquet: a row for each image of its list, in
which `status` is "success" or says what failed.
"""

import collections
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from lavit_jax.core import errors
from lavit_jax.core.storage import files
from lavit_jax.data.indexes import archives
from lavit_jax.data.indexes.tables import arrow, tables

_COLUMNS = ("url", "caption", "status", "error_message")
_SUFFIXES = (".txt", ".jsonl")


def beside(path: str | os.PathLike[str]) -> list[Any]:
  """Returns the tables beside the archives that a path names."""
  found = [one.with_suffix(".parquet") for one in archives.of(path)]
  return [one for one in found if one.exists()]


def rows(paths: Iterable[Any]) -> Iterator[dict[str, Any]]:
  """Yields url, caption, status and error_message of each row of the tables.

  Raises:
    errors.DataError: PyArrow is not installed, or a table cannot be read.
  """
  parquet = arrow.parquet()
  for path in paths:
    with tables.named(path, "a Parquet file"):
      file = parquet.ParquetFile(tables.Bytes(path).stream())
      names = [n for n in _COLUMNS if n in file.schema_arrow.names]
      if "status" not in names:
        continue  # of something else
      for batch in file.iter_batches(columns=names):
        yield from batch.to_pylist()


def counts(found: Iterable[dict[str, Any]]) -> dict[str, int]:
  """Returns how many rows have each status, and each error of those failed."""
  out: collections.Counter[str] = collections.Counter()
  for row in found:
    status = str(row.get("status"))
    if status != "success" and row.get("error_message"):
      status = f"{status}: {str(row['error_message'])[:60]}"
    out[status] += 1
  return dict(out.most_common())


def write_retries(
  path: str | os.PathLike[str], found: Iterable[dict[str, Any]]
) -> int:
  """Writes the addresses that failed, for another try of img2dataset.

  Args:
    path: ends in .txt, an address a line, or .jsonl, {"url", "caption"} a line
      (img2dataset --input_format jsonl --url_col url --caption_col caption).
    found: rows.

  Returns:
    Their number.

  Raises:
    errors.UsageError: the path has another suffix.
    errors.DataError: it cannot be written.
  """
  if not os.fspath(path).endswith(_SUFFIXES):
    raise errors.UsageError(
      f"--retry-list {path}: expected a name that ends in .txt or .jsonl."
    )
  plain = os.fspath(path).endswith(".txt")
  lines = []
  for row in found:
    if row.get("status") != "success" and row.get("url"):
      value = {"url": row["url"], "caption": row.get("caption")}
      lines.append(row["url"] if plain else json.dumps(value))
  try:
    text = "".join(f"{line}\n" for line in lines)
    files.write_whole(files.path_of(path), text.encode())
  except OSError as error:
    raise errors.DataError(f"{path} cannot be written ({error}).") from error
  return len(lines)
