"""Groups the files of a run of a tar archive into samples, all at once.

The rules are those of `tar_samples`, which groups file by file whatever is not
as usual: names without a field, fields of more than eight letters, samples with
a field twice or without an image. The first and the last sample of a run may go
on beyond it, and are left to that, too.
"""

from typing import NamedTuple

import numpy as np

from lavit_jax.data.indexes import tar_runs

_FIELD = 8  # bytes of a field's name that are compared
_MOST_FIELDS = 16  # of a sample
NONE = -1


class Groups(NamedTuple):
  """Samples of a run, g of them.

  Attributes:
    first: int64[g], the first file of each.
    stop: int64[g], the file after its last one.
    names: of the samples.
    image: int64[g], the file with the image; NONE for a sample that has to be
      looked at file by file.
    text: int64[g], the file txt, or NONE.
    json: int64[g], the file json, or NONE.
  """

  first: np.ndarray
  stop: np.ndarray
  names: list[bytes]
  image: np.ndarray
  text: np.ndarray
  json: np.ndarray


def of(run: tar_runs.Run, images: tuple[bytes, ...]) -> Groups | None:
  """Returns the samples of a run but for the first and the last one.

  Args:
    run: of files.
    images: fields that are images, the first ones preferred.

  Returns:
    The samples; None if there are too few, or the names are unusual.
  """
  table = np.zeros((len(run.names), run.names.shape[1] + _FIELD), np.uint8)
  table[:, : run.names.shape[1]] = run.names
  ends = (table == 0).argmax(axis=1)
  table = table[:, : ends.max(initial=0) + _FIELD]
  columns = np.arange(table.shape[1])
  base = np.where(table == ord("/"), columns + 1, 0).max(axis=1, initial=0)
  dots = (table == ord(".")) & (columns >= base[:, None])
  dot = dots.argmax(axis=1)
  own = (table[:, :2] == ord("_")).all(axis=1)
  usual = (dot > base) & dots.any(axis=1) & (ends - dot <= _FIELD + 1) & ~own
  if not usual.all() or (np.count_nonzero(table, axis=1) != ends).any():
    return None
  same = (table[1:] == table[:-1]) | (columns >= dot[1:, None])
  same = same.all(axis=1) & (dot[1:] == dot[:-1])
  starts = np.flatnonzero(np.concatenate([[True], ~same]))
  if len(starts) < 3:
    return None
  fields = _fields(table, dot)
  group = np.cumsum(np.concatenate([[0], ~same]))
  sizes = np.diff(starts, append=len(table))
  if sizes.max() > _MOST_FIELDS:
    return None
  rank = _rank(fields, images)
  numbers = np.arange(len(table))
  best = np.minimum.reduceat(rank * len(table) + numbers, starts)
  image = np.where(best < len(images) * len(table), best % len(table), NONE)
  for apart in range(1, int(sizes.max())):  # a field twice
    twice = fields[apart:] == fields[:-apart]
    twice &= group[apart:] == group[:-apart]
    image[group[apart:][twice]] = NONE
  inner = slice(1, -1)
  found = [
    np.maximum.reduceat(np.where(fields == _word(name), numbers, NONE), starts)
    for name in (b"txt", b"json")
  ]
  first = starts[inner]
  names = np.where(columns < dot[first, None], table[first], 0)
  return Groups(
    first,
    starts[2:],
    names.astype(np.uint8).view(f"S{table.shape[1]}").ravel().tolist(),
    image[inner],
    *(column[inner] for column in found),
  )


def _fields(table, dot):
  """Returns the field of each file as a number, in small letters."""
  letters = table[np.arange(len(table))[:, None], dot[:, None] + 1 + _PLACES]
  capital = (letters >= ord("A")) & (letters <= ord("Z"))
  letters = np.ascontiguousarray(letters + 32 * capital.astype(np.uint8))
  return letters.view("<u8").ravel()


_PLACES = np.arange(_FIELD)


def _word(name):
  """Returns a field as a number."""
  return np.uint64(int.from_bytes(name, "little"))


def _rank(fields, images):
  """Returns which of `images` each field is; their number for another."""
  words = np.array([_word(name) for name in images])
  order = np.argsort(words)
  place = np.searchsorted(words[order], fields).clip(max=len(images) - 1)
  found = order[place]
  return np.where(words[found] == fields, found, len(images))
