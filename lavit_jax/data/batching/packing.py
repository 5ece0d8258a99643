"""Plans which documents are packed into which row.

Documents g = 0, 1, 2, … form one endless stream (`mixtures.Mixture`). Each
window of it is packed into rows by first-fit decreasing with two capacities, so
a row is a pure function of (seed, row number), without queues or other state.
"""

import bisect
import dataclasses
import fractions
import functools
import logging
import os
import pathlib
import secrets
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import array_files
from lavit_jax.data import examples, sequences

_LOG = logging.getLogger(__name__)
_MAX_EMPTY = 16  # windows in a row without one usable document
_WINDOWS_KEPT = 8  # windows whose rows stay in memory
_SAVE_EVERY = 4  # windows between two writes of the memo

# A document of a row: its number g, or (g, piece) of one that is divided.
Member = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Component:
  """One kind of document in a mixture.

  Attributes:
    source: of the examples.
    task: of the examples.
    weight: share of documents, relative to the other components.
    cache: the source's CodeCache; None for a task without images.
    name: of the source in a mixture, for logs.
  """

  source: examples.Source
  task: str
  weight: float | fractions.Fraction = 1.0
  cache: sequences.Codes | None = None
  name: str = ""


def first_fit(
  sizes: np.ndarray | Sequence[Sequence[int]], max_len: int, max_images: int
) -> list[list[int]]:
  """Packs documents by first-fit decreasing with two capacities.

  Args:
    sizes: int[n, 2], positions and images of each document; a document with
      negative size is left out.
    max_len: L, positions a row.
    max_images: S, images a row.

  Returns:
    The rows, each a list of indices into `sizes`. [[5, 0], [3, 0], [4, 0]]
    in rows of 8 gives [[0, 1], [2]].

  Raises:
    ValueError: a document fits no row.
  """
  sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
  share = np.maximum(sizes[:, 0] / max_len, sizes[:, 1] / max(max_images, 1))
  usable = np.flatnonzero(sizes[:, 0] >= 0)
  order = usable[np.argsort(-share[usable], kind="stable")]
  rows: list[list[int]] = []
  # Rows only fill up: where a size had no room once it never has again.
  first_of: dict[tuple[int, int], int] = {}
  positions, images = [max_len], [max_images]  # room of `rows` and a new one
  full = 0  # the first `full` rows have no room for any document
  least = int(sizes[usable, 0].min(initial=max_len))
  for i, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
    key = length, count = tuple(size)
    row = max(full, first_of.get(key, 0))
    while row < len(positions) and (
      positions[row] < length or images[row] < count
    ):
      row += 1
    if row == len(positions):
      raise ValueError(
        f"document {i} of size {size} fits no row of"
        f" {[max_len, max_images]}; give it a negative size to leave it out."
      )
    if row == len(rows):
      rows.append([])
      positions.append(max_len)
      images.append(max_images)
    rows[row].append(i)
    positions[row] -= length
    images[row] -= count
    first_of[key] = row
    while full < len(rows) and positions[full] < least:
      full += 1
  return rows


class PackingPlan:
  """Maps a row number to documents, for documents of known sizes.

  Attributes:
    limits: (positions, images) a row.
    window: number of documents packed together.
  """

  def __init__(
    self,
    sizes: Callable[[int, int], Iterable[np.ndarray]],
    *,
    limits: tuple[int, int],
    window: int = 1024,
    seed: int = 0,
    memo: pathlib.Path | None = None,
  ) -> None:
    """Makes the plan; packs nothing yet.

    Args:
      sizes: pure function of (start, stop) that gives for each of these
        documents int[2], positions and images, or int[k, 2] if it has k
        pieces; negative for one that is left out. An array int[n, 2] has them
        of n documents without pieces.
      limits: (positions, images) a row.
      window: documents packed together.
      seed: of the order of the rows in a window.
      memo: file that keeps how many rows each window has, so that a resumed
        run need not pack earlier windows again; None for none. It may be
        deleted at any time, and is checked when it is used.
    """
    self._sizes, self.window, self._shuffle_seed = sizes, window, seed
    self.limits = limits
    self._memo = memo
    # Of each known window: number of rows, and a checksum of its documents.
    self._known = _read_known(memo)
    self._starts = [0, *np.cumsum([n for n, _ in self._known]).tolist()]
    self._saved = len(self._known)
    self._trusted = False  # until the last window in the memo is checked
    self._lock = threading.RLock()
    self._window_rows = functools.lru_cache(maxsize=_WINDOWS_KEPT)(self._pack)

  def row(self, number: int) -> tuple[Member, ...]:
    """Returns the documents of a row.

    Raises:
      errors.DataError: no document of many windows can be used.
    """
    with self._lock:
      if not self._trusted and self._known:
        self._check(len(self._known) - 1)
      self._trusted = True
      self._extend(number)
      window = bisect.bisect_right(self._starts, number) - 1
      if not self._check(window):
        return self.row(number)
      return self._window_rows(window)[0][number - self._starts[window]]

  def settled(self, number: int) -> int:
    """Returns the first document that no row before a row can hold.

    What is decided from it on, such as other weights, changes none of them.
    """
    if not number:
      return 0
    self.row(number - 1)
    with self._lock:
      return bisect.bisect_right(self._starts, number - 1) * self.window

  def documents_before(self, number: int) -> int:
    """Returns about how many documents come before a row.

    Exact where a window begins; within it its rows are taken as equally full.
    """
    self.row(number)
    with self._lock:
      window = bisect.bisect_right(self._starts, number) - 1
      start, stop = self._starts[window : window + 2]
    share = (number - start) / (stop - start)
    return int((window + share) * self.window)

  def _check(self, window):
    """Whether a window is as in the memo; drops the memo if it is not."""
    rows, checksum = self._window_rows(window)
    if (len(rows), checksum) == self._known[window]:
      return True
    _LOG.warning("%s was made from other data and is not used", self._memo)
    self._known, self._starts, self._saved = [], [0], 0
    return False

  def _extend(self, number):
    """Packs more windows until the row is among them."""
    empty = 0
    while self._starts[-1] <= number:
      rows, checksum = self._window_rows(len(self._known))
      self._known.append((len(rows), checksum))
      self._starts.append(self._starts[-1] + len(rows))
      empty = 0 if rows else empty + 1
      if empty >= _MAX_EMPTY:
        raise errors.DataError(
          f"None of {empty * self.window} documents in a row can be used: they"
          f" are longer than {self.limits[0]} positions and cannot be split,"
          f" read more than {self.limits[1]} images, or are bad. See the log"
          " for names; config.data.length and config.data.slots set the limits."
        )
      more = max(
        _SAVE_EVERY, self._saved // 8
      )  # each write is of the whole memo
      if self._memo and len(self._known) >= self._saved + more:
        self._saved = len(self._known)
        _write_known(self._memo, self._known)

  def _pack(self, window):
    """Returns shuffled rows of a window, and a checksum of its sizes."""
    start = window * self.window
    members: Sequence[Member] = range(start, start + self.window)
    sizes = self._sizes(start, start + self.window)
    if not isinstance(sizes, np.ndarray):
      pieces = [np.asarray(size, np.int64).reshape(-1, 2) for size in sizes]
      members = [
        g if len(size) == 1 else (g, k)
        for g, size in enumerate(pieces, start)
        for k in range(len(size))
      ]
      sizes = np.concatenate(pieces)
    rows = first_fit(sizes, *self.limits)
    order = np.random.default_rng([self._shuffle_seed, window])
    shuffled = [
      tuple(members[i] for i in rows[j]) for j in order.permutation(len(rows))
    ]
    return shuffled, zlib.crc32(sizes.astype(np.int64).tobytes())


def _read_known(memo):
  """Returns the windows in the memo, [] if it holds no valid ones."""
  try:
    known = array_files.read(memo) if memo else np.zeros((0, 2), np.int64)
  except (OSError, ValueError, EOFError):  # EOFError: nothing is in it
    return []
  good = known.ndim == 2 and known.shape[1] == 2 and (known >= 0).all()
  return [tuple(pair) for pair in known.tolist()] if good else []


def _write_known(memo, known):
  """Writes the memo if its folder can be written."""
  if len(_read_known(memo)) >= len(known):
    return  # another process of the run has written it
  # Processes of several machines may share a process id, and this folder.
  unfinished = memo.with_name(f"{memo.stem}.{secrets.token_hex(8)}.tmp")
  try:
    memo.parent.mkdir(exist_ok=True)
    with unfinished.open("wb") as file:
      np.save(file, np.array(known, np.int64))
    os.replace(unfinished, memo)
  except OSError as error:
    _LOG.info(
      "%s could not be written (%s); resuming will be slower", memo, error
    )
