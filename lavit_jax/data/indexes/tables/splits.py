"""Divides the rows of tables into those of training and those held out.

A row is chosen by a hash of its first image's name, or of its text, as a line
of JSON lines is (`records/held_out.py`): rows that name an image stay together.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np

_LOG = logging.getLogger(__name__)
_ALL = 1 << 32  # what hashes run to
_MAX_GROUP = 2  # times the held-out share: a larger group is not held out


def held_out(
  hashes: np.ndarray,
  joined: tuple[np.ndarray, np.ndarray],
  own: tuple[np.ndarray, Callable[[np.ndarray], Sequence[int]]],
  share: float,
) -> np.ndarray:
  """Returns whether each row is held out.

  Rows that share files are a group, chosen as a whole; one of more than twice
  `share` of all rows is trained on. The name of an image that is in the table
  itself need not be its alone ("image.png"): where as many rows have one name,
  each goes by its place.

  Args:
    hashes: uint32[n], of each row.
    joined: (int64[m] rows, uint32[m] hashes) of the images of rows with
      several files.
    own: bool[n], rows whose first image is in the table; and a function from
      numbers of rows to hashes of their places.
    share: of the rows that is to be held out.

  Returns:
    bool[n].
  """
  hashes = hashes.copy()
  _join(hashes, *joined)
  limit = max(1, _MAX_GROUP * share * len(hashes))
  is_own, places = own
  large = _large(hashes, limit)
  by_place = np.flatnonzero(large & is_own)
  if len(by_place):
    hashes[by_place] = places(by_place)
    large &= ~is_own
  if large.any():
    _LOG.warning(
      "%d of %d rows are joined by images they share, and too many to be held"
      " out: all are trained on. To choose the held-out rows yourself, set"
      " config.data.held_out_path.",
      large.sum(),
      len(hashes),
    )
  held = (hashes < share * _ALL) & ~large
  if share and len(held) > 1 and not held.any() and not large.all():
    lowest = hashes[~large].min()  # of few rows, one
    if (hashes != lowest).any():
      held = (hashes == lowest) & ~large
  return held


def _large(hashes, limit) -> np.ndarray:
  """Returns whether each row's group has more than `limit` rows."""
  order = np.argsort(hashes, kind="stable")
  ordered = hashes[order]
  starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
  sizes = np.diff(np.r_[starts, len(ordered)])
  out = np.zeros(len(hashes), bool)
  for start, size in zip(
    starts[sizes > limit], sizes[sizes > limit], strict=True
  ):
    out[order[start : start + size]] = True
  return out


def _join(hashes, rows, of_images) -> None:
  """Gives rows that share any image the hash of one of their images."""
  if not len(rows):
    return
  above: dict[int, int] = {}

  def leader(image):
    """Returns the leader of an image's group; shortens the way to it."""
    top = image
    while (found := above.get(top, top)) != top:
      top = found
    while image != top:
      above[image], image = top, above[image]
    return top

  order = np.argsort(rows, kind="stable")
  bounds = np.flatnonzero(np.diff(rows[order])) + 1
  groups = [some.tolist() for some in np.split(of_images[order], bounds)]
  for some in groups:
    leaders = {leader(image) for image in some}
    above |= dict.fromkeys([*leaders, *some], min(leaders))
  images = np.array(sorted(above), np.uint32)
  leaders_of = np.array([leader(i) for i in images.tolist()], np.uint32)
  at = np.searchsorted(images, hashes).clip(max=len(images) - 1)
  hashes[:] = np.where(images[at] == hashes, leaders_of[at], hashes)
  first = rows[order][np.r_[0, bounds]]
  hashes[first] = [leader(some[0]) for some in groups]
