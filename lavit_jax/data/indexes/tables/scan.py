"""Finds out once what the rows of a table hold: images, captions, questions.

Reads the texts of a table and whether there are images, not the images.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.data import examples
from lavit_jax.data.indexes.tables import tables
from lavit_jax.data.records import held_out, known_fields, lines, table_rows

# Of each row. A bad one has nothing.
COLUMNS = np.dtype(
  [
    ("hash", "<u4"),  # of its first image's name, or of its text
    ("images", "<u2"),
    ("captions", "<u2"),
    ("questions", "<u2"),
    ("edits", "<u2"),
    ("kind", "u1"),  # a sum of DOCUMENT, TEXT, FILE, BAD
  ]
)
DOCUMENT, TEXT, FILE, BAD = 1, 2, 4, 8  # FILE: its first image is one
# Of each image that is a file and in a row with others: its row, its hash.
JOINED = np.dtype([("row", "<u4"), ("hash", "<u4")])
_MOST = 65535  # of a kind in one row
_NAMED = 20  # bad rows of a kind whose numbers are kept
_REASONS = 50  # kinds of bad rows that are told apart
_SAMPLED = 20  # rows of which columns that are not read are looked at


@dataclasses.dataclass
class Scanned:
  """What the rows of a table hold.

  Attributes:
    columns: COLUMNS[n], a row each.
    joined: JOINED[m].
    blocks: tables.BLOCKS[b].
    faults: reason -> [how often, numbers of the first rows], of bad rows.
    unread: columns that hold text and are not read -> an example.
    texts: CRC-32 of all words.
    stored: checksum of where the images are.
  """

  columns: np.ndarray
  joined: np.ndarray
  blocks: np.ndarray
  faults: dict[str, list]
  unread: dict[str, str]
  texts: int
  stored: int


def of(table: tables.Table, file: tables.File) -> Scanned:
  """Returns what the rows of a table hold.

  Raises:
    errors.DataError: the file is cut off or damaged, or what its columns hold
      would be lost.
  """
  unread = _unread(table, file)
  reader = table_rows.Reader(table.layout, file.name, file.allow_absolute)
  found = _Found(reader, file.name)
  blocks: list[tuple[int, int]] = []
  for block, start, rows in table.scan():
    while block >= len(blocks):  # one without rows is not yielded
      blocks.append((0, start))
    blocks[block] = blocks[block][0] + len(rows), blocks[block][1]
    found.add(rows)
  more = {name: str(value) for name, (_, _, value) in reader.unread.items()}
  return Scanned(
    np.concatenate([np.zeros(0, COLUMNS), *found.columns]),
    np.array(found.joined, JOINED),
    np.array(blocks, tables.BLOCKS),
    found.faults,
    {name: value[:60] for name, value in (unread | more).items()},
    found.texts,
    table.stored(),
  )


class _Found:
  """What has been found of the rows so far.

  Attributes:
    columns: parts of COLUMNS.
    joined: images of rows with several.
    faults: of bad rows.
    texts: CRC-32 of the words so far.
  """

  def __init__(self, reader, name):
    self.columns: list[np.ndarray] = []
    self.joined: list[tuple[int, int]] = []
    self.faults: dict[str, list] = {}
    self.texts = 0
    self._reader, self._name, self._number = reader, name, 0

  def add(self, rows: tables.Rows) -> None:
    """Adds some rows; plain ones quickly."""
    plain = rows.plain()
    out = []
    for j in range(len(rows)):
      row = self._plain(plain, j) if plain else None
      out.append(row or self._row(rows, j))
      self._number += 1
    self.columns.append(np.array(out, COLUMNS))

  def _plain(self, plain, j) -> tuple | None:
    """Returns a row of COLUMNS, None for one that is to be looked at."""
    text = plain.texts[j]
    text = text.strip() if text else ""
    if not plain.images:
      if not text:
        return None
      self._count_words([], [], [], [], text)
      return held_out.hash_of(text), 0, 0, 0, 0, TEXT
    if table_rows.MARK in text:
      return None
    self._count_words([text] if text else [], [], [], [], None)
    return self._key_of(plain.names[j]), 1, int(bool(text)), 0, 0, 0

  def _key_of(self, name):
    return held_out.hash_of(name or f"{self._name}:{self._number}")

  def _row(self, rows, j) -> tuple:
    """Returns a row of COLUMNS, having read all of it."""
    try:
      row = self._reader.read(self._number, rows.values(j))
      return self._of(row, rows, j)
    except lines.BadLine as error:
      self._fault(str(error))
      return 0, 0, 0, 0, 0, BAD

  def _of(self, row, rows, j):
    entry = row.entry
    files = [name for name in row.names if name not in row.cells]
    counts = [
      len(some)
      for some in (row.names, entry.captions, entry.questions, entry.edits)
    ]
    if max(counts) > _MOST:
      raise lines.BadLine(f"has more than {_MOST} images or texts")
    kind = DOCUMENT * bool(entry.parts) + TEXT * bool(entry.text)
    if not row.names:
      texts = [part.text for part in entry.parts]
      key = held_out.hash_of(entry.text or "\n".join(texts))
    elif row.names[0] in row.cells:
      cell = row.cells[row.names[0]]
      key = self._key_of(rows.name(j, cell.column, cell.place))
    else:
      key, kind = held_out.hash_of(row.names[0]), kind | FILE
    if len(files) > 1:
      self.joined += [(self._number, held_out.hash_of(name)) for name in files]
    self._count_words(
      entry.captions, entry.questions, entry.edits, entry.parts, entry.text
    )
    return key, *counts, kind

  def _count_words(self, *words) -> None:
    self.texts = zlib.crc32(
      repr(words).encode(errors="surrogatepass"), self.texts
    )

  def _fault(self, reason) -> None:
    if len(self.faults) >= _REASONS and reason not in self.faults:
      reason = "other reasons"
    entry = self.faults.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < _NAMED:
      entry[1].append(self._number)


def _unread(table, file) -> dict[str, str]:
  """Returns columns with text that are not read, with an example of each.

  Raises:
    errors.DataError: without images, one of them seems to name some.
  """
  found: dict[str, str] = {}
  odd: list[lines.BadLine] = []
  rows = table.sample(_SAMPLED)
  known = known_fields.LEARNABLE - set(known_fields.KINDS)
  for values in rows:
    try:
      row = table_rows.plain(values)
    except lines.BadLine:
      continue
    if not table.layout.images and (error := _odd(row)):
      odd.append(error)
    lost = [(name, row[name]) for name in row.keys() & known]
    for name, value in (*lost, *known_fields.unknown(row, ())):
      found.setdefault(name, str(value))
  if odd and len(odd) * 2 > len(rows):
    raise errors.DataError(
      f"{file.path}: its first row {odd[0]}. Or say which column holds the"
      " images: config.data.image_feature."
    )
  return found


def _odd(row: Mapping[str, Any]) -> lines.BadLine | None:
  try:
    known_fields.check_alone(row)
  except lines.BadLine as error:
    return error
  return None


def counts_of(columns: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
  """Yields (task, number of examples of each row) of every kind of example."""
  yield "captions", columns["captions"]
  yield "edit", columns["edits"]
  yield "vqa", columns["questions"]
  yield "document", (columns["kind"] & DOCUMENT > 0).astype(np.uint16)
  yield "text", (columns["kind"] & TEXT > 0).astype(np.uint16)


TASKS = {
  "captions": tuple(examples.OF_CAPTIONS),
  "edit": ("edit",),
  "vqa": ("vqa",),
  "document": ("document",),
  "text": ("text",),
}
