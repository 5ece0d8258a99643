"""Samples scenes of the shapes world and their edits, and splits them.

A scene has one to three objects, at most one in each quadrant ("place"). The
split of a scene is a pure function of its objects, not of a seed: scenes with a
colour-shape pair of NEVER_SEEN_PAIRS are "never_seen"; of the others a hash
assigns HELD_OUT_SHARE to "held_out" and the rest to "train". An edit stays in
the split of its scene, so no split shows scenes of another.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS = {
  "red": (220, 20, 30),
  "orange": (255, 140, 0),
  "yellow": (250, 235, 40),
  "green": (20, 150, 40),
  "cyan": (40, 215, 230),
  "blue": (30, 50, 220),
  "purple": (130, 20, 160),
  "pink": (255, 130, 200),
}
SIZES = ("large", "small")
PLACES = ("top left", "top right", "bottom left", "bottom right")
ATTRIBUTES = ("size", "color", "shape", "place")

SPLITS = ("train", "held_out", "never_seen")
HELD_OUT_SHARE = 0.2
# Training lacks one colour of each shape; each colour has >= 5 shapes there.
NEVER_SEEN_PAIRS = frozenset(
  {
    ("red", "triangle"),
    ("orange", "ring"),
    ("yellow", "square"),
    ("green", "cross"),
    ("blue", "circle"),
    ("purple", "diamond"),
  }
)

EDITS = ("color", "shape", "size", "place", "remove")
BACKGROUNDS = ("plain", "gradient", "waves", "checks")
JITTER = 4  # quarter pixels at 48 px, to each side
_COUNT_SHARES = (0.3, 0.65)  # cumulative: one object, two objects, three
_COLOR_NAMES = tuple(COLORS)


Attribute = Any  # str; None in an object of a text that does not state it


@dataclasses.dataclass(frozen=True, order=True)
class Object:
  """One object; attributes that a parsed caption does not state are None."""

  shape: Attribute = None
  color: Attribute = None
  size: Attribute = None
  place: Attribute = None


@dataclasses.dataclass(frozen=True)
class Background:
  """A greyish background: base colour plus a low-contrast pattern.

  Attributes:
    kind: one of BACKGROUNDS.
    base: colour, red, green and blue from 0 to 255.
    amplitude: of the pattern, in grey levels.
    angle: of the pattern, in radians.
    period: of the pattern, in pixels of a 48-pixel image.
    phase: of the pattern, in periods.
  """

  kind: str
  base: tuple[int, int, int]
  amplitude: float
  angle: float
  period: float
  phase: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """One scene.

  Attributes:
    objects: in raster order of their places.
    background: behind them.
    jitter: (dx, dy) of the object at each place, in quarter pixels at 48 px.
  """

  objects: tuple[Object, ...]
  background: Background
  jitter: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Edit:
  """One edit of a scene.

  Attributes:
    kind: one of EDITS.
    subject: the object that is edited.
    value: its new attribute; None for "remove".
    scene: the resulting scene.
  """

  kind: str
  subject: Object
  value: Attribute
  scene: Scene


def check_split(split: str) -> None:
  """Raises ValueError when `split` is not one of SPLITS."""
  if split not in SPLITS:
    raise ValueError(
      f"split={split!r} is not a split of the shapes world; expected one of"
      f" {', '.join(SPLITS)}. Change data.split."
    )


def is_never_seen(color: str | None, shape: str | None) -> bool:
  """Returns whether only the split never_seen has a colour-shape pair."""
  return (color, shape) in NEVER_SEEN_PAIRS


def allowed_pairs(split: str) -> list[tuple[str, str]]:
  """Returns (colour, shape) pairs that images and texts of a split may have."""
  return [
    (color, shape)
    for color in COLORS
    for shape in SHAPES
    if split == "never_seen" or not is_never_seen(color, shape)
  ]


def split_of(objects: Iterable[Object]) -> str:
  """Returns the split that objects belong to, whatever the seed."""
  if any(is_never_seen(o.color, o.shape) for o in objects):
    return "never_seen"
  key = ";".join(
    sorted(f"{o.shape},{o.color},{o.size},{o.place}" for o in objects)
  )
  return "held_out" if _bucket(key) < HELD_OUT_SHARE else "train"


@functools.lru_cache(maxsize=65536)
def _bucket(key):
  """Returns a stable number in [0, 1) for a string."""
  digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little") / 2**32


def generator(
  seed: int, split: str, index: int, purpose: int = 0
) -> np.random.Generator:
  """Returns the random generator of one item, for one of its purposes."""
  key = [seed, SPLITS.index(split), index, purpose]
  return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@functools.lru_cache(maxsize=4096)
def sample(split: str, seed: int, index: int) -> tuple[Scene, Edit]:
  """Returns scene number `index` of a split, and one edit of it.

  A pure function of its arguments. Both scenes belong to the split; kinds of
  edit are equally frequent, except that a single object is never removed.
  """
  check_split(split)
  rng = generator(seed, split, index)
  while True:
    objects = _sample_objects(rng, split)
    if not _is_valid(objects) or split_of(objects) != split:
      continue
    results = _edits_of_kind(objects, _sample_kind(rng, objects))
    results = [r for r in results if split_of(r[3]) == split]
    if results:
      break
  scene = Scene(objects, _sample_background(rng), _sample_jitter(rng))
  return scene, _to_edit(scene, results[rng.integers(len(results))])


def _sample_objects(rng, split):
  """Samples objects; for never_seen the first has one of its pairs."""
  u = rng.random(13)
  count = 1 + sum(u[0] >= share for share in _COUNT_SHARES)
  places = np.argsort(u[1:5])[:count]
  pairs = sorted(NEVER_SEEN_PAIRS)
  objects = []
  for n, place in enumerate(places):
    color = _COLOR_NAMES[int(u[5 + n] * len(COLORS))]
    shape = SHAPES[int(u[8 + n] * len(SHAPES))]
    if n == 0 and split == "never_seen":
      color, shape = pairs[int(u[8] * len(pairs))]
    size = SIZES[int(u[12] * 8) >> n & 1]
    objects.append(Object(shape, color, size, PLACES[place]))
  return _in_order(objects)


def _in_order(objects):
  return tuple(sorted(objects, key=lambda o: PLACES.index(o.place)))


def _is_valid(objects):
  """Whether there are objects, one a place, distinct without their places."""
  places = {o.place for o in objects}
  kinds = {(o.shape, o.color, o.size) for o in objects}
  return 0 < len(objects) == len(places) == len(kinds)


def _sample_kind(rng, objects):
  kinds = EDITS if len(objects) > 1 else EDITS[:-1]
  return kinds[rng.integers(len(kinds))]


def _edits_of_kind(objects, kind):
  """Returns valid (kind, subject, value, resulting objects) of one kind."""
  values = {
    "color": _COLOR_NAMES,
    "shape": SHAPES,
    "size": SIZES,
    "place": PLACES,
    "remove": (None,),
  }[kind]
  results = []
  for subject in objects:
    rest = [o for o in objects if o != subject]
    for value in values:
      if kind == "remove":
        changed = tuple(rest)
      elif getattr(subject, kind) == value:
        continue
      else:
        new = dataclasses.replace(subject, **{kind: value})
        changed = _in_order([*rest, new])
      if _is_valid(changed):
        results.append((kind, subject, value, changed))
  return results


def _to_edit(scene, result):
  kind, subject, value, objects = result
  return Edit(kind, subject, value, dataclasses.replace(scene, objects=objects))


# Cumulative shares of the kinds of background; textures are rarer.
_BACKGROUND_SHARES = (
  ("plain", 0.4),
  ("gradient", 0.8),
  ("waves", 0.9),
  ("checks", 1.0),
)


def _sample_background(rng):
  """Samples a grey of lightness 45 to 210, slightly tinted."""
  u = rng.random(8)
  grey = 45 + 165 * u[0]
  base = tuple(int(grey + 16 * (x - 0.5)) for x in u[1:4])
  kind = next(k for k, edge in _BACKGROUND_SHARES if u[4] < edge)
  reach = {"plain": 0, "gradient": 25, "waves": 6, "checks": 5}[kind]
  return Background(
    kind=kind,
    base=base,
    amplitude=float(reach * (0.5 + 0.5 * u[5])),
    angle=float(2 * np.pi * u[6]),
    period=float(8 + 12 * u[7]),
    phase=float(u[5]),
  )


def _sample_jitter(rng):
  offsets = rng.integers(-JITTER, JITTER + 1, (len(PLACES), 2))
  return tuple((int(x), int(y)) for x, y in offsets)
