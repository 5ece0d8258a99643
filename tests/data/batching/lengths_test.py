"""Lengths are those of the sequences that are built, and are kept."""

import logging

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lavit_jax.core import errors, vocabulary
from lavit_jax.data import examples, sequences
from lavit_jax.data.batching import lengths
from tests.data import fakes

_SETTINGS = hypothesis.settings(
  max_examples=150, deadline=None, derandomize=True
)
_TEXTS = st.sampled_from(
  ["", " ", "a", " red", "a cat\n", "\nb", "zwei ü 😀", "\ud83d", "List:\n"]
)
_WEIGHTS = st.sampled_from([0.0, 1.0])
_PARTS = st.one_of(
  st.builds(examples.TextPart, _TEXTS, _WEIGHTS),
  st.builds(examples.ImagePart, st.integers(0, 7), st.booleans(), _WEIGHTS),
)
_COUNTS = np.array([1, 4, 9, -1, 2, 3, 0, 5], np.int32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "tokenizer.model"
  sentences = ["a red cat", "List:", "zwei Katzen, b", "red red cat"] * 9
  return vocabulary.TextTokenizer.train(sentences, path, 300)


def _expected(example, tokenizer, counts):
  cache = fakes.Cache(counts)
  try:
    return list(sequences.size(sequences.spans(example, cache, tokenizer)))
  except sequences.Unusable:
    return [lengths.BAD, lengths.BAD]


@_SETTINGS
@hypothesis.given(
  st.lists(st.lists(_PARTS, max_size=5).map(tuple), min_size=1, max_size=6),
  st.sampled_from(["document", "vqa"]),
)
def test_sizes_are_those_of_the_sequences(tokenizer, documents, task):
  source = fakes.Source({task: documents})
  found = lengths.of(source, task, tokenizer)
  order = np.arange(len(documents))[::-1]
  expected = [
    _expected(source.example(task, int(i)), tokenizer, _COUNTS) for i in order
  ]
  assert found.sizes(order, _COUNTS).tolist() == expected


def test_texts_alone_need_no_cache_and_images_do():
  source = fakes.Source(
    {
      "text": [(examples.TextPart("a b c"),)],
      "document": [(examples.TextPart("a"),), (examples.ImagePart(1, True),)],
    }
  )
  words = fakes.Words()
  text = lengths.of(source, "text", words)
  lengths.require_codes(source, "text", text, None)
  assert text.sizes(np.array([0, 0])).tolist() == [[3, 0], [3, 0]]
  with pytest.raises(errors.DataError, match="document/1 has an image, but"):
    lengths.require_codes(
      source, "document", lengths.of(source, "document", words), None
    )


def test_lengths_of_many_examples_are_kept(tokenizer, monkeypatch, tmp_path):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path))
  monkeypatch.setattr(lengths, "_KEPT", 3)
  monkeypatch.setattr(lengths, "_CHUNK", 2)
  image = examples.ImagePart(1, False)
  documents = [(image, examples.TextPart("red " * i)) for i in range(1, 8)]
  made = []
  real = lengths.computed
  monkeypatch.setattr(
    lengths, "computed", lambda *args: made.append(args) or real(*args)
  )
  get = lambda documents, tokenizer=tokenizer: lengths.of(
    fakes.Source({"image_text": documents}), "image_text", tokenizer
  )
  first, again = get(documents), get(documents)
  assert len(made) == 1
  assert isinstance(again.text, np.memmap)
  for name in ("text", "reads", "ends", "images"):
    np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
  get([*documents[1:], documents[0]])  # other texts, and another tokenizer
  get(documents, fakes.Words())
  assert len(made) == 3


@pytest.mark.parametrize("damage", ["cut", "gone", "junk", "short"])
def test_damaged_lengths_are_made_again(monkeypatch, tmp_path, damage, caplog):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path))
  monkeypatch.setattr(lengths, "_KEPT", 1)
  source = fakes.Source({"text": [(examples.TextPart("a b"),)] * 5})
  get = lambda: lengths.of(source, "text", fakes.Words())
  expected = get()
  (folder,) = (tmp_path / "lengths").iterdir()
  file = folder / "text.npy"
  if damage == "cut":
    file.write_bytes(file.read_bytes()[:-3])
  elif damage == "gone":
    file.unlink()
  elif damage == "junk":
    file.write_bytes(b"junk")
  else:
    np.save(file, np.zeros(4, np.int32))
  with caplog.at_level(logging.WARNING):
    again = get()
  np.testing.assert_array_equal(again.text, expected.text)
  assert "damaged" in caplog.text
  assert isinstance(get().text, np.memmap)


def test_lengths_that_cannot_be_kept_are_used(monkeypatch, tmp_path, caplog):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "file"))
  monkeypatch.setattr(lengths, "_KEPT", 1)
  source = fakes.Source({"text": [(examples.TextPart("a b"),)]})
  assert lengths.of(source, "text", fakes.Words()).text.tolist() == [3]
  assert "LAVIT_INDEXES names another folder" in caplog.text
