"""Rows of tables as a Source: images by number, examples by task.

What `parquet.py` and `hf.py` share. A row is read as a JSON line is; each of
its images is an image of the source. In memory there are a few numbers a row.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import files
from lavit_jax.data import examples, faults
from lavit_jax.data.images import decoding
from lavit_jax.data.indexes.tables import (
  decoded,
  kept,
  numbers,
  scan,
  splits,
)
from lavit_jax.data.indexes.tables import tables as tables_lib
from lavit_jax.data.records import fields as fields_lib
from lavit_jax.data.records import held_out, lines, table_rows

_LOG = logging.getLogger(__name__)
_OPEN = 64  # tables kept open
_TEXTS = 64 << 20  # bytes of texts that are kept
_IMAGES = 256 << 20  # bytes of encoded images that are kept
_LEAST = 1 << 12  # bytes that anything kept counts for
_NUM_PROBED = 20  # images looked for before a wrong folder is reported


@dataclasses.dataclass(frozen=True)
class _Open:
  """A table that is open, and the reader of its rows."""

  table: tables_lib.Table
  reader: table_rows.Reader


class TableSource:
  """The images and examples of the rows of some tables.

  Bad rows are left out, counted and logged in `faults`; the data are refused
  when their share exceeds `limit_share`.

  Attributes:
    name: of the data, for messages.
    image_size: height and width of the images, in pixels.
    split: "all", "train" or "held_out".
    num_rows: number of rows.
    num_images: number of images of all rows.
    faults: the FaultLog of rows that are left out.
    tables: the files with the tables.
  """

  def __init__(
    self,
    name: str,
    tables: Sequence[tables_lib.File],
    image_size: int,
    *,
    split: str = "all",
    held_out_share: float = 0.1,
    limit_share: float = faults.LIMIT_SHARE,
    decode: decoding.Decode = decoding.exact,
    quiet: bool = False,
  ) -> None:
    """Reads the indexes of the tables; makes those that are not there.

    Args:
      name: of the data, for messages.
      tables: the files.
      image_size: images are resized to this square.
      split: "all", or "train" / "held_out" by a hash of each row's first
        image, or text: see `splits.held_out`.
      held_out_share: share of the rows that is held out.
      limit_share: share of bad rows above which the data are refused.
      decode: makes the square of an encoded image.
      quiet: no progress bar while indexes are made.

    Raises:
      errors.DataError: a file is missing, cut off or damaged, its columns
        cannot be read, no row can be used, or too many cannot.
      errors.ConfigError: there is no such split.
    """
    if split not in ("all", "train", "held_out"):
      raise errors.ConfigError(
        f"split={split!r}: tables have all, train and held_out."
      )
    self.name, self.image_size = name, int(image_size)
    self._square = decode
    self.tables = list(tables)
    indexes = kept.of(self.tables, quiet=quiet)
    self.faults = _faults(name, indexes, limit_share)
    _warn_of_unread(name, indexes)
    _warn_of_empty(name, indexes)
    rows = np.concatenate([index.scanned.columns for index in indexes])
    self._places = numbers.Places(
      [file.name for file in self.tables],
      [index.scanned.blocks["rows"] for index in indexes],
    )
    self.split, self._share = split, held_out_share
    self._rows = self._chosen(rows, indexes)
    if not len(self._rows):
      raise errors.DataError(
        f"{name}: no usable row for split={split!r} ({self.faults.summary()})."
        " Expected rows such as an image and its caption, or a text. What is"
        " held out can be data of its own: config.data.held_out_path."
      )
    self.num_rows = len(self._rows)
    rows = rows[self._rows]
    self._images = numbers.Counts(rows["images"])
    self.num_images = self._images.total
    self._counts = {
      task: counts
      for kind, some in scan.counts_of(rows)
      if (counts := numbers.Counts(some)).total
      for task in scan.TASKS[kind]
    }
    self._indexes = [index.slim() for index in indexes]
    self._open = decoded.Decoded(_OPEN, lambda opened: 1)
    self._texts = decoded.Decoded(_TEXTS, lambda rows: rows.nbytes + _LEAST)
    self._cells = decoded.Decoded(_IMAGES, lambda cells: cells.nbytes + _LEAST)
    self._check_files(np.flatnonzero(rows["kind"] & scan.FILE)[:_NUM_PROBED])

  def _chosen(self, rows, indexes) -> np.ndarray:
    """Returns the numbers of the rows of the split."""
    split, share = self.split, self._share
    good = np.flatnonzero(rows["kind"] & scan.BAD == 0)
    good = good.astype(np.uint32 if len(rows) < 1 << 32 else np.int64)
    if split == "all" or not len(good):
      return good
    joined = [
      (index.scanned.joined["row"] + start, index.scanned.joined["hash"])
      for index, start in zip(indexes, self._places.starts, strict=False)
    ]
    chosen = rows[good]
    held = splits.held_out(
      chosen["hash"],
      (
        np.searchsorted(good, np.concatenate([row for row, _ in joined])),
        np.concatenate([images for _, images in joined]),
      ),
      (
        (chosen["images"] > 0) & (chosen["kind"] & scan.FILE == 0),
        lambda some: [
          held_out.hash_of(self._places.name(row))
          for row in good[some].tolist()
        ],
      ),
      share,
    )
    return good[held if split == "held_out" else ~held]

  def _table(self, number) -> _Open:
    """Returns a table that is open."""

    def make():
      index = self._indexes[number]
      file, table = index.file, index.open()
      reader = table_rows.Reader(table.layout, file.name, file.allow_absolute)
      return _Open(table, reader)

    return self._open.get(number, make)

  def _row(self, i) -> tuple[str, table_rows.Row]:
    """Returns the name and the contents of row i of the split.

    Raises:
      errors.DataError: the table cannot be read, or has changed.
    """
    with self._reading(i) as (place, table, block, j):
      opened = self._table(table)
      rows = self._texts.get((table, block), lambda: opened.table.rows(block))
      return place, opened.reader.read(j, rows.values(j))

  @contextlib.contextmanager
  def _reading(self, i):
    """Gives where row i of the split is; what fails inside names it."""
    number = int(self._rows[i])
    place = self._places.name(number)
    try:
      yield place, *self._places.find(number)
    except (OSError, IndexError, lines.BadLine) as error:
      raise errors.DataError(
        f"{place} is not as it was when the data were opened ({error}). Start"
        " again, and leave the files as they are meanwhile."
      ) from error

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[size, size, 3]; ImageError for a bad one."""
    name, (source, reason) = self.image_key(i), self._encoded(i)
    if reason:
      raise image_io.ImageError(f"{name}: {reason}.")
    if not isinstance(source, bytes):
      name = f"{name} ({source})"
    return self._square(source, self.image_size, name)

  def encoded(self, i: int) -> Any:
    """Returns the bytes of image i, or its path; b"" if there is neither.

    Raises:
      image_io.ImageError: the table cannot be read.
    """
    return self._encoded(i)[0]

  def _encoded(self, i) -> tuple[Any, str]:
    """Returns (what `encoded` does, why there is nothing or "")."""
    row, which = self._images.find(i)
    table, block, j = self._places.find(int(self._rows[row]))
    try:
      opened = self._table(table)
      name, cell = self._cell(opened.table.layout, row, which)
      if cell is not None:
        cells = self._cells.get(
          (table, block, cell.column),
          lambda: opened.table.cells(block, cell.column),
        )
        value = cells.value(j, cell.place)
        if isinstance(value, bytes):
          return value, "" if value else "has no bytes"
        if value is None:
          return b"", "holds neither an image nor the path of one"
        name = opened.reader.path(value)
    except lines.BadLine as error:
      return b"", str(error)
    except (OSError, errors.DataError) as error:
      reason = getattr(error, "strerror", None) or error
      raise image_io.ImageError(
        f"{self.image_key(i)}: cannot be read ({reason})"
      ) from error
    return files.input_path(self.tables[table].folder) / name, ""

  def _cell(self, layout, row, which):
    """Returns (path, None) of an image, or ("", its cell)."""
    lone = None if layout is None else layout.lone_image()
    if lone is not None and lone.kind != "text":
      return "", table_rows.Cell(lone.name)  # without a look at the row
    _, read = self._row(row)
    name = read.names[which]
    return name, read.cells.get(name)

  def image_key(self, i: int) -> str:
    """Returns the name of image i: TABLE:ROW, and [k] where it has several."""
    row, which = self._images.find(i)
    place = self._places.name(int(self._rows[row]))
    several = self._images.start(row + 1) - self._images.start(row) > 1
    return f"{place}[{which}]" if several else place

  def captions(self, i: int) -> list[str]:
    """Returns the captions of image i; those of a row are of its first."""
    row, which = self._images.find(i)
    return list(self._row(row)[1].entry.captions) if not which else []

  def questions(self, i: int) -> list[fields_lib.Question]:
    """Returns the questions about image i: (type, question, answer)."""
    row, which = self._images.find(i)
    return list(self._row(row)[1].entry.questions) if not which else []

  def states(self) -> str:
    """Returns what changes whenever a table does."""
    return repr([index.state for index in self._indexes])

  def fields(self, i: int) -> dict[str, Any]:
    """Returns the numbers in the row of image i, for filters.

    Raises:
      errors.DataError: the table cannot be read, or has changed.
    """
    row, _ = self._images.find(i)
    with self._reading(row) as (_, table, block, j):
      opened = self._table(table)
      key = (table, block, "numbers")
      rows = self._texts.get(key, lambda: opened.table.numbers(block))
      return rows.values(j)

  def tasks(self) -> tuple[str, ...]:
    """Returns the tasks that rows are examples of."""
    return tuple(task for task in examples.TASKS if task in self._counts)

  def num_examples(self, task: str) -> int:
    """Returns the number of examples of a task, 0 if there are none."""
    return self._counts[task].total if task in self._counts else 0

  def example(self, task: str, i: int) -> examples.Example:
    """Returns example i of a task.

    Raises:
      errors.DataError: the table cannot be read, or has changed.
    """
    number, which = self._counts[task].find(i)
    place, row = self._row(number)
    start = self._images.start(number)
    entry = row.entry
    if task in examples.OF_CAPTIONS:
      return examples.OF_CAPTIONS[task](place, start, entry.captions[which])
    if task == "vqa":
      _, question, answer = entry.questions[which]
      return examples.vqa(place, start, question, answer)
    if task == "edit":
      instruction, result = entry.edits[which]
      image = start + row.names.index(result)
      return examples.edit(place, start, instruction, image)
    if task == "document":
      parts = [
        dataclasses.replace(part, image=start + row.names.index(part.image))
        if isinstance(part, examples.ImagePart)
        else part
        for part in entry.parts
      ]
      return examples.Example(place, "document", tuple(parts))
    return examples.text(place, entry.text or "")

  def _check_files(self, rows):
    """Refuses tables of which none of the first images exists."""
    paths = [self.encoded(self._images.start(int(row))) for row in rows]
    if paths and not any(isinstance(p, bytes) or p.exists() for p in paths):
      raise errors.DataError(
        f"{self.name}: none of its first {len(paths)} images exists, such as"
        f" {paths[0]}; paths are relative to the folder of the table."
      )

  def fingerprint(self) -> str:
    """Returns a digest of the images' names, their order and size."""
    return self._digest(self.image_size, counts=[self._images])

  def contents(self) -> str:
    """Returns a digest of the images' names, the words and their order."""
    words = [index.scanned.texts for index in self._indexes]
    counts = [self._counts[task] for task in self.tasks()]
    return self._digest(
      *(self.image_size, self.tasks(), words),
      counts=[self._images, *counts],
    )

  def stored(self) -> str:
    """Returns a digest of where each image is."""
    where = [index.scanned.stored for index in self._indexes]
    return self._digest(where, counts=[self._images])

  def _digest(self, *values, counts):
    names = [file.name for file in self.tables]
    what = (
      names,
      self._places.starts.tolist(),
      self.split,
      self._share,
      *values,
    )
    digest = hashlib.sha256(repr(what).encode())
    digest.update(self._rows.tobytes())
    for count in counts:
      count.add_to(digest)
    return digest.hexdigest()[:32]


def _faults(name, indexes, limit_share) -> faults.FaultLog:
  """Returns the log of all rows that are left out."""
  log = faults.FaultLog(f"rows of {name}", limit_share)
  for index in indexes:
    bad = sum(count for count, _ in index.scanned.faults.values())
    log.good(len(index.scanned.columns) - bad)
    for reason, (count, rows) in index.scanned.faults.items():
      named = [f"{index.file.name}:{row}" for row in rows]
      log.fault_all(dict.fromkeys(named, reason), count)
  log.check()
  return log


def _warn_of_unread(name, indexes) -> None:
  unread: dict[str, str] = {}
  for index in indexes:
    unread = index.scanned.unread | unread
  if unread:
    some = [f"{key!r} ({text!r:.40})" for key, text in sorted(unread.items())]
    more = f" and {len(some) - 5} more" if len(some) > 5 else ""
    _LOG.warning(
      "%s: columns with text that are not read: %s%s. To read one of them, name"
      " it as config.data.text_feature (--text-feature of a command).",
      name,
      ", ".join(some[:5]),
      more,
    )


def _warn_of_empty(name, indexes) -> None:
  empty = [i.file.name for i in indexes if not len(i.scanned.columns)]
  if empty and len(empty) < len(indexes):
    _LOG.warning(
      "%s: %d of %d files hold no rows, such as %s",
      name,
      len(empty),
      len(indexes),
      empty[0],
    )


def overlap(one: TableSource, other: TableSource) -> int:
  """Returns the number of rows of `other` in tables of `one` too.

  None if both are parts of the same rows, by their hashes.
  """
  if {one.split, other.split} == {"train", "held_out"}:
    return 0
  mine = {_real(file.path) for file in one.tables}
  starts = other._places.starts
  usable = np.searchsorted(other._rows, starts)  # bad rows count in neither
  return sum(
    int(stop - start)
    for file, start, stop in zip(
      other.tables, usable[:-1], usable[1:], strict=True
    )
    if _real(file.path) in mine
  )


def _real(path) -> str:
  return os.fspath(path) if files.is_remote(path) else os.path.realpath(path)
