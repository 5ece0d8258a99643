"""Scores on the shapes world: captions, drawings and answers.

Captions are parsed back to objects and drawings are read by the judge; then
both are compared with the objects of the scene in the same way.
"""

import collections
import functools
import re

import numpy as np

from lavit_jax.data.shapes import scene
from lavit_jax.data.shapes import text as text_lib
from lavit_jax.evaluate import shapes_judge

judge = shapes_judge.judge

_MAX_OBJECTS = 12  # of a parsed text; the rest of a babble only counts
_NUMBERS = {"zero": "0", "none": "0", "one": "1", "two": "2", "three": "3"}


def parse_caption(text):
  """Reads a caption back to a list of Object; what it leaves out is None.

  Understands every wording of shapes_text; words it does not know are passed
  over. "a red circle" -> [Object("circle", "red", None, None)].
  """
  objects = []
  for clause in re.split(r"[,;.?!\n]|\band\b", text.lower()):
    objects.extend(_parse_clause(clause))
  return objects


def _parse_clause(clause):
  """Objects of one clause; a second value of a kind starts another object."""
  found, row = [{}], None
  for word in re.findall(r"[a-z]+", clause):
    kind, value = _meanings().get(word, (None, None))
    if kind == "row":
      row = value
      continue
    if kind == "column":
      if row is None:
        continue
      kind, value, row = "place", f"{row} {value}", None
    if kind is None:
      continue
    if kind in found[-1]:
      found.append({})
    found[-1][kind] = value
  return [scene.Object(**fields) for fields in found if fields]


@functools.cache
def _meanings():
  """Word -> (kind, value), for every word of the grammar that means one."""
  table = {"left": ("column", "left"), "right": ("column", "right")}
  table |= {color: ("color", color) for color in scene.COLORS}
  table |= {shape: ("shape", shape) for shape in scene.SHAPES}
  for size, words in text_lib.SIZE_WORDS.items():
    table |= {word: ("size", size) for word, _ in words}
  for row, words in text_lib.ROW_WORDS.items():
    table |= {word: ("row", row) for word, _ in words}
  return table


def match(true, predicted):
  """Right attributes under the best one-to-one matching of objects.

  Returns a dict attribute -> number right, of the matching whose sum is
  highest. A None never counts as right.
  """
  predicted = list(predicted)[:_MAX_OBJECTS]
  best = {frozenset(): collections.Counter()}  # predictions used -> right
  for obj in true:
    grown = dict(best)  # obj may stay unmatched
    for used, right in best.items():
      for n, other in enumerate(predicted):
        if n in used:
          continue
        more = right + _right(obj, other)
        key = used | {n}
        if more.total() > grown.get(key, collections.Counter()).total():
          grown[key] = more
    best = grown
  right = max(best.values(), key=lambda counter: counter.total())
  return {name: right[name] for name in scene.ATTRIBUTES}


def _right(obj, other):
  return collections.Counter(
    name
    for name in scene.ATTRIBUTES
    if getattr(obj, name) is not None
    and getattr(obj, name) == getattr(other, name)
  )


def compare(true, predicted):
  """Scores of one image: {"attributes", "exact", one for each attribute}.

  attributes = right / (4 * max(true, predicted)), a share; each attribute's
  own share is right / max(true, predicted); exact is 1.0 or 0.0.
  """
  count = max(len(true), len(predicted))
  if not count:  # nothing there, nothing seen
    names = ("attributes", "exact", *scene.ATTRIBUTES)
    return dict.fromkeys(names, 1.0)
  right = match(true, predicted)
  shares = {name: n / count for name, n in right.items()}
  total = sum(right.values()) / (len(scene.ATTRIBUTES) * count)
  return {"attributes": total, "exact": float(total == 1.0)} | shares


def object_scores(true, predicted, prefix):
  """Means of `compare` over images, as {f"{prefix}_{name}": float}.

  Args:
    true: a sequence of object sequences, one an image.
    predicted: the same number of object sequences, in the same order.
    prefix: what was made: "caption", "t2i", "edit".
  """
  _check_lengths(true, predicted, "object lists")
  rows = [compare(t, p) for t, p in zip(true, predicted, strict=True)]
  return {
    f"{prefix}_{name}": float(np.mean([row[name] for row in rows]))
    for name in rows[0]
  }


def caption_scores(true, captions, prefix="caption"):
  """Scores of list[str] captions against the objects of their images."""
  return object_scores(true, [parse_caption(c) for c in captions], prefix)


def drawing_scores(true, images, prefix="t2i"):
  """Scores of uint8[B, H, W, 3] drawings against what was asked for.

  `{prefix}_attributes_shuffled` is the score of the same drawings matched to
  the next prompt: what drawing scenes without reading would give.
  """
  predicted = [judge(image) for image in images]
  scores = object_scores(true, predicted, prefix)
  shifted = [*predicted[1:], *predicted[:1]]
  shuffled = object_scores(true, shifted, prefix)[f"{prefix}_attributes"]
  return scores | {f"{prefix}_attributes_shuffled": shuffled}


def normalize_answer(text):
  """The answer in a plain form: " The Upper left." -> "top left"."""
  text = re.split(r"[\n.,;!?]|question:", text.strip().lower())[0]
  words = [w for w in re.findall(r"[a-z0-9]+", text) if w not in _FILLERS]
  plain = []
  for word in words:
    kind, value = _meanings().get(word, (None, word))
    del kind
    plain.append(_NUMBERS.get(word, value))
  return " ".join(plain)


_FILLERS = frozenset(("a", "an", "the", "at", "in", "on", "is", "it"))


def vqa_scores(kinds, answers, predictions, prefix="vqa"):
  """Accuracy of answers, in all and by type, beside what guessing gives.

  The baseline answers each question with the commonest right answer of its
  type among these very questions, which no real guesser can know.

  Args:
    kinds: type of each question (shapes_questions.TYPES).
    answers: the right answers.
    predictions: the given answers, any wording.
    prefix: start of every key of the result.
  """
  _check_lengths(answers, predictions, "answers")
  _check_lengths(answers, kinds, "answers and types")
  right = collections.defaultdict(list)
  wanted = collections.defaultdict(list)
  for kind, answer, given in zip(kinds, answers, predictions, strict=True):
    answer = normalize_answer(answer)
    right[kind].append(answer == normalize_answer(given))
    wanted[kind].append(answer)
  common = {
    kind: collections.Counter(all_).most_common(1)[0][1]
    for kind, all_ in wanted.items()
  }
  scores = {
    f"{prefix}_accuracy": float(np.mean(np.concatenate(list(right.values())))),
    f"{prefix}_majority": sum(common.values()) / len(answers),
  }
  for kind in sorted(right):
    name = kind.replace("/", "_")
    scores[f"{prefix}_accuracy_{name}"] = float(np.mean(right[kind]))
    scores[f"{prefix}_majority_{name}"] = common[kind] / len(wanted[kind])
  return scores


def _check_lengths(true, predicted, what):
  if len(true) != len(predicted) or not len(true):
    raise ValueError(
      f"{len(true)} and {len(predicted)} {what} were given to be compared: the"
      " two must be equally many and at least one."
    )
