"""Which lines of a file are held out: by a hash, no image in both halves."""

import collections
import hashlib
import logging

_LOG = logging.getLogger(__name__)
_CROWD = 2  # times its share: a larger group is not held out


def choose(entries, share):
  """Whether each line is held out, list[bool].

  A line goes by a hash of its first image, or of its text. Lines that share
  an image with a line of several form a group, which goes whole by the hash
  of the first image that stands in it; but a group of more than twice
  `share` of all lines is trained on. So lines that are added move no other
  one, unless they join groups or a group passes that size.

  Args:
    entries: list of forms.Entry.
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
  room = max(1, _CROWD * share * len(entries))
  crowds = {k for k, n in sizes.items() if n > room}
  if crowds:
    _LOG.warning(
      "%d of %d lines are joined by images they share, and too many to be"
      " held out (groups of this kind: %d): all are trained on. Choose what is"
      " held out by hand with config.data.held_out_path.",
      sum(sizes[k] for k in crowds),
      len(entries),
      len(crowds),
    )
  return [k not in crowds and _hash(k) < share * 2**32 for k in keys]


def _hash(key):
  """A number below 2**32 of a path or text."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


class _Groups:
  """Images that lines of several join; the first in the file leads.

  Holds nothing of images that stand alone.
  """

  def __init__(self, entries):
    self._leader, self._order = {}, {}
    for entry in entries:
      images = dict.fromkeys(entry.images())
      if len(images) < 2:
        continue
      for image in images:
        self._order.setdefault(image, len(self._order))
      tops = {self.first(image) for image in images}
      top = min(tops, key=self._order.get)
      self._leader.update(dict.fromkeys([*tops, *images], top))

  def __contains__(self, key):
    return key in self._leader

  def first(self, image):
    """The leader of an image's group; itself where it stands alone."""
    top = image
    while (above := self._leader.get(top, top)) != top:
      top = above
    while image != top and image in self._leader:  # shortens the way
      self._leader[image], image = top, self._leader[image]
    return top
