"""Words the shapes world: captions, names of objects and edit instructions.

Every text is true of its scene. Texts are in lower case, without a full stop
inside a caption (it ends where the first sentence ends). For questions see
`questions.py`.
"""

from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np

from lavit_jax.data.shapes import scene as scene_lib

# Words for one meaning, with their weights.
SIZE_WORDS = {
  "large": (("large", 0.75), ("big", 0.25)),
  "small": (("small", 0.75), ("little", 0.25)),
}
ROW_WORDS = {
  "top": (("top", 0.75), ("upper", 0.25)),
  "bottom": (("bottom", 0.75), ("lower", 0.25)),
}
PLACE_FORMS = (("at the {}", 0.7), ("in the {}", 0.15), ("on the {}", 0.15))
CAPTION_FORMS = (("after", 0.7), ("before", 0.15), ("label", 0.15))
OPENINGS = (("", 0.7), ("there is ", 0.15), ("a picture of ", 0.15))
# Attributes that a caption omits, none in FULL_SHARE of training captions.
OMISSIONS = (
  ((), 0.8),
  (("size",), 0.06),
  (("place",), 0.05),
  (("color",), 0.04),
  (("size", "place"), 0.05),
)
FULL_SHARE = OMISSIONS[0][1]
EDIT_FORMS = {
  "color": ("make {} {}", "change the color of {} to {}", "paint {} {}"),
  "shape": ("change {} to {}", "turn {} into {}", "replace {} with {}"),
  "size": ("make {} {}", "change the size of {} to {}"),
  "place": ("move {} to the {}", "bring {} to the {}"),
  "remove": ("remove {}", "take away {}", "delete {}"),
}


T = TypeVar("T")
_Rng = np.random.Generator | None  # None: the first, plain wording


def choose(rng: _Rng, weighted: Sequence[tuple[T, float]]) -> T:
  """Draws a value from ((value, weight), ...); without rng the first."""
  if rng is None:
    return weighted[0][0]
  u = rng.random() * sum(weight for _, weight in weighted)
  for value, weight in weighted:
    u -= weight
    if u < 0:
      return value
  return weighted[-1][0]  # u is not below 0 by a rounding error


def article(words: str) -> str:
  """Puts "a" or "an" before words: "orange ring" -> "an orange ring"."""
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
  """Returns the plural of a shape: "cross" -> "crosses"."""
  return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def size_word(size: str, rng: _Rng = None) -> str:
  """Returns one of the words for a size."""
  return choose(rng, SIZE_WORDS[size])


def place_words(place: str, rng: _Rng = None) -> str:
  """Returns one of the wordings of a place: "upper left" for "top left"."""
  row, column = place.split(" ")
  return f"{choose(rng, ROW_WORDS[row])} {column}"


def noun(
  obj: scene_lib.Object,
  attributes: Collection[str] = scene_lib.ATTRIBUTES,
  rng: _Rng = None,
) -> str:
  """Returns a noun phrase without article: "large red circle".

  Args:
    obj: to name.
    attributes: to state; the place is not stated here, and without "shape" the
      object is called a "shape".
    rng: chooses the wording.
  """
  words = []
  if "size" in attributes:
    words.append(size_word(obj.size, rng))
  if "color" in attributes:
    words.append(obj.color)
  words.append(obj.shape if "shape" in attributes else "shape")
  return " ".join(words)


def full_caption(scene: scene_lib.Scene, rng: _Rng = None) -> str:
  """Returns a caption with all four attributes of every object.

  The plain wording (without rng), in raster order, is used by evaluation:
  "a large red circle at the top left and a small blue ring at the top right".
  """
  return _caption(scene, (), rng)


def caption(scene: scene_lib.Scene, rng: np.random.Generator) -> str:
  """Returns a caption in any wording; FULL_SHARE have all attributes."""
  return _caption(scene, choose(rng, OMISSIONS), rng)


def _caption(scene, omitted, rng):
  """Returns a caption without the attributes in `omitted`."""
  stated = [a for a in scene_lib.ATTRIBUTES if a not in omitted]
  objects = list(scene.objects)
  if rng is not None and rng.random() < 0.4:
    rng.shuffle(objects)
  form = choose(rng, CAPTION_FORMS) if "place" in stated else "after"
  # One choice for the whole caption, for an even style.
  at = choose(rng, PLACE_FORMS)
  clauses = [_clause(obj, stated, form, at, rng) for obj in objects]
  if form == "label":
    return "; ".join(clauses)
  opening = choose(rng, OPENINGS) if form == "after" else ""
  return opening + enumerate_words(clauses)


def _clause(obj, stated, form, at, rng):
  words = article(noun(obj, stated, rng))
  if "place" not in stated:
    return words
  place = place_words(obj.place, rng)
  if form == "label":
    return f"{place}: {words}"
  if form == "before":
    return f"{at.format(place)} {words}"
  return f"{words} {at.format(place)}"


def enumerate_words(items: Sequence[str]) -> str:
  """Joins with commas and "and": [a, b, c] -> "a, b and c"."""
  if len(items) == 1:
    return items[0]
  return f"{', '.join(items[:-1])} and {items[-1]}"


def names(
  scene: scene_lib.Scene, obj: scene_lib.Object, hidden: Collection[str] = ()
) -> list[tuple[str, ...]]:
  """Returns all sets of attributes that identify an object in its scene.

  Args:
    scene: of the object.
    obj: to identify.
    hidden: attributes that must not be used.

  Returns:
    The sets, shortest first, each in the order of scene.ATTRIBUTES.
  """
  usable = [a for a in scene_lib.ATTRIBUTES if a not in hidden]
  sets = []
  for bits in range(1, 2 ** len(usable)):
    chosen = tuple(a for n, a in enumerate(usable) if bits >> n & 1)
    same = [
      other
      for other in scene.objects
      if all(getattr(other, a) == getattr(obj, a) for a in chosen)
    ]
    if len(same) == 1:
      sets.append(chosen)
  return sorted(sets, key=len)


def definite(
  obj: scene_lib.Object, attributes: Collection[str], rng: _Rng = None
) -> str:
  """Names an object by some attributes: "the large circle at the top left"."""
  words = f"the {noun(obj, attributes, rng)}"
  if "place" in attributes:
    words += f" at the {place_words(obj.place, rng)}"
  return words


def instruction(
  scene: scene_lib.Scene, edit: scene_lib.Edit, rng: _Rng = None
) -> str:
  """Returns the instruction for an edit: "make the red circle small".

  Names the subject by attributes that identify it; without rng by shape,
  colour and size in the first wording.
  """
  subject = edit.subject
  attributes: tuple[str, ...] = ("size", "color", "shape")
  if rng is not None:
    hidden = ("place",) if edit.kind == "place" else ()
    ways = names(scene, subject, hidden)
    ways = [way for way in ways if len(way) > 1 and "shape" in way]
    attributes = ways[rng.integers(len(ways))]
  forms = EDIT_FORMS[edit.kind]
  form = forms[0] if rng is None else forms[rng.integers(len(forms))]
  value = edit.value
  if edit.kind == "shape":
    value = article(value)
  elif edit.kind == "size":
    value = size_word(value, rng)
  elif edit.kind == "place":
    value = place_words(value, rng)
  return form.format(definite(subject, attributes, rng), value)
