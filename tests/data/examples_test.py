import numpy as np

from lavit_jax.data import examples
from tests.data import fakes


def test_vqa_learns_the_answer_alone():
  example = examples.vqa("k", 3, "What color?", "red")
  assert [p.weight for p in example.parts] == [0.0, 0.0, 4.0]
  assert example.parts[1].text == "Question: What color? Answer:"
  assert not example.parts[0].write


def test_a_dialogue_learns_every_answer():
  turns = [("What color?", "red"), ("How many?", "2")]
  example = examples.dialogue("k", 3, turns)
  assert example.task == "vqa"
  assert [p.weight for p in example.parts] == [0.0, 0.0, 4.0, 0.0, 4.0]
  assert example.parts[3].text == "Question: How many? Answer:"
  assert example.parts[4].text == " 2"


def test_edit_reads_the_first_image_and_writes_the_second():
  first, _, second = examples.edit("k", 3, "make it red", 4).parts
  assert (first.image, first.write, second.image, second.write) == (
    3,
    False,
    4,
    True,
  )


def test_the_fake_source_is_a_source():
  assert isinstance(fakes.Source({}), examples.Source)


def test_fingerprint_tells_images_size_and_order_apart():
  source = fakes.Source({})
  same, fewer, larger = fakes.Source({}), fakes.Source({}, 19), fakes.Source({})
  larger.image_size = 8
  other = fakes.Source({})
  other.image_key = lambda i: f"image{other.num_images - i}"
  prints = [examples.fingerprint(s) for s in (source, fewer, larger, other)]
  assert examples.fingerprint(same) == prints[0]
  assert len(set(prints)) == 4
  assert np.all([len(p) == 32 for p in prints])
