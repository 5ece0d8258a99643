"""Asks questions about scenes of the shapes world.

Each has one right short answer, which depends on the scene and cannot be
guessed: yes and no are equally frequent, counts are balanced as far as scenes
allow, other answers are as uniform as the attributes of the objects.
"""

import numpy as np

from lavit_jax.data.shapes import scene as scene_lib
from lavit_jax.data.shapes import text

TYPES = ("color", "shape", "size", "place", "count", "yes/no")
# Weights of the counts 0 to 3 in a scene with a question for each of them;
# they compensate for small counts being possible in more scenes.
_COUNT_WEIGHTS = (0.5, 1.0, 2.0, 4.0)
_WORDINGS = {
  "color": ("what color is {}?", "which color does {} have?"),
  "shape": ("what shape is {}?", "which shape does {} have?"),
  "size": ("what size is {}?", "is {} large or small?"),
  "place": ("where is {}?", "in which corner is {}?"),
}
_VALUES = {
  "color": tuple(scene_lib.COLORS),
  "shape": scene_lib.SHAPES,
  "size": scene_lib.SIZES,
  "place": scene_lib.PLACES,
}
_POLAR_FORMS = (
  *(("exists", kind) for kind in ("color", "shape", "place", "pair", "pair")),
  *(("is", kind) for kind in ("color", "shape", "size", "place")),
)


def questions(
  scene: scene_lib.Scene, rng: np.random.Generator
) -> list[tuple[str, str, str]]:
  """Returns one question of every type: (type, question, answer)."""
  return [(kind, *question(scene, kind, rng)) for kind in TYPES]


def question(
  scene: scene_lib.Scene, kind: str, rng: np.random.Generator
) -> tuple[str, str]:
  """Returns a question of one type about a Scene, and its answer.

  Colour-shape pairs of NEVER_SEEN_PAIRS are named only for never_seen scenes.

  Args:
    scene: to ask about.
    kind: one of TYPES.
    rng: chooses question and wording.

  Raises:
    ValueError: there is no such type.
  """
  if kind in _WORDINGS:
    return _attribute_question(scene, kind, rng)
  if kind == "count":
    return _count_question(scene, rng)
  if kind == "yes/no":
    return _polar_question(scene, rng)
  raise ValueError(
    f"kind={kind!r} is not a type of question; expected one of"
    f" {', '.join(TYPES)}."
  )


def _pick(rng, values):
  return values[int(rng.random() * len(values))]


def _attribute_question(scene, kind, rng):
  """Asks for one attribute of an object that other attributes identify."""
  obj = _pick(rng, scene.objects)
  attributes = _pick(rng, text.names(scene, obj, hidden=(kind,)))
  wording = _pick(rng, _WORDINGS[kind])
  subject = text.definite(obj, attributes, rng)
  return wording.format(subject), getattr(obj, kind)


def _count_question(scene, rng):
  """Draws an answer first, then a question that has it."""
  wordings = {n: {} for n in range(4)}  # answer -> group -> wordings
  for group, wording, counted in _COUNTED:
    count = sum(counted(obj) for obj in scene.objects)
    wordings[count].setdefault(group, []).append(wording)
  possible = [
    (n, _COUNT_WEIGHTS[n]) for n, groups in wordings.items() if groups
  ]
  answer = text.choose(rng, possible)
  wording = _pick(rng, _pick(rng, list(wordings[answer].values())))
  return f"how many {wording}?", str(answer)


def _counted_things():
  """Returns all (group, wording after "how many", predicate of an Object)."""
  things = [("all", "shapes are there", lambda o: True)]
  for shape in scene_lib.SHAPES:
    wording = f"{text.plural(shape)} are there"
    things.append(("shape", wording, lambda o, v=shape: o.shape == v))
  for kind in ("color", "size"):
    for value in _VALUES[kind]:
      test = lambda o, k=kind, v=value: getattr(o, k) == v
      things.append((kind, f"{value} shapes are there", test))
  for row in ("top", "bottom"):
    test = lambda o, v=row: o.place.startswith(v)
    things.append(("row", f"shapes are at the {row}", test))
  for column in ("left", "right"):
    test = lambda o, v=column: o.place.endswith(v)
    things.append(("column", f"shapes are on the {column}", test))
  return things


_COUNTED = _counted_things()


def _polar_question(scene, rng):
  """Draws yes or no first, then a question that has it."""
  right = rng.random() < 0.5
  form, kind = _pick(rng, _POLAR_FORMS)
  ask = _ask_existence if form == "exists" else _ask_attribute
  return ask(scene, kind, right, rng), "yes" if right else "no"


def _ask_existence(scene, kind, right, rng):
  """Is there a red shape, a circle, a red circle, a shape at the top left?"""
  if kind == "pair":
    color, shape = _pick_pair(scene, right, rng)
    return f"is there {text.article(f'{color} {shape}')}?"
  present = {getattr(o, kind) for o in scene.objects}
  value = _pick(rng, [v for v in _VALUES[kind] if (v in present) == right])
  if kind == "place":
    return f"is there a shape at the {text.place_words(value, rng)}?"
  words = f"{value} shape" if kind == "color" else value
  return f"is there {text.article(words)}?"


def _pick_pair(scene, right, rng):
  """Returns a (colour, shape) of the scene, or one that is half wrong."""
  present = {(o.color, o.shape) for o in scene.objects}
  if right:
    return _pick(rng, sorted(present))
  split = scene_lib.split_of(scene.objects)
  colors = {color for color, _ in present}
  shapes = {shape for _, shape in present}
  missing = [
    (color, shape)
    for color, shape in scene_lib.allowed_pairs(split)
    if (color, shape) not in present
  ]
  by_color = [pair for pair in missing if pair[0] in colors]
  by_shape = [pair for pair in missing if pair[1] in shapes]
  return _pick(rng, _pick(rng, (by_color, by_shape)))


def _ask_attribute(scene, kind, right, rng):
  """Is the circle red? Is the red shape a circle? Is it at the top left?"""
  obj = _pick(rng, scene.objects)
  attributes = _pick(rng, text.names(scene, obj, hidden=(kind,)))
  subject = text.definite(obj, attributes, rng)
  value = getattr(obj, kind)
  if not right:
    value = _pick(rng, _wrong_values(scene, obj, kind))
  if kind == "shape":
    value = text.article(value)
  elif kind == "size":
    value = text.size_word(value, rng)
  elif kind == "place":
    value = f"at the {text.place_words(value, rng)}"
  return f"is {subject} {value}?"


def _wrong_values(scene, obj, kind):
  """Returns other values of an attribute, without pairs the split excludes."""
  values = [v for v in _VALUES[kind] if v != getattr(obj, kind)]
  if scene_lib.split_of(scene.objects) == "never_seen":
    return values
  if kind == "color":
    return [v for v in values if not scene_lib.is_never_seen(v, obj.shape)]
  if kind == "shape":
    return [v for v in values if not scene_lib.is_never_seen(obj.color, v)]
  return values
