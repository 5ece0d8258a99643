"""The shapes world: determinism, splits, drawing, source protocol."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import pickle
import re
import time

import numpy as np
import pytest

from lavit_jax.data import examples
from lavit_jax.data.shapes import questions, render
from lavit_jax.data.shapes import scene as scene_lib
from lavit_jax.data.sources import shapes

PAIR = re.compile(
  rf"({'|'.join(scene_lib.COLORS)}) ({'|'.join(scene_lib.SHAPES)})"
)


def make(split="train", size=300, **kwargs):
  return shapes.ShapesSource(split=split, size=size, **kwargs)


def all_texts(source, count):
  """`count` examples of every task as text, and the captions."""
  for task in source.tasks():
    step = max(source.num_examples(task) // count, 1)
    for i in range(0, source.num_examples(task), step):
      for part in source.example(task, i).parts:
        if isinstance(part, examples.TextPart):
          yield part.text
  for i in range(count):
    yield from source.captions(i)


def test_same_index_gives_the_same_image_and_words_in_another_order():
  first, second = make(), make()
  images = [first.image(i) for i in range(10)]
  scene_lib.sample.cache_clear()
  for i in reversed(range(10)):
    np.testing.assert_array_equal(second.image(i), images[i])
    for task in first.tasks():
      assert first.example(task, i) == second.example(task, i)


def test_seed_and_split_change_the_scenes():
  scenes = [make().scene(i) for i in range(20)]
  assert scenes != [make(seed=1).scene(i) for i in range(20)]
  assert scenes != [make("held_out").scene(i) for i in range(20)]


@pytest.mark.parametrize(
  ("split", "digest"),
  [
    ("train", "2098dacfadc4cf9e"),
    ("held_out", "70776ccc3e8476b9"),
    ("never_seen", "90aa7866d9d5fd0d"),
  ],
)
def test_texts_never_change(split, digest):
  """Models on disk, the shipped one too, were trained on these texts."""
  source, found = make(split, size=50), hashlib.sha256()
  for task in source.tasks():
    for i in range(source.num_examples(task)):
      found.update(repr(source.example(task, i)).encode())
  for i in range(source.num_images):
    texts = source.captions(i), source.questions(i)
    found.update(repr(texts).encode())
  assert found.hexdigest()[:16] == digest


def test_scenes_of_a_known_index_never_change():
  # Weights and caches on disk were made from these scenes.
  scene = make().scene(3)
  assert scene.objects == (
    shapes.Object("circle", "pink", "large", "top left"),
    shapes.Object("ring", "purple", "small", "top right"),
    shapes.Object("ring", "yellow", "small", "bottom right"),
  )
  total = int(make().image(3).astype(int).sum())
  assert total == pytest.approx(1116110, abs=50)  # sines may round


@pytest.mark.parametrize("split", scene_lib.SPLITS)
def test_scenes_and_edits_stay_in_their_split(split):
  source = make(split)
  for i in range(source.num_images):
    assert scene_lib.split_of(source.scene(i).objects) == split


def test_held_out_scenes_are_the_stated_share_and_disjoint_from_train():
  train, held = make(size=1500), make("held_out", size=400)
  seen = {train.scene(i).objects for i in range(train.num_images)}
  assert not seen & {held.scene(i).objects for i in range(held.num_images)}
  rng = np.random.default_rng(0)
  found = collections.Counter()
  while found.total() < 4000:
    objects = scene_lib._sample_objects(rng, "train")
    found[scene_lib.split_of(objects)] += 1
  share = found["held_out"] / (found["held_out"] + found["train"])
  assert share == pytest.approx(scene_lib.HELD_OUT_SHARE, abs=0.03)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_never_seen_pairs_are_in_no_text_of_the_other_splits(split):
  named = collections.Counter()
  for text in all_texts(make(split), 300):
    named.update(PAIR.findall(text))
  assert not set(named) & scene_lib.NEVER_SEEN_PAIRS
  assert set(named) == set(scene_lib.allowed_pairs(split))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_no_question_asks_whether_a_shape_has_a_never_seen_color(split):
  source = make(split)
  asked = re.compile(r"is the .*?(\w+)(?: at the \w+ \w+)? (?:an? )?(\w+)\?")
  checked = 0
  for n in range(5, source.num_examples("vqa") // source.size, 6):
    for i in range(source.size):
      example = source.example("vqa", n * source.size + i)
      for part in example.parts[1::2]:
        if hit := asked.search(part.text):
          pair = tuple(hit.groups())
          checked += 1
          assert pair not in scene_lib.NEVER_SEEN_PAIRS
          assert pair[::-1] not in scene_lib.NEVER_SEEN_PAIRS
  assert checked > 50


def test_never_seen_scenes_each_show_a_never_seen_pair():
  source = make("never_seen")
  shown = set()
  for i in range(source.num_images):
    pairs = {(o.color, o.shape) for o in source.scene(i).objects}
    assert pairs & scene_lib.NEVER_SEEN_PAIRS
    shown |= pairs & scene_lib.NEVER_SEEN_PAIRS
  assert shown == scene_lib.NEVER_SEEN_PAIRS


def test_every_color_and_shape_of_the_never_seen_pairs_is_trained_on():
  pairs = scene_lib.allowed_pairs("train")
  assert len(pairs) == 48 - len(scene_lib.NEVER_SEEN_PAIRS) == 42
  assert min(collections.Counter(c for c, _ in pairs).values()) >= 5
  assert min(collections.Counter(s for _, s in pairs).values()) >= 7


def test_scenes_have_one_to_three_objects_one_a_place_and_no_twins():
  source, counts = make(size=600), collections.Counter()
  for i in range(source.num_images):
    objects = source.scene(i).objects
    counts[len(objects)] += i < source.size
    assert len({o.place for o in objects}) == len(objects)
    looks = {dataclasses.replace(o, place=None) for o in objects}
    assert len(looks) == len(objects)
  assert set(counts) - {0} == {1, 2, 3}
  assert min(counts[n] for n in (1, 2, 3)) > 0.2 * source.size


def test_an_edit_changes_one_thing_and_keeps_the_ground():
  source, kinds = make(size=400), collections.Counter()
  for i in range(source.size):
    before, edit = source.scene(i), source.edit(i)
    kinds[edit.kind] += 1
    assert edit.scene == source.scene(source.size + i)
    assert edit.scene.background == before.background
    assert edit.scene.jitter == before.jitter
    rest = set(before.objects) - {edit.subject}
    assert len(rest) == len(before.objects) - 1
    new = set(edit.scene.objects) - rest
    if edit.kind == "remove":
      assert not new
    else:
      changed = dataclasses.replace(edit.subject, **{edit.kind: edit.value})
      assert new == {changed} != {edit.subject}
  assert min(kinds[k] for k in scene_lib.EDITS) > 30


def test_rendering_takes_half_a_millisecond_at_most():
  scenes = [make().scene(i) for i in range(300)]
  for scene in scenes:
    shapes.render(scene)  # fills the sprite cache
  best = np.inf
  for _ in range(5):
    start = time.process_time()
    for scene in scenes:
      shapes.render(scene)
    best = min(best, time.process_time() - start)
  assert best / len(scenes) <= 0.5e-3


@pytest.mark.parametrize("size", [32, 48, 64])
def test_objects_are_drawn_in_their_color_and_only_in_their_quadrant(size):
  source = make(image_size=size)
  for i in range(60):
    scene = source.scene(i)
    image = source.image(i).astype(int)
    empty = dataclasses.replace(scene, objects=())
    changed = (image != shapes.render(empty, size)).any(-1)
    half = size // 2
    for n, place in enumerate(scene_lib.PLACES):
      y, x = n // 2 * half, n % 2 * half
      here = [o for o in scene.objects if o.place == place]
      window = image[y : y + half, x : x + half].reshape(-1, 3)
      assert changed[y : y + half, x : x + half].any() == bool(here)
      if here:
        color = scene_lib.COLORS[here[0].color]
        assert np.abs(window - color).sum(-1).min() <= 3


def test_large_objects_are_clearly_larger_than_small_ones():
  for shape in scene_lib.SHAPES:
    areas = [
      render.sprite(shape, render.EXTENTS[s] * 24, 0, 0).sum()
      for s in ("large", "small")
    ]
    assert areas[0] > 2.5 * areas[1] > 100


def test_edges_are_antialiased():
  alpha = render.sprite("circle", 19.0, 0, 0)
  assert len(np.unique(alpha)) > 6
  assert alpha.sum() == pytest.approx(np.pi * 9.5**2, rel=0.01)


def test_object_shares_add_up_to_the_mask():
  source = make()
  for i in range(20):
    scene = source.scene(i)
    mask = shapes.object_mask(scene, 48)
    shares = shapes.object_shares(scene, 48, 8)
    assert shares.shape == (36,)
    assert mask.sum() == pytest.approx(shares.sum() * 64)
    assert shares[7] == pytest.approx(mask[8:16, 8:16].mean())


def test_a_pickled_source_is_small_and_the_same():
  source = make("held_out", 50, image_size=32, seed=4)
  data = pickle.dumps(source)
  assert len(data) < 300
  np.testing.assert_array_equal(pickle.loads(data).image(7), source.image(7))


def test_threads_draw_the_same_images():
  source = make(size=64)
  expected = [source.image(i) for i in range(128)]
  scene_lib.sample.cache_clear()
  render.sprite.cache_clear()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for image, right in zip(
      pool.map(source.image, range(128)), expected, strict=True
    ):
      np.testing.assert_array_equal(image, right)


def test_the_source_follows_the_protocol_and_names_its_images():
  source = make(size=20)
  assert isinstance(source, examples.Source)
  keys = [source.image_key(i) for i in range(source.num_images)]
  assert len(set(keys)) == source.num_images == 40
  assert source.image(39).shape == (48, 48, 3)
  assert source.image(39).dtype == np.uint8


@pytest.mark.parametrize("task", examples.TASKS)
def test_examples_point_at_images_and_end_in_something_to_learn(task):
  source = make(size=40)
  keys = set()
  for i in range(source.num_examples(task)):
    example = source.example(task, i)
    assert example.task == task
    keys.add(example.key)
    images = [p for p in example.parts if isinstance(p, examples.ImagePart)]
    assert all(0 <= p.image < source.num_images for p in images)
    assert len(images) == {"edit": 2, "document": 2, "text": 0}.get(task, 1)
    weight = examples.ANSWER_WEIGHT if task == "vqa" else 1.0
    assert example.parts[-1].weight == weight
  assert len(keys) == source.num_examples(task)


def test_questions_come_in_their_format_and_all_types():
  source = make(size=10)
  example = source.example("vqa", 10)
  assert re.fullmatch(r"Question: .+\? Answer:", example.parts[1].text)
  assert example.parts[1].weight == 0.0
  assert example.parts[2].text in {f" {s}" for s in scene_lib.SHAPES}


def test_several_questions_of_different_types_share_an_image():
  source = make(size=20)
  answers = {
    value: kind
    for kind, values in questions._VALUES.items()
    for value in values
  }
  answers |= dict.fromkeys("0123", "count")
  answers |= dict.fromkeys(("yes", "no"), "yes/no")
  for i in range(source.num_examples("vqa")):
    parts = source.example("vqa", i).parts
    types = [answers[part.text.strip()] for part in parts[2::2]]
    assert len(types) == len(set(types)) == shapes.QUESTIONS_TOGETHER


def test_some_images_are_written_without_a_text():
  source = make(size=300)
  lengths = collections.Counter(
    len(source.example("text_image", i).parts)
    for i in range(source.num_examples("text_image"))
  )
  share = lengths[1] / lengths.total()
  assert share == pytest.approx(shapes.UNPROMPTED_SHARE, abs=0.03)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"split": "test"}, "held_out"),
    ({"image_size": 47}, "even"),
    ({"image_size": 128}, "32 to 64"),
    ({"size": 0}, "at least one"),
    ({"seed": -1}, "0 or more"),
  ],
)
def test_wrong_settings_are_refused_with_advice(kwargs, message):
  with pytest.raises(ValueError, match=message):
    shapes.ShapesSource(**kwargs)


def test_an_index_or_task_out_of_range_is_refused():
  source = make(size=5)
  with pytest.raises(IndexError, match="there are 10"):
    source.image(10)
  with pytest.raises(IndexError, match="there are 5"):
    source.edit(5)
  with pytest.raises(IndexError):
    source.example("text", source.num_examples("text"))
  with pytest.raises(ValueError, match="image_text"):
    source.example("poem", 0)
  with pytest.raises(ValueError, match="tile"):
    shapes.object_shares(source.scene(0), 48, 7)
