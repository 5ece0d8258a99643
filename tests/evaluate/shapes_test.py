"""The judge, the caption parser and the scores of the shapes world."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lavit_jax.data.shapes import scene as scene_lib
from lavit_jax.data.shapes import text as text_lib
from lavit_jax.data.sources import shapes
from lavit_jax.evaluate import shapes as scores

Object = shapes.Object
CIRCLE = Object("circle", "red", "large", "top left")
RING = Object("ring", "blue", "small", "bottom right")


def judged(source, count, spoil=lambda image, rng: image):
  rng = np.random.default_rng(0)
  true = [source.scene(i).objects for i in range(count)]
  read = [scores.judge(spoil(source.image(i), rng)) for i in range(count)]
  return scores.object_scores(true, read, "judge")


def noisy(image, rng):
  return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype("uint8")


def blurred(image, rng):
  del rng
  drawn = Image.fromarray(image)
  return np.asarray(drawn.filter(ImageFilter.GaussianBlur(1)))


def test_the_judge_reads_two_thousand_clean_drawings():
  source = shapes.ShapesSource("held_out", size=2000, seed=11)
  found = judged(source, 2000)
  assert found["judge_attributes"] >= 0.995
  assert found["judge_exact"] >= 0.995


@pytest.mark.parametrize("spoil", [noisy, blurred])
def test_the_judge_bears_mild_noise_and_blur(spoil):
  source = shapes.ShapesSource("never_seen", size=300, seed=12)
  assert judged(source, 300, spoil)["judge_attributes"] >= 0.99


@pytest.mark.parametrize("size", [32, 64])
def test_the_judge_reads_other_image_sizes(size):
  source = shapes.ShapesSource(size=200, seed=13, image_size=size)
  assert judged(source, 200)["judge_attributes"] >= 0.995


def test_the_judge_sees_nothing_on_empty_grounds_and_in_noise():
  source = shapes.ShapesSource(size=100)
  for i in range(100):
    scene = source.scene(i)
    ground = type(scene)((), scene.background, scene.jitter)
    assert scores.judge(shapes.render(ground)) == []
  rng = np.random.default_rng(0)
  assert scores.judge(rng.integers(0, 256, (48, 48, 3), "uint8")) == []
  assert scores.judge(np.zeros((48, 48, 3), np.uint8)) == []


def test_the_judge_refuses_what_is_no_byte_image():
  with pytest.raises(ValueError, match="uint8"):
    scores.judge(np.zeros((48, 48, 3), np.float32))
  with pytest.raises(ValueError, match="8-bit RGB"):
    scores.judge(np.zeros((48, 48), np.uint8))


@pytest.mark.parametrize("split", scene_lib.SPLITS)
def test_every_full_caption_is_parsed_back(split):
  source = shapes.ShapesSource(split, size=300)
  for i in range(300):
    scene = source.scene(i)
    assert tuple(scores.parse_caption(source.captions(i)[0])) == scene.objects
    for n in range(5):
      words = text_lib.full_caption(scene, np.random.default_rng((i, n)))
      assert set(scores.parse_caption(words)) == set(scene.objects), words


def test_a_partial_caption_leaves_none():
  assert scores.parse_caption("there is a red circle and an orange ring") == [
    Object("circle", "red"),
    Object("ring", "orange"),
  ]
  assert scores.parse_caption("in the upper left a small cross") == [
    Object("cross", None, "small", "top left")
  ]


def test_a_babbling_caption_is_parsed_as_far_as_it_goes():
  text = "a large red circle at the top left a small blue small ring at"
  assert scores.parse_caption(text) == [
    CIRCLE,
    Object(None, "blue", "small"),
    Object("ring", None, "small"),
  ]
  assert scores.parse_caption("") == []
  assert scores.parse_caption("the weather is fine") == []


def test_scores_by_the_definition():
  near = Object("ring", "green", "small", "bottom right")
  assert scores.compare([CIRCLE], [CIRCLE])["attributes"] == 1.0
  assert scores.compare([CIRCLE], [CIRCLE])["exact"] == 1.0
  assert scores.compare([CIRCLE, RING], [near, CIRCLE])["attributes"] == 7 / 8
  assert scores.compare([CIRCLE, RING], [near, CIRCLE])["exact"] == 0.0
  assert scores.compare([CIRCLE, RING], [near, CIRCLE])["color"] == 0.5
  assert scores.compare([CIRCLE, RING], [CIRCLE])["attributes"] == 0.5
  assert scores.compare([CIRCLE], [CIRCLE, RING])["attributes"] == 0.5
  assert scores.compare([CIRCLE], [])["attributes"] == 0.0
  assert scores.compare([CIRCLE], [Object("circle")])["attributes"] == 0.25


def test_matching_is_the_best_of_all_one_to_one_matchings():
  source = shapes.ShapesSource(size=200)
  for i in range(0, 120, 2):
    true = source.scene(i).objects
    other = source.scene(i + 1).objects
    short, long_ = sorted((true, other), key=len)
    best = max(
      sum(
        getattr(a, name) == getattr(b, name)
        for a, b in zip(short, order, strict=True)
        for name in scene_lib.ATTRIBUTES
      )
      for order in itertools.permutations(long_, len(short))
    )
    assert sum(scores.match(true, other).values()) == best


def test_a_very_long_babble_is_scored_in_time():
  found = scores.compare([CIRCLE, RING, CIRCLE], [RING] * 400)
  assert found["attributes"] <= 4 * 3 / (4 * 400)


def test_caption_scores_average_over_images():
  true = [(CIRCLE,), (RING,)]
  captions = ["a big red circle at the top left", "a small ring"]
  found = scores.caption_scores(true, captions)
  assert found["caption_attributes"] == pytest.approx((1 + 0.5) / 2)
  assert found["caption_exact"] == 0.5
  assert found["caption_color"] == 0.5


def test_drawings_matched_to_other_prompts_score_clearly_less():
  source = shapes.ShapesSource("held_out", size=100)
  true = [source.scene(i).objects for i in range(100)]
  images = np.stack([source.image(i) for i in range(100)])
  found = scores.drawing_scores(true, images, "edit")
  assert found["edit_attributes"] == found["edit_exact"] == 1.0
  assert 0.1 < found["edit_attributes_shuffled"] < 0.6


def test_answers_are_compared_in_a_plain_form():
  assert scores.normalize_answer(" The upper Left. And") == "top left"
  assert scores.normalize_answer("at the lower right") == "bottom right"
  assert scores.normalize_answer("big\nQuestion: what") == "large"
  assert scores.normalize_answer("two") == "2"
  assert scores.normalize_answer("a ring") == "ring"


def test_vqa_scores_by_type_with_their_majority_baselines():
  found = scores.vqa_scores(
    ["color", "color", "color", "yes/no"],
    ["red", "red", "blue", "yes"],
    ["Red.", "blue", "blue", "no"],
  )
  assert found["vqa_accuracy"] == 0.5
  assert found["vqa_majority"] == 0.75
  assert found["vqa_accuracy_color"] == pytest.approx(2 / 3)
  assert found["vqa_majority_color"] == pytest.approx(2 / 3)
  assert found["vqa_accuracy_yes_no"] == 0.0


def test_scoring_refuses_lists_that_do_not_pair():
  with pytest.raises(ValueError, match="equally many"):
    scores.caption_scores([(CIRCLE,)], [])
  with pytest.raises(ValueError, match="at least one"):
    scores.vqa_scores([], [], [])
