"""Scores captions, generated images and answers on the shapes world.

Captions are parsed back to objects, and generated images are read by the judge.
Both are then compared with the objects of the scene in the same way.
"""

import collections
import functools
import re
from collections.abc import Sequence

import numpy as np

from lavit_jax.data.shapes import scene
from lavit_jax.data.shapes import text as text_lib
from lavit_jax.evaluate import shapes_judge

judge = shapes_judge.judge

Objects = Sequence[scene.Object]

_MAX_OBJECTS = 12  # matched objects of a long text; the rest is only counted
_NUMBERS = {"zero": "0", "none": "0", "one": "1", "two": "2", "three": "3"}


def parse_caption(text: str) -> list[scene.Object]:
  """Parses a caption to objects; attributes that it does not name are None.

  Understands every wording of `shapes.text`, and skips unknown words. "a red
  circle" gives [Object("circle", "red", None, None)].
  """
  objects: list[scene.Object] = []
  for clause in re.split(r"[,;.?!\n]|\band\b", text.lower()):
    objects.extend(_parse_clause(clause))
  return objects


def _parse_clause(clause):
  """Returns the objects of a clause; a repeated attribute starts a new one."""
  found: list[dict[str, str]] = [{}]
  row = None
  for word in re.findall(r"[a-z]+", clause):
    kind, value = _meanings().get(word, (None, None))
    if kind == "row":
      row = value
      continue
    if kind == "column":
      if row is None:
        continue
      kind, value, row = "place", f"{row} {value}", None  # a field of Object
    if kind is None:
      continue
    if kind in found[-1]:
      found.append({})
    found[-1][kind] = value
  return [scene.Object(**fields) for fields in found if fields]


@functools.cache
def _meanings():
  """Returns (attribute, value) for every word of the grammar with one."""
  table = {"left": ("column", "left"), "right": ("column", "right")}
  table |= {color: ("color", color) for color in scene.COLORS}
  table |= {shape: ("shape", shape) for shape in scene.SHAPES}
  for size, words in text_lib.SIZE_WORDS.items():
    table |= {word: ("size", size) for word, _ in words}
  for row, words in text_lib.ROW_WORDS.items():
    table |= {word: ("row", row) for word, _ in words}
  return table


def match(true: Objects, predicted: Objects) -> dict[str, int]:
  """Counts right attributes under the best one-to-one matching of objects.

  Returns:
    For each attribute the number of right values, in the matching with the
    highest sum. A None is never right.
  """
  predicted = list(predicted)[:_MAX_OBJECTS]
  # Set of matched predictions -> counts of right attributes.
  best: dict[frozenset[int], collections.Counter[str]] = {
    frozenset(): collections.Counter()
  }
  for obj in true:
    extended = dict(best)  # obj may stay unmatched
    for used, counts in best.items():
      for n, other in enumerate(predicted):
        if n in used:
          continue
        total = counts + _right_attributes(obj, other)
        key = used | {n}
        if total.total() > extended.get(key, collections.Counter()).total():
          extended[key] = total
    best = extended
  highest = max(best.values(), key=lambda counter: counter.total())
  return {name: highest[name] for name in scene.ATTRIBUTES}


def _right_attributes(obj, other):
  return collections.Counter(
    name
    for name in scene.ATTRIBUTES
    if getattr(obj, name) is not None
    and getattr(obj, name) == getattr(other, name)
  )


def compare(true: Objects, predicted: Objects) -> dict[str, float]:
  """Scores one image.

  Returns:
    "attributes": right / (4 * max(true, predicted)), a share; "exact": 1.0 or
    0.0; and for each attribute its share right / max(true, predicted).
  """
  count = max(len(true), len(predicted))
  if not count:  # neither has objects
    names = ("attributes", "exact", *scene.ATTRIBUTES)
    return dict.fromkeys(names, 1.0)
  right = match(true, predicted)
  shares = {name: n / count for name, n in right.items()}
  total = sum(right.values()) / (len(scene.ATTRIBUTES) * count)
  return {"attributes": total, "exact": float(total == 1.0)} | shares


def object_scores(
  true: Sequence[Objects], predicted: Sequence[Objects], prefix: str
) -> dict[str, float]:
  """Returns means of `compare` over images, as {f"{prefix}_{name}": float}.

  Args:
    true: the objects of each image.
    predicted: the same, in the same order.
    prefix: the task: "caption", "t2i", "edit".

  Raises:
    ValueError: the numbers of images differ, or there are none.
  """
  _check_lengths(true, predicted, "object lists")
  rows = [compare(t, p) for t, p in zip(true, predicted, strict=True)]
  return {
    f"{prefix}_{name}": float(np.mean([row[name] for row in rows]))
    for name in rows[0]
  }


def caption_scores(
  true: Sequence[Objects], captions: Sequence[str], prefix: str = "caption"
) -> dict[str, float]:
  """Scores captions against the objects of their images."""
  return object_scores(true, [parse_caption(c) for c in captions], prefix)


def drawing_scores(
  true: Sequence[Objects], images: Sequence[np.ndarray], prefix: str = "t2i"
) -> dict[str, float]:
  """Scores generated images uint8[H, W, 3] against the requested objects.

  `{prefix}_attributes_shuffled` is the score of the same images with the next
  prompt: the score of a model that ignores its prompts.
  """
  predicted = [judge(image) for image in images]
  scores = object_scores(true, predicted, prefix)
  shifted = [*predicted[1:], *predicted[:1]]
  shuffled = object_scores(true, shifted, prefix)[f"{prefix}_attributes"]
  return scores | {f"{prefix}_attributes_shuffled": shuffled}


def normalize_answer(text: str) -> str:
  """Returns an answer in a normal form: " The Upper left." -> "top left"."""
  text = re.split(r"[\n.,;!?]|question:", text.strip().lower())[0]
  words = [w for w in re.findall(r"[a-z0-9]+", text) if w not in _FILLERS]
  plain = []
  for word in words:
    kind, value = _meanings().get(word, (None, word))
    del kind
    plain.append(_NUMBERS.get(word, value))
  return " ".join(plain)


_FILLERS = frozenset(("a", "an", "the", "at", "in", "on", "is", "it"))


def vqa_scores(
  kinds: Sequence[str],
  answers: Sequence[str],
  predictions: Sequence[str],
  prefix: str = "vqa",
) -> dict[str, float]:
  """Returns the accuracy of answers, total and by type, and of a baseline.

  The baseline gives each question the most common right answer of its type
  among these same questions, which a real guesser cannot know.

  Args:
    kinds: type of each question, of `questions.TYPES`.
    answers: the right answers.
    predictions: the answers of the model, in any wording.
    prefix: start of every key of the result.

  Raises:
    ValueError: the lengths differ, or there are no answers.
  """
  _check_lengths(answers, predictions, "answers")
  _check_lengths(answers, kinds, "answers and types")
  right = collections.defaultdict(list)
  expected = collections.defaultdict(list)
  for kind, answer, prediction in zip(kinds, answers, predictions, strict=True):
    answer = normalize_answer(answer)
    right[kind].append(answer == normalize_answer(prediction))
    expected[kind].append(answer)
  most_common = {
    kind: collections.Counter(texts).most_common(1)[0][1]
    for kind, texts in expected.items()
  }
  scores = {
    f"{prefix}_accuracy": float(np.mean(np.concatenate(list(right.values())))),
    f"{prefix}_majority": sum(most_common.values()) / len(answers),
  }
  for kind in sorted(right):
    name = kind.replace("/", "_")
    scores[f"{prefix}_accuracy_{name}"] = float(np.mean(right[kind]))
    share = most_common[kind] / len(expected[kind])
    scores[f"{prefix}_majority_{name}"] = share
  return scores


def _check_lengths(true, predicted, what):
  if len(true) != len(predicted) or not len(true):
    raise ValueError(
      f"{len(true)} and {len(predicted)} {what} to compare: there must be"
      " equally many of both, and at least one."
    )
