import numpy as np
import pytest

from lavit_jax.core import errors, vocabulary
from lavit_jax.data import examples, sequences
from tests.data import fakes

_WORDS = fakes.Words()
_VOCABULARY = vocabulary.Vocabulary(_WORDS.size, fakes.CODES)
_CACHE = fakes.Cache([2, 3, 1, -1])
_BEGIN, _END, _EOS = _VOCABULARY.image_begin, _VOCABULARY.image_end, 2


def _ids(i):
  return _VOCABULARY.to_ids(_CACHE.codes(i)).tolist()


def _build(example):
  return sequences.build(example, _CACHE, _WORDS, _VOCABULARY)


def _whole(sequence):
  return [int(sequence.tokens[0]), *sequence.targets.tolist()]


def test_an_image_that_is_read_points_at_its_continuous_tokens():
  made = _build(examples.image_text("k", 1, "red cat"))
  red, cat = _WORDS.encode("red cat")
  assert _whole(made) == [_BEGIN, *_ids(1), _END, red, cat, _EOS]
  assert made.image_index.tolist() == [-1, 0, 0, 0, -1, -1, -1]
  assert made.token_index.tolist() == [0, 0, 1, 2, 0, 0, 0]
  assert made.images == (1,)


def test_image_text_learns_text_and_codes():
  made = _build(examples.image_text("k", 1, "red cat"))
  assert made.weights.tolist() == [1.0] * 7


def test_an_image_that_is_written_is_ids_and_ends_without_eos():
  made = _build(examples.text_image("k", 0, "red cat"))
  assert _whole(made) == [*_WORDS.encode("red cat"), _BEGIN, *_ids(0), _END]
  assert (made.image_index == -1).all()
  assert made.images == ()
  assert made.weights.tolist() == [1.0] * 5


def test_vqa_weighs_only_the_answer_and_its_end():
  made = _build(examples.vqa("k", 2, "what color", "red"))
  learnt = made.targets[made.weights > 0].tolist()
  assert learnt == [*_WORDS.encode("red"), _EOS]


def test_in_a_dialogue_answers_and_the_end_are_learnt_but_no_question():
  made = _build(examples.dialogue("k", 2, [("a", "red cat"), ("b", "cat")]))
  learnt = made.targets[made.weights > 0].tolist()
  words = [*_WORDS.encode("red cat"), *_WORDS.encode("cat")]
  assert learnt == [*words, _EOS]


def _talk(*ends):
  parts = [examples.ImagePart(2, write=False, weight=0.0)]
  for k, end in enumerate(ends):
    parts.append(examples.TextPart(f"question {k}", 0.0))
    parts.append(examples.TextPart(f"answer {k}", end=end))
  return examples.Example("k", "document", tuple(parts))


def test_the_end_of_every_answer_of_a_dialogue_is_learnt():
  made = _build(_talk(True, True, True))
  learnt = made.targets[made.weights > 0].tolist()
  answers = [_WORDS.encode(f"answer {k}") for k in range(3)]
  assert learnt == [i for a in answers for i in (*a, _EOS)]


def test_tokens_before_a_later_question_are_those_of_a_prompt():
  """Prompts are texts and images; none can hold </s>."""
  made, plain = _build(_talk(True, True, True)), _build(_talk(*[False] * 3))
  np.testing.assert_array_equal(made.tokens, plain.tokens)
  assert _EOS not in made.tokens
  assert len(made) == len(plain)


def test_edit_reads_one_image_and_learns_the_other():
  made = _build(examples.edit("k", 0, "make it red", 1))
  assert made.images == (0,)
  assert made.tokens[made.image_index == 0].tolist() == _ids(0)
  learnt = made.targets[made.weights > 0].tolist()
  assert learnt == [_BEGIN, *_ids(1), _END]


def test_a_document_numbers_its_images_in_reading_order():
  parts = (
    examples.ImagePart(2, write=False),
    examples.TextPart("then"),
    examples.ImagePart(0, write=False),
    examples.ImagePart(2, write=False),
    examples.ImagePart(1, write=True),
    examples.TextPart("end"),
  )
  made = _build(examples.Example("k", "document", parts))
  assert made.images == (2, 0)
  assert made.image_index[made.image_index >= 0].tolist() == [0, 1, 1, 0]
  assert made.token_index[made.image_index >= 0].tolist() == [0, 0, 1, 0]


def test_text_ends_with_eos():
  made = _build(examples.text("k", "one two"))
  assert _whole(made) == [*_WORDS.encode("one two"), _EOS]


def test_target_is_the_next_token_everywhere():
  made = _build(examples.edit("k", 0, "make it red", 1))
  np.testing.assert_array_equal(made.targets[:-1], made.tokens[1:])


def test_size_is_the_size_of_the_built_sequence():
  for example in (
    examples.image_text("k", 1, "red cat"),
    examples.edit("k", 0, "make it red", 1),
    examples.vqa("k", 2, "what color", "red"),
    examples.text("k", "one two"),
  ):
    made = _build(example)
    spans = sequences.spans(example, _CACHE, _WORDS)
    assert sequences.size(spans) == (len(made), len(made.images))


@pytest.mark.parametrize(
  ("example", "said"),
  [
    (examples.image_text("k", 3, "red"), "could not be tokenised"),
    (examples.image_text("k", 1, " "), "empty text"),
    (examples.text("k", ""), "empty text"),
    (examples.Example("k", "document", ()), "is empty"),
    (
      examples.Example("k", "text", (examples.TextPart("a b", 0.0),)),
      "nothing to learn",
    ),
  ],
)
def test_unusable_examples_say_why(example, said):
  with pytest.raises(sequences.Unusable, match=said):
    _build(example)


def test_empty_texts_of_a_document_are_skipped():
  parts = [examples.TextPart(t) for t in ("red", " ", "cat", "")]
  made = _build(examples.Example("k", "document", tuple(parts)))
  assert _whole(made) == [*_WORDS.encode("red cat"), _EOS]
  with pytest.raises(sequences.Unusable, match="is empty"):
    _build(examples.Example("k", "document", tuple(parts[1::2])))


def test_texts_separated_by_white_space_have_the_ids_of_one_text(tmp_path):
  lines = ["List:", "- one", "Boil it.", "Stir."] * 9
  text = vocabulary.TextTokenizer.train(lines, tmp_path / "t", 275)
  spans = lambda *parts: sequences.spans(
    examples.Example("k", "document", parts), None, text
  )
  part = examples.TextPart
  ids = lambda *parts: [int(i) for s in spans(*parts) for i in s.ids]
  whole = ids(part("List:\n- one\n\nStir."))
  assert ids(part("List:\n"), part("- one"), part("\n\nStir.")) == whole
  apart = ids(part("Boil it."), part("Stir."))
  assert apart == ids(part("Boil it. Stir."))
  # Whoever says them: a prompt does not tell.
  assert ids(part("List:\n", 0.0), part("- one\n\nStir.")) == whole
  assert ids(part("List:\n", end=True), part("- one\n\nStir.")) == whole


def test_half_a_character_makes_a_document_unusable(
  tmp_path,
):
  text = vocabulary.TextTokenizer.train(["a cat"] * 9, tmp_path / "t", 263)
  with pytest.raises(sequences.Unusable, match="half a character"):
    sequences.spans(examples.text("k", "cut \ud83d"), None, text)


def test_images_without_a_cache_point_at_lavit_tokenize():
  example = examples.image_text("k", 1, "red")
  with pytest.raises(errors.DataError, match="lavit tokenize"):
    sequences.spans(example, None, _WORDS)


def test_a_real_tokenizer_gives_an_answer_the_ids_it_has_after_a_space(
  tmp_path,
):
  lines = ["Question: what color is it? Answer: red"] * 50
  text = vocabulary.TextTokenizer.train(lines, tmp_path / "t.model", 290)
  parts = sequences.text_ids(text, "it? Answer:")
  parts = parts + sequences.text_ids(text, " red")
  assert parts == text.encode("it? Answer: red")
