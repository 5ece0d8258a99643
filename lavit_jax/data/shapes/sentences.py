"""Writes plain text about the shapes world, true by construction.

Half of it says what words mean, half describes scenes, so that text alone shows
how questions, changes and descriptions are related. The text on a scene belongs
to the scene's split.
"""

import numpy as np

from lavit_jax.data.shapes import questions, text
from lavit_jax.data.shapes import scene as scene_lib

_KINDS = ("color", "shape", "size")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def sentence(
  scene: scene_lib.Scene, edit: scene_lib.Edit, rng: np.random.Generator
) -> str:
  """Returns a text of one to three sentences, each with a full stop.

  Args:
    scene: the Scene that may be described.
    edit: an Edit of that scene, for texts about a change.
    rng: chooses form and words.
  """
  if rng.random() < 0.5:
    state = _FACTS[rng.integers(len(_FACTS))]
    return state(scene_lib.split_of(scene.objects), rng)
  describe = _DESCRIPTIONS[rng.integers(len(_DESCRIPTIONS))]
  return describe(scene, edit, rng)


def _pick(rng, values):
  return values[int(rng.random() * len(values))]


def _pick_two(rng, values):
  first, second = rng.permutation(len(values))[:2]
  return values[first], values[second]


def _kind_of_word(split, rng):
  """Says "red is a color."."""
  kind = _pick(rng, _KINDS)
  values = {
    "color": tuple(scene_lib.COLORS),
    "shape": tuple(text.article(s) for s in scene_lib.SHAPES),
    "size": scene_lib.SIZES,
  }[kind]
  return f"{_pick(rng, values)} is a {kind}."


def _attributes_of_name(split, rng):
  """Says "a small red circle is red. it is not large."."""
  color, shape = _pick(rng, scene_lib.allowed_pairs(split))
  size, other = _pick_two(rng, scene_lib.SIZES)
  size_word = text.size_word(size, rng)
  name = text.article(f"{size_word} {color} {shape}")
  affirmed = _pick(rng, (color, size, text.article(shape)))
  denied = _pick(rng, [c for c in scene_lib.COLORS if c != color])
  allowed = split == "never_seen" or not scene_lib.is_never_seen(denied, shape)
  denied = _pick(rng, (denied, other)) if allowed else other
  return f"{name} is {affirmed}. it is not {denied}."


def _compare(split, rng):
  """Says "a red circle and a red ring have the same color."."""
  pairs = scene_lib.allowed_pairs(split)
  color, shape = _pick(rng, pairs)
  alike = rng.random() < 0.5
  kind = _pick(rng, ("color", "shape"))
  others = [
    pair
    for pair in pairs
    if pair != (color, shape)
    and ((pair[0] == color) if kind == "color" else (pair[1] == shape)) == alike
  ]
  first, second = (
    text.article(" ".join(p)) for p in ((color, shape), _pick(rng, others))
  )
  if alike:
    return f"{first} and {second} have the same {kind}."
  return f"{first} and {second} have different {kind}s."


def _places(split, rng):
  """Says "the top left is above the bottom left."."""
  del split
  row, column = _pick(rng, ("top", "bottom")), _pick(rng, ("left", "right"))
  other_row = "bottom" if row == "top" else "top"
  other_column = "right" if column == "left" else "left"
  here = text.place_words(f"{row} {column}", rng)
  form = _pick(rng, ("vertical", "horizontal", "opposite"))
  if form == "vertical":
    there = text.place_words(f"{other_row} {column}", rng)
    return f"the {here} is {'above' if row == 'top' else 'below'} the {there}."
  if form == "horizontal":
    there = text.place_words(f"{row} {other_column}", rng)
    return f"the {here} is {column} of the {there}."
  there = text.place_words(f"{other_row} {other_column}", rng)
  return f"the corner opposite the {here} is the {there}."


def _add_up(split, rng):
  """Says "two circles and one ring are three shapes."."""
  del split
  first, second = _pick_two(rng, scene_lib.SHAPES)
  n, m = (int(x) for x in rng.integers(1, 4, 2))
  total = _NUMBERS[n + m]
  return f"{_some(n, first)} and {_some(m, second)} are {total} shapes."


def _some(count, shape):
  words = shape if count == 1 else text.plural(shape)
  return f"{_NUMBERS[count]} {words}"


def _describe(scene, edit, rng):
  """Says how many objects there are, then which."""
  del edit
  count = len(scene.objects)
  verb = "is" if count == 1 else "are"
  shapes = "shape" if count == 1 else "shapes"
  words = text.full_caption(scene, rng)
  return f"there {verb} {_NUMBERS[count]} {shapes}. {words}."


def _ask(scene, edit, rng):
  """Says a caption, a question and its answer."""
  del edit
  kind = _pick(rng, questions.TYPES)
  question, answer = questions.question(scene, kind, rng)
  return f"{text.full_caption(scene, rng)}. {question} {answer}."


def _change(scene, edit, rng):
  """Says a caption, an instruction and the caption of what results."""
  before = text.full_caption(scene, rng)
  words = text.instruction(scene, edit, rng)
  after = text.full_caption(edit.scene)
  return f"{before}. {words}. now {after}."


_FACTS = (_kind_of_word, _attributes_of_name, _compare, _places, _add_up)
_DESCRIPTIONS = (_describe, _ask, _change)
