"""The grammar of the shapes world: captions, edits and plain sentences.

Every text is true of its scene. Lower case, no full stop inside a caption (a
caption ends where the first sentence ends). Questions: shapes_questions.py.
"""

from lavit_jax.data.shapes import scene as scene_lib

# Words for one meaning, with how often each is chosen.
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
OPENINGS = (("", 0.7), ("there is ", 0.15), ("an image of ", 0.15))
# What a caption leaves out: nothing in FULL_SHARE of the training captions.
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


def choose(rng, weighted):
  """Draws a value from ((value, weight), ...); rng None: the first."""
  if rng is None:
    return weighted[0][0]
  u = rng.random() * sum(weight for _, weight in weighted)
  for value, weight in weighted:
    u -= weight
    if u < 0:
      return value
  return weighted[-1][0]  # rounding ate the last of u


def article(words):
  """Puts a or an before words: "orange ring" -> "an orange ring"."""
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape):
  """More than one of a shape: "cross" -> "crosses"."""
  return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def size_word(size, rng=None):
  """One of the words for a size."""
  return choose(rng, SIZE_WORDS[size])


def place_words(place, rng=None):
  """One of the wordings of a place: "upper left" for "top left", say."""
  row, column = place.split(" ")
  return f"{choose(rng, ROW_WORDS[row])} {column}"


def noun(obj, attributes=scene_lib.ATTRIBUTES, rng=None):
  """Size, colour, shape of an Object without article: "large red circle".

  Only the named attributes are told; without the shape it is a "shape". The
  place is never told here.
  """
  words = []
  if "size" in attributes:
    words.append(size_word(obj.size, rng))
  if "color" in attributes:
    words.append(obj.color)
  words.append(obj.shape if "shape" in attributes else "shape")
  return " ".join(words)


def full_caption(scene, rng=None):
  """All four attributes of every object; rng None: the one plain wording.

  The plain wording, in raster order, is what evaluation uses:
  "a large red circle at the top left and a small blue ring at the top right".
  """
  return _caption(scene, (), rng)


def caption(scene, rng):
  """A caption in any wording; FULL_SHARE of them tell all attributes."""
  return _caption(scene, choose(rng, OMISSIONS), rng)


def _caption(scene, omitted, rng):
  """Words for a scene without the attributes in `omitted`."""
  told = [a for a in scene_lib.ATTRIBUTES if a not in omitted]
  objects = list(scene.objects)
  if rng is not None and rng.random() < 0.4:
    rng.shuffle(objects)
  form = choose(rng, CAPTION_FORMS) if "place" in told else "after"
  # One choice a caption keeps a caption even in style.
  at = choose(rng, PLACE_FORMS)
  clauses = [_clause(obj, told, form, at, rng) for obj in objects]
  if form == "label":
    return "; ".join(clauses)
  opening = choose(rng, OPENINGS) if form == "after" else ""
  return opening + enumerate_words(clauses)


def _clause(obj, told, form, at, rng):
  words = article(noun(obj, told, rng))
  if "place" not in told:
    return words
  place = place_words(obj.place, rng)
  if form == "label":
    return f"{place}: {words}"
  if form == "before":
    return f"{at.format(place)} {words}"
  return f"{words} {at.format(place)}"


def enumerate_words(items):
  """Joins with commas and "and": [a, b, c] -> "a, b and c"."""
  if len(items) == 1:
    return items[0]
  return f"{', '.join(items[:-1])} and {items[-1]}"


def names(scene, obj, hidden=()):
  """Every set of attributes that singles `obj` out in its scene.

  Attributes in `hidden` are not used. Shortest first; each a tuple in the
  order of shapes_scene.ATTRIBUTES.
  """
  usable = [a for a in scene_lib.ATTRIBUTES if a not in hidden]
  found = []
  for bits in range(1, 2 ** len(usable)):
    chosen = tuple(a for n, a in enumerate(usable) if bits >> n & 1)
    same = [
      other
      for other in scene.objects
      if all(getattr(other, a) == getattr(obj, a) for a in chosen)
    ]
    if len(same) == 1:
      found.append(chosen)
  return sorted(found, key=len)


def definite(obj, attributes, rng=None):
  """An object told by some attributes: "the large circle at the top left"."""
  words = f"the {noun(obj, attributes, rng)}"
  if "place" in attributes:
    words += f" at the {place_words(obj.place, rng)}"
  return words


def instruction(scene, edit, rng=None):
  """The words of an Edit of `scene`: "make the red circle small".

  Names its subject by attributes that single it out; rng None: the shape,
  colour and size in the first wording.
  """
  subject = edit.subject
  told = ("size", "color", "shape")
  if rng is not None:
    hidden = ("place",) if edit.kind == "place" else ()
    ways = names(scene, subject, hidden)
    ways = [way for way in ways if len(way) > 1 and "shape" in way]
    told = ways[rng.integers(len(ways))]
  forms = EDIT_FORMS[edit.kind]
  form = forms[0] if rng is None else forms[rng.integers(len(forms))]
  value = edit.value
  if edit.kind == "shape":
    value = article(value)
  elif edit.kind == "size":
    value = size_word(value, rng)
  elif edit.kind == "place":
    value = place_words(value, rng)
  return form.format(definite(subject, told, rng), value)
