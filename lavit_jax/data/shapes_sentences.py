"""Plain text about the shapes world, true by construction.

Half of it says what words mean, half tells scenes: text alone shows how
questions, changes and descriptions hang together. A scene that is told stays
in the split it comes from.
"""

from lavit_jax.data import shapes_questions, shapes_scene, shapes_text

_KINDS = ("color", "shape", "size")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def sentence(scene, edit, rng):
  """Text of one to three sentences, each with a full stop.

  Args:
    scene: the Scene that may be told.
    edit: an Edit of that scene, for texts that tell a change.
    rng: numpy Generator that chooses form and words.
  """
  if rng.random() < 0.5:
    form = _FACTS[rng.integers(len(_FACTS))]
    return form(shapes_scene.split_of(scene.objects), rng)
  form = _TALES[rng.integers(len(_TALES))]
  return form(scene, edit, rng)


def _pick(rng, values):
  return values[int(rng.random() * len(values))]


def _pick_two(rng, values):
  first, second = rng.permutation(len(values))[:2]
  return values[first], values[second]


def _kind_of_word(split, rng):
  """Says "red is a color."."""
  kind = _pick(rng, _KINDS)
  values = {
    "color": tuple(shapes_scene.COLORS),
    "shape": tuple(shapes_text.article(s) for s in shapes_scene.SHAPES),
    "size": shapes_scene.SIZES,
  }[kind]
  return f"{_pick(rng, values)} is a {kind}."


def _what_a_name_says(split, rng):
  """Says "a small red circle is red. it is not large."."""
  color, shape = _pick(rng, shapes_scene.allowed_pairs(split))
  size, other = _pick_two(rng, shapes_scene.SIZES)
  size_word = shapes_text.size_word(size, rng)
  name = shapes_text.article(f"{size_word} {color} {shape}")
  said = _pick(rng, (color, size, shapes_text.article(shape)))
  denied = _pick(rng, [c for c in shapes_scene.COLORS if c != color])
  allowed = split == "never_seen" or not shapes_scene.is_never_seen(
    denied, shape
  )
  denied = _pick(rng, (denied, other)) if allowed else other
  return f"{name} is {said}. it is not {denied}."


def _compare(split, rng):
  """Says "a red circle and a red ring have the same color."."""
  pairs = shapes_scene.allowed_pairs(split)
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
    shapes_text.article(" ".join(p))
    for p in ((color, shape), _pick(rng, others))
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
  here = shapes_text.place_words(f"{row} {column}", rng)
  form = _pick(rng, ("vertical", "horizontal", "opposite"))
  if form == "vertical":
    there = shapes_text.place_words(f"{other_row} {column}", rng)
    return f"the {here} is {'above' if row == 'top' else 'below'} the {there}."
  if form == "horizontal":
    there = shapes_text.place_words(f"{row} {other_column}", rng)
    return f"the {here} is {column} of the {there}."
  there = shapes_text.place_words(f"{other_row} {other_column}", rng)
  return f"the corner opposite the {here} is the {there}."


def _add_up(split, rng):
  """Says "two circles and one ring are three shapes."."""
  del split
  first, second = _pick_two(rng, shapes_scene.SHAPES)
  n, m = (int(x) for x in rng.integers(1, 4, 2))
  total = _NUMBERS[n + m]
  return f"{_some(n, first)} and {_some(m, second)} are {total} shapes."


def _some(count, shape):
  words = shape if count == 1 else shapes_text.plural(shape)
  return f"{_NUMBERS[count]} {words}"


def _tell(scene, edit, rng):
  """Says how many objects there are, then which."""
  del edit
  count = len(scene.objects)
  verb = "is" if count == 1 else "are"
  shapes = "shape" if count == 1 else "shapes"
  words = shapes_text.full_caption(scene, rng)
  return f"there {verb} {_NUMBERS[count]} {shapes}. {words}."


def _ask(scene, edit, rng):
  """Says a caption, a question and its answer."""
  del edit
  kind = _pick(rng, shapes_questions.TYPES)
  question, answer = shapes_questions.question(scene, kind, rng)
  return f"{shapes_text.full_caption(scene, rng)}. {question} {answer}."


def _change(scene, edit, rng):
  """Says a caption, an instruction and the caption of what results."""
  before = shapes_text.full_caption(scene, rng)
  words = shapes_text.instruction(scene, edit, rng)
  after = shapes_text.full_caption(edit.scene)
  return f"{before}. {words}. now {after}."


_FACTS = (_kind_of_word, _what_a_name_says, _compare, _places, _add_up)
_TALES = (_tell, _ask, _change)
