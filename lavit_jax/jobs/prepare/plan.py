"""Decides which images and texts are prepared, and under which numbers.

A pure function of what `looks.py` found, so that each process decides alike.
"""

import dataclasses
import io
import pathlib

import numpy as np

from lavit_jax.data.caches import shards
from lavit_jax.data.images import hashes

DUPLICATES = ("keep", "exact", "near")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How data are prepared.

  Attributes:
    side: pixels; images whose shorter side is longer are reduced to it and
      encoded again as JPEG. 0 leaves all as they are.
    quality: of those JPEGs, 1 to 100.
    duplicates: "keep" keeps all; "exact" keeps of images with the same
      bytes, and of the same texts, the first; "near" also of images whose
      perceptual hashes are close.
    distance: bits of each hash in which images that look alike may differ, 0
      to 3.
    images_per_shard: images in a file.
    examples_per_shard: examples of the source in a file.
    license: what the manifest says of the licence.
  """

  side: int = 0
  quality: int = 95
  duplicates: str = "keep"
  distance: int = 0
  images_per_shard: int = 8192
  examples_per_shard: int = 65_536
  license: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which images and texts are prepared.

  Attributes:
    old: int64[n], number in the source of each prepared image.
    content: uint64[n], hash of its bytes, see `hashes.of_bytes`.
    new: int32[num_images], number of each image of the source among these: its
      own, that of the one that it equals, or -1.
    merged: int64[m], images that equal an earlier one; they leave it captions.
    texts: bool[t], which texts are kept.
    left_out: reason -> number of images or texts.
  """

  old: np.ndarray
  content: np.ndarray
  new: np.ndarray
  merged: np.ndarray
  texts: np.ndarray
  left_out: dict[str, int]

  def write(self, path: pathlib.Path) -> None:
    """Writes the arrays, for other processes."""
    names = ("old", "content", "new", "merged", "texts")
    data = io.BytesIO()
    np.savez(data, **{name: getattr(self, name) for name in names})
    shards.replace_bytes(path, data.getvalue())

  @classmethod
  def read(cls, path: pathlib.Path) -> "Plan":
    """Returns what `write` wrote, without the reasons."""
    with np.load(path) as file:
      return cls(**{name: file[name] for name in file.files}, left_out={})


def of(
  found: np.ndarray, usable: np.ndarray, texts: np.ndarray, settings: Settings
) -> Plan:
  """Returns the plan.

  Args:
    found: looks.LOOK[num_images].
    usable: bool[num_images], what filters keep.
    texts: uint64[t], hashes of the texts.
    settings: see there.
  """
  good = np.flatnonzero(~found["bad"])
  leader = np.arange(len(good))
  left_out = {
    "filters: images": int((~usable).sum()),
    "cannot be read": int((found["bad"] & usable).sum()),
  }
  if settings.duplicates != "keep":
    _, first, place = np.unique(
      found["content"][good], return_index=True, return_inverse=True
    )
    leader = first[place.ravel()]
    left_out["same bytes as an earlier image"] = _count(leader)
  if settings.duplicates == "near":
    same = _count(leader)  # exact duplicates are near ones, too
    leader = hashes.first_near(found["perceptual"][good], settings.distance)
    left_out["near-duplicate of an earlier image"] = _count(leader) - same
  kept = leader == np.arange(len(good))
  numbers = np.cumsum(kept) - 1
  new = np.full(len(found), -1, np.int32)
  new[good] = numbers[leader]
  keep = np.ones(len(texts), bool)
  if settings.duplicates != "keep":
    _, first = np.unique(texts, return_index=True)
    keep = np.zeros(len(texts), bool)
    keep[first] = True
    left_out["text that was there before"] = int((~keep).sum())
  return Plan(
    old=good[kept],
    content=found["content"][good[kept]],
    new=new,
    merged=good[~kept],
    texts=keep,
    left_out={why: count for why, count in left_out.items() if count},
  )


def _count(leader) -> int:
  return int((leader != np.arange(len(leader))).sum())
