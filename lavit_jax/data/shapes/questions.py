"""Questions about scenes of the shapes world.

Each has one right short answer that a look at the scene gives and a guess does
not: yes and no are equally frequent, counts are levelled as far as scenes
allow, the other answers are as uniform as the attributes of the objects.
"""

from lavit_jax.data.shapes import scene as scene_lib
from lavit_jax.data.shapes import text

TYPES = ("color", "shape", "size", "place", "count", "yes/no")
# Chances of the counts 0 to 3 where a scene has a question for each; they
# make up for small counts being possible in more scenes.
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


def questions(scene, rng):
  """One question of every type: list of (type, question, answer)."""
  return [(kind, *question(scene, kind, rng)) for kind in TYPES]


def question(scene, kind, rng):
  """A question of one type about a Scene, and its answer: (str, str).

  Colour-shape pairs of NEVER_SEEN_PAIRS are named for never_seen scenes only.
  """
  if kind in _WORDINGS:
    return _attribute_question(scene, kind, rng)
  if kind == "count":
    return _count_question(scene, rng)
  if kind == "yes/no":
    return _polar_question(scene, rng)
  raise ValueError(
    f"kind={kind!r} is not a type of question: it must be one of"
    f" {', '.join(TYPES)}."
  )


def _pick(rng, values):
  return values[int(rng.random() * len(values))]


def _attribute_question(scene, kind, rng):
  """Asks for one attribute of an object that other attributes single out."""
  obj = _pick(rng, scene.objects)
  told = _pick(rng, text.names(scene, obj, hidden=(kind,)))
  words = _pick(rng, _WORDINGS[kind])
  subject = text.definite(obj, told, rng)
  return words.format(subject), getattr(obj, kind)


def _count_question(scene, rng):
  """Draws an answer first, then a question that has it."""
  found = {n: {} for n in range(4)}  # answer -> group of questions -> words
  for group, words, counted in _COUNTED:
    count = sum(counted(obj) for obj in scene.objects)
    found[count].setdefault(group, []).append(words)
  possible = [(n, _COUNT_WEIGHTS[n]) for n, groups in found.items() if groups]
  answer = text.choose(rng, possible)
  words = _pick(rng, _pick(rng, list(found[answer].values())))
  return f"how many {words}?", str(answer)


def _counted_things():
  """All (group, words after "how many", test of an Object)."""
  things = [("all", "shapes are there", lambda o: True)]
  for shape in scene_lib.SHAPES:
    words = f"{text.plural(shape)} are there"
    things.append(("shape", words, lambda o, v=shape: o.shape == v))
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
  """A (colour, shape) of the scene, or a near miss: one of the two is there."""
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
  told = _pick(rng, text.names(scene, obj, hidden=(kind,)))
  subject = text.definite(obj, told, rng)
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
  """Other values of an attribute that make no pair the split must not name."""
  values = [v for v in _VALUES[kind] if v != getattr(obj, kind)]
  if scene_lib.split_of(scene.objects) == "never_seen":
    return values
  if kind == "color":
    return [v for v in values if not scene_lib.is_never_seen(v, obj.shape)]
  if kind == "shape":
    return [v for v in values if not scene_lib.is_never_seen(obj.color, v)]
  return values
