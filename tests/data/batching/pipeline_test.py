import threading
import time

import numpy as np
import pytest

from lavit_jax.core import errors, image_io, vocabulary
from lavit_jax.data.batching import pipeline
from tests.data import fakes

_WORDS = fakes.Words()


def _image_batches(source, **changes):
  settings = dict(seed=3, tokenizer=_WORDS, text_length=4)
  return pipeline.image_batches(source, 8, **(settings | changes))


def test_images_come_shuffled_once_an_epoch():
  batches = _image_batches(fakes.Source({}))
  order = np.concatenate([batches[k]["index"] for k in range(5)])
  assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
  assert order[:20].tolist() != order[20:].tolist()


def test_images_in_order_end_with_a_padded_batch():
  batches = list(pipeline.iterate(_image_batches(fakes.Source({}), seed=None)))
  assert len(batches) == 3
  valid = np.concatenate([b["valid"] for b in batches])
  index = np.concatenate([b["index"] for b in batches])
  assert index[:20].tolist() == list(range(20))
  assert valid.tolist() == [1.0] * 20 + [0.0] * 4


def test_a_bad_image_is_black_and_not_valid():
  batches = _image_batches(fakes.Source({}, bad=(3,)), seed=None)
  batch = batches[0]
  assert batch["valid"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
  assert not batch["image"][3].any()
  assert batches.faults[0].names == {"image3": 1}


def test_captions_are_truncated_ended_and_masked():
  batch = _image_batches(fakes.Source({}), text_length=3)[0]
  for i, text, mask in zip(
    batch["index"], batch["text"], batch["text_mask"], strict=True
  ):
    ids = [[*_WORDS.encode(t), 2] for t in (f"caption {i}", f"another {i}")]
    assert text[mask].tolist() in ids
  short = _image_batches(fakes.Source({}), text_length=2)[0]
  assert (short["text"][:, 1] == 2).all()


def test_a_caption_with_half_a_character_is_dropped_and_logged(tmp_path):
  text = vocabulary.TextTokenizer.train(["a cat"] * 9, tmp_path / "t", 263)
  source = fakes.Source({})
  source.captions = lambda i: ["cut \ud83d" if i == 3 else "a cat"]
  batches = _image_batches(source, tokenizer=text, seed=None)
  batch = batches[0]
  assert batch["text_mask"].any(axis=1).tolist() == [i != 3 for i in range(8)]
  assert batch["valid"].all()  # its image is fine
  assert list(batches.faults[0].names) == ["caption of image3"]


def test_every_caption_of_an_image_is_shown():
  batches = _image_batches(fakes.Source({}, 1), seed=0)
  firsts = {int(batches[k]["text"][j, 0]) for k in range(3) for j in range(8)}
  assert firsts == {_WORDS.encode(w)[0] for w in ("caption", "another")}


def test_a_source_without_images_is_refused():
  with pytest.raises(errors.DataError, match="no images"):
    _image_batches(fakes.Source({}, 0))


class _Counting(fakes.Source):
  """Counts how many images are being decoded at once."""

  inside = most = 0
  lock = threading.Lock()

  def image(self, i):
    with self.lock:
      self.inside += 1
      self.most = max(self.most, self.inside)
    time.sleep(0.02)
    with self.lock:
      self.inside -= 1
    return super().image(i)


@pytest.mark.parametrize("threads", [0, 3])
def test_threads_decode_side_by_side(threads):
  source = _Counting({})
  batches = _image_batches(source, seed=None)
  list(pipeline.iterate(batches, num_threads=threads))
  assert (source.most > 1) == (threads > 0)


def test_error_of_a_source_reaches_the_caller_as_it_is():
  class Broken(fakes.Source):
    def image(self, i):
      raise RuntimeError("a bug, not a bad image")

  batches = _image_batches(Broken({}))
  with pytest.raises(RuntimeError, match="a bug"):
    next(pipeline.iterate(batches, num_threads=2))
  assert issubclass(image_io.ImageError, errors.LavitError)
