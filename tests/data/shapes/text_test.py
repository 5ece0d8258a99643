"""Texts of the shapes world are true, unambiguous and varied."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from lavit_jax.data.shapes import questions
from lavit_jax.data.shapes import scene as scene_lib
from lavit_jax.data.shapes import text as text_lib
from lavit_jax.data.sources import shapes
from lavit_jax.evaluate import shapes as scores

SOURCE = shapes.ShapesSource(size=600)


def rng(i):
  return np.random.default_rng(i)


def scene_of(*objects):
  return dataclasses.replace(SOURCE.scene(0), objects=objects)


RED_CIRCLE = shapes.Object("circle", "red", "large", "top left")
RED_RING = shapes.Object("ring", "red", "small", "top right")


def test_the_plain_caption_of_a_scene():
  assert text_lib.full_caption(scene_of(RED_CIRCLE, RED_RING)) == (
    "a large red circle at the top left and a small red ring at the top right"
  )


def test_most_training_captions_state_everything_and_the_rest_omit():
  stated = collections.Counter()
  for i in range(1500):
    scene = SOURCE.scene(i % 600)
    objects = scores.parse_caption(text_lib.caption(scene, rng(i)))
    assert len(objects) == len(scene.objects)
    stated[
      tuple(a for a in scene_lib.ATTRIBUTES if getattr(objects[0], a))
    ] += 1
  assert stated[scene_lib.ATTRIBUTES] / 1500 == pytest.approx(
    text_lib.FULL_SHARE, abs=0.04
  )
  assert text_lib.FULL_SHARE >= 0.7
  assert len(stated) == len(text_lib.OMISSIONS)


def test_one_scene_is_worded_in_many_ways():
  scene = next(s for i in range(9) if len((s := SOURCE.scene(i)).objects) == 3)
  worded = {text_lib.full_caption(scene, rng(i)) for i in range(200)}
  assert len(worded) > 80


def test_a_name_identifies_its_object():
  scene = scene_of(RED_CIRCLE, RED_RING)
  names = text_lib.names(scene, RED_CIRCLE)
  assert ("shape",) in names
  assert ("color",) not in names
  assert text_lib.names(scene, RED_CIRCLE, hidden=("shape",))[0] == ("size",)


def test_an_instruction_names_one_object_by_attributes():
  for i in range(600):
    scene, edit = SOURCE.scene(i), SOURCE.edit(i)
    for words in (
      text_lib.instruction(scene, edit),
      text_lib.instruction(scene, edit, rng(i)),
    ):
      named = words.replace(f" to the {edit.value}", "").split(" to ")[0]
      named = re.split(r" with | into ", named)[0]
      said = scores.parse_caption(named)[0]
      stated = [a for a in scene_lib.ATTRIBUTES if getattr(said, a)]
      if edit.kind in stated and edit.kind != "shape":
        # "make the red circle blue": the first value is the subject's.
        assert getattr(said, edit.kind) in (
          getattr(edit.subject, edit.kind),
          edit.value,
        )
        stated.remove(edit.kind)
      assert "shape" in stated
      for attribute in stated:
        assert getattr(said, attribute) == getattr(edit.subject, attribute)


def _edits(scene):
  """Every edit of a scene."""
  return [
    scene_lib._to_edit(scene, result)
    for kind in scene_lib.EDITS
    for result in scene_lib._edits_of_kind(scene.objects, kind)
  ]


def test_instructions_read_like_this():
  scene = scene_of(RED_CIRCLE, RED_RING)
  instructions = {
    edit.kind: text_lib.instruction(scene, edit)
    for edit in _edits(scene)
    if edit.subject == RED_RING
  }
  assert instructions["remove"] == "remove the small red ring"
  assert instructions["size"] == "make the small red ring large"
  assert instructions["place"].startswith("move the small red ring to the ")


def answer(scene, question):
  """Answers a question by reading its words: an independent second opinion."""
  text = question.rstrip("?")
  for row in ("upper", "top"), ("lower", "bottom"):
    text = text.replace(*row)
  text = text.replace("big", "large").replace("little", "small")
  words = text.split()

  def select(words):
    found = list(scene.objects)
    for kind in scene_lib.ATTRIBUTES[:3]:
      said = [w for w in words if w in {getattr(o, kind) for o in ALL}]
      found = [o for o in found if all(getattr(o, kind) == w for w in said)]
    for place in scene_lib.PLACES:
      if place in " ".join(words):
        found = [o for o in found if o.place == place]
    return found

  if text.startswith("how many"):
    words = [w[:-1] if w[:-1] in scene_lib.SHAPES else w for w in words]
    words = ["cross" if w == "crosses" else w for w in words]
    sides = ("top", "bottom", "left", "right")
    side = words[-1] if words[-1] in sides else ""
    return str(sum(side in o.place for o in select(words)))
  if text.startswith("is there"):
    return "yes" if select(words) else "no"
  if text.endswith("large or small"):
    (obj,) = select(words[:-3])
    return obj.size
  if text.startswith("is the"):
    # The statement is the last attribute; the rest singles an object out.
    cut = -4 if words[-4:-2] == ["at", "the"] else -1
    if cut == -4 and len(select(words[1:-4])) != 1:
      cut = -1
    if words[-1] in ("left", "right"):
      cut = -4
    (obj,) = select(words[1:cut])
    return "yes" if obj in select(words[cut:]) else "no"
  (obj,) = select(words)
  if text.startswith("wh") and "where" not in text:
    kind = next(k for k in ("color", "shape", "size") if k in words[1])
    return getattr(obj, kind)
  return obj.place


ALL = [
  shapes.Object(shape, color, size, place)
  for shape in scene_lib.SHAPES
  for color in scene_lib.COLORS
  for size in scene_lib.SIZES
  for place in scene_lib.PLACES
]


def test_every_answer_is_right():
  for i in range(600):
    scene = SOURCE.scene(i)
    for kind, question, right in questions.questions(scene, rng(i)):
      assert answer(scene, question) == right, (kind, question, scene.objects)


def test_answers_cannot_be_guessed():
  counts = collections.defaultdict(collections.Counter)
  for i in range(600):
    for n in range(3):
      for kind, _, right in questions.questions(SOURCE.scene(i), rng((i, n))):
        counts[kind][right] += 1
  limits = {"color": 0.2, "shape": 0.25, "size": 0.55, "place": 0.32}
  limits |= {"count": 0.45, "yes/no": 0.54}
  for kind, answers in counts.items():
    assert max(answers.values()) / answers.total() < limits[kind], kind
  assert len(counts["color"]) == 8
  assert len(counts["count"]) == 4


def test_an_unknown_type_of_question_is_refused():
  with pytest.raises(ValueError, match="yes/no"):
    questions.question(SOURCE.scene(0), "smell", rng(0))


def test_sentences_add_up_and_compare_truly():
  numbers = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
  sums = comparisons = 0
  for i in range(SOURCE.num_examples("text")):
    text = SOURCE.sentences(i)
    assert text.endswith(".")
    if hit := re.fullmatch(r"(\w+) \w+ and (\w+) \w+ are (\w+) shapes.", text):
      one, two, three = (numbers[w] for w in hit.groups())
      assert one + two == three
      sums += 1
    if " have " in text:
      first, second = scores.parse_caption(text)
      kind = "color" if "color" in text else "shape"
      alike = getattr(first, kind) == getattr(second, kind)
      assert alike == ("same" in text)
      comparisons += 1
  assert min(sums, comparisons) > 100


def test_sentences_about_a_change_state_its_result():
  checked = 0
  for i in range(SOURCE.num_examples("text")):
    text = SOURCE.sentences(i)
    if ". now " not in text:
      continue
    scene = SOURCE.scene(i % SOURCE.size)
    before, after = text.split(". ")[0], text.split(". now ")[1]
    assert set(scores.parse_caption(before)) == set(scene.objects)
    after = set(scores.parse_caption(after))
    assert after == set(SOURCE.edit(i % SOURCE.size).scene.objects)
    checked += 1
  assert checked > 100
