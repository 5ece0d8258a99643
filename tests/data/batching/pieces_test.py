import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lavit_jax.core import vocabulary
from lavit_jax.data import examples, sequences
from lavit_jax.data.batching import pieces
from tests.data import fakes

_WORDS = fakes.Words()
_VOCABULARY = vocabulary.Vocabulary(_WORDS.size, fakes.CODES)
_CACHE = fakes.Cache([2, 3, 1, 5, 4, 9])
_SETTINGS = hypothesis.settings(
  max_examples=60, deadline=None, derandomize=True
)


def _text(count, first=0, weight=1.0, **kwargs):
  words = " ".join(f"w{first + i}" for i in range(count))
  return examples.TextPart(words, weight, **kwargs)


def _divide(parts, limits, task="document"):
  example = examples.Example("k", task, tuple(parts))
  spans = sequences.spans(example, _CACHE, _WORDS)
  return pieces.divide(spans, task, limits)


def _ids(spans):
  """All ids of a piece: the first token, then every target."""
  made = sequences.assemble(spans, _CACHE, _VOCABULARY)
  return [int(made.tokens[0]), *made.targets.tolist()]


def _whole(parts):
  example = examples.Example("k", "document", tuple(parts))
  return _ids(sequences.spans(example, _CACHE, _WORDS))


_PART = st.one_of(
  st.integers(1, 25).map(_text),
  st.builds(examples.ImagePart, st.integers(0, 5), st.booleans()),
)


@_SETTINGS
@hypothesis.given(st.lists(_PART, min_size=1, max_size=7), st.integers(1, 3))
def test_pieces_fit_and_joined_are_the_document(parts, slots):
  limits = (12, slots)
  made, _ = _divide(parts, limits)
  joined = []
  for piece in made:
    positions, images = sequences.size(piece)
    assert 1 <= positions <= 12
    assert images <= slots
    ids = _ids(piece)
    text_before = joined and joined[-1] < _VOCABULARY.image_begin
    if text_before and ids[0] == joined[-1]:
      ids = ids[1:]  # what the last piece has learnt begins the next
    joined += ids
  whole = _whole(parts)
  lost = len(whole) - len(joined)  # an image read alone, or a lone word
  assert joined == whole if not lost else set(joined) <= set(whole)
  assert lost <= 2


@_SETTINGS
@hypothesis.given(st.integers(1, 200), st.integers(1, 40))
def test_every_token_of_a_split_text_is_a_target_once(count, length):
  made, _ = _divide([_text(count)], (length, 1), task="text")
  assert len(made) == -(-count // length)
  targets = []
  for piece in made:
    sequence = sequences.assemble(piece, _CACHE, _VOCABULARY)
    assert len(sequence) <= length
    assert (sequence.weights == 1).all()
    targets += sequence.targets.tolist()
  assert targets == _whole([_text(count)])[1:]


@_SETTINGS
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=4
  ),
  st.integers(1, 15),
)
def test_answers_that_are_split_learn_what_they_learn_whole(turns, length):
  """With </s> where an answer ends, and nowhere within one."""
  parts = [_text(n, 40 * k, end=end) for k, (n, end) in enumerate(turns)]
  made, _ = _divide(parts, (length, 1))
  learnt = [i for piece in made for i in _ids(piece)[1:]]
  assert learnt == _whole(parts)[1:]


def test_a_document_that_fits_is_not_divided():
  parts = [examples.ImagePart(0, write=False), _text(3)]
  made, done = _divide(parts, (12, 1))
  assert done is None
  assert [_ids(p) for p in made] == [_whole(parts)]


def test_an_image_is_in_one_piece_with_the_text_before_it():
  parts = [_text(9), examples.ImagePart(1, write=True), _text(4)]
  made, done = _divide(parts, (11, 1))
  assert [_ids(p).count(_VOCABULARY.image_begin) for p in made] == [0, 1]
  assert _ids(made[1])[0] == _ids(made[0])[-1]  # [IMG] is learnt too
  assert "15 positions" not in done
  assert "18 positions, more than length=11: split into 2" in done


def test_images_beyond_the_slots_go_to_the_next_piece():
  parts = [
    part
    for i in range(4)
    for part in (examples.ImagePart(i, write=False), _text(2, 2 * i))
  ]
  made, _ = _divide(parts, (200, 2))
  assert [sequences.size(p)[1] for p in made] == [2, 2]


def _turns(*answers):
  parts = [examples.ImagePart(0, write=False, weight=0.0)]
  for k, count in enumerate(answers):
    parts += [_text(3, weight=0.0), _text(count, 10 * k, end=True)]
  return parts


def test_a_dialogue_is_cut_after_the_last_answer_that_fits():
  made, done = _divide(_turns(4, 4, 4), (20, 1))
  (piece,) = made
  whole, _ = _divide(_turns(4, 4), (20, 1))
  a, b = (sequences.assemble(p, _CACHE, _VOCABULARY) for p in (piece, *whole))
  for name in ("tokens", "targets", "weights", "image_index", "token_index"):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
  assert "cut to 18" in done


@pytest.mark.parametrize(
  ("task", "parts", "said"),
  [
    ("document", _turns(40), "more than length=20"),
    ("image_text", [examples.ImagePart(0, write=False), _text(30)], "34 pos"),
    ("text_image", [_text(30), examples.ImagePart(0, write=True)], "33 pos"),
    ("vqa", _turns(4, 40), "more than length=20"),
    ("document", [_text(3), examples.ImagePart(5, write=False)], None),
  ],
)
def test_a_long_document_that_is_one_unit_is_too_long(task, parts, said):
  if said is None:  # an image longer than any row
    with pytest.raises(pieces.TooLong, match="more than length=8"):
      _divide(parts, (8, 1), task)
    return
  with pytest.raises(pieces.TooLong, match=said):
    _divide(parts, (20, 1), task)
