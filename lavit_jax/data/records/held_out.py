"""Chooses which lines of a file are held out: by a hash, sharing no image."""

import collections
import hashlib
import logging
from collections.abc import Sequence

from lavit_jax.data.records import forms

_LOG = logging.getLogger(__name__)
_MAX_GROUP = 2  # times the held-out share: a larger group is not held out


def choose(entries: Sequence[forms.Entry], share: float) -> list[bool]:
  """Returns whether each line is held out.

  A line is chosen by a hash of its first image, or of its text. Lines that are
  joined by shared images form a group, chosen as a whole by the hash of the
  first image in it; but a group of more than twice `share` of all lines is
  trained on. So added lines move no other line, unless they join groups or a
  group exceeds that size.

  Args:
    entries: of all lines.
    share: of the lines that is to be held out.
  """
  groups = _Groups(entries)
  keys = []
  for entry in entries:
    if images := entry.images():
      keys.append(groups.first(images[0]))
    else:
      keys.append(entry.text or "\n".join(p.text for p in entry.parts))
  sizes = collections.Counter(k for k in keys if k in groups)
  limit = max(1, _MAX_GROUP * share * len(entries))
  large = {k for k, n in sizes.items() if n > limit}
  if large:
    _LOG.warning(
      "%d of %d lines are joined by images they share, and too many to be"
      " held out (number of such groups: %d): all are trained on. To choose the"
      " held-out lines yourself, set config.data.held_out_path.",
      sum(sizes[k] for k in large),
      len(entries),
      len(large),
    )
  return [k not in large and hash_of(k) < share * 2**32 for k in keys]


def hash_of(key: str) -> int:
  """Returns a number below 2**32 for a name or text, which decides its half."""
  digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
  return int.from_bytes(digest[:4], "big")


class _Groups:
  """Images joined by lines of several; the first in the file leads a group.

  A union-find; holds nothing of images that stand alone.
  """

  def __init__(self, entries):
    self._leader, self._order = {}, {}
    for entry in entries:
      images = dict.fromkeys(entry.images())
      if len(images) < 2:
        continue
      for image in images:
        self._order.setdefault(image, len(self._order))
      leaders = {self.first(image) for image in images}
      leader = min(leaders, key=self._order.get)
      self._leader.update(dict.fromkeys([*leaders, *images], leader))

  def __contains__(self, key):
    return key in self._leader

  def first(self, image):
    """Returns the leader of an image's group; itself if it stands alone."""
    leader = image
    while (above := self._leader.get(leader, leader)) != leader:
      leader = above
    while image != leader and image in self._leader:  # shortens the path
      self._leader[image], image = leader, self._leader[image]
    return leader
