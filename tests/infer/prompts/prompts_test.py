"""A prompt of several texts has the ids that training gave them."""

import types

import hypothesis
import pytest
from hypothesis import strategies as st

from lavit_jax.core import vocabulary
from lavit_jax.data import examples, sequences
from lavit_jax.infer.prompts import prompts


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
  lines = ["List:", "- one", "Boil it.", "Stir.", "red"] * 9
  path = tmp_path_factory.mktemp("text") / "t.model"
  text = vocabulary.TextTokenizer.train(lines, path, 276)
  vocab = vocabulary.Vocabulary(text.size, 8)
  return prompts.Prompter(
    types.SimpleNamespace(image_size=8),
    types.SimpleNamespace(vocabulary=vocab),
    text,
    4,
  )


@pytest.mark.parametrize(
  "texts",
  [
    ["List:\n", "- one"],
    ["Boil it.", "Stir."],
    ["Boil it.", " Stir.", "\n\n", "red "],
    [" red", "red"],
  ],
)
def test_texts_of_a_prompt_have_the_ids_of_a_document(prompter, texts):
  (row,) = prompter.rows([prompter.parse(texts)], form="codes")
  parts = tuple(examples.TextPart(t) for t in texts)
  spans = sequences.spans(
    examples.Example("k", "document", parts), None, prompter.text
  )
  ids = [int(i) for span in spans for i in span.ids]
  assert [*row, vocabulary.EOS_ID] == ids


def test_a_later_question_of_a_dialogue_is_prompted_as_it_was_trained(prompter):
  """The end of an answer is learnt, but not read: a prompt has no </s>."""
  said = ["Boil it.", "red", "Stir."]
  answer = examples.TextPart("List:", end=True)
  parts = [
    examples.TextPart(said[0], 0.0),
    examples.TextPart(said[1], end=True),
    examples.TextPart(said[2], 0.0),
    answer,
  ]
  made = sequences.build(
    examples.Example("k", "document", tuple(parts)),
    None,
    prompter.text,
    prompter.language.vocabulary,
  )
  (row,) = prompter.rows([prompter.parse(said)], form="codes")
  assert made.tokens[: len(row)].tolist() == row


_TEXT = st.builds(
  "".join,
  st.tuples(
    st.sampled_from(["", " ", "\n", "  ", "\n\n"]),
    st.sampled_from(["", "List:", "- one", "Boil it.", "red", "\t"]),
    st.sampled_from(["", " ", "\n", "  "]),
  ),
)


@hypothesis.settings(
  max_examples=200,
  deadline=None,
  derandomize=True,
)
@hypothesis.given(
  st.lists(
    st.tuples(_TEXT, st.sampled_from([0.0, 1.0]), st.booleans()),
    min_size=1,
    max_size=5,
  )
)
@hypothesis.example([("List:\n", 0.0, False), ("red", 1.0, True)])
@hypothesis.example([("red", 1.0, True), ("\nBoil it.", 0.0, False)])
@hypothesis.example([("List: ", 1.0, False), ("red", 1.0, False)])
@hypothesis.example(
  [("List:\n", 1.0, False), ("", 1.0, False), ("red", 1.0, False)]
)
def test_a_prompt_of_the_first_texts_is_how_their_training_begins(
  prompter, said
):
  """Wherever a user stops, and whatever of it was learnt."""
  parts = [examples.TextPart("red red")]
  parts += [examples.TextPart(t, float(bool(w)), bool(e)) for t, w, e in said]
  made = sequences.build(
    examples.Example("k", "document", tuple(parts)),
    None,
    prompter.text,
    prompter.language.vocabulary,
  )
  read = [*made.tokens.tolist(), vocabulary.EOS_ID]
  for count in range(1, len(parts) + 1):
    prompt = prompter.parse([p.text for p in parts[:count]])
    (row,) = prompter.rows([prompt], form="codes")
    assert read[: len(row)] == row
  assert len(row) == len(made.tokens)


def test_an_answer_behind_a_line_end_begins_without_a_space(prompter):
  text = prompter.text
  whole = text.encode("List:\nred")
  asked = sequences.text_ids(text, "List:\n")
  assert asked + sequences.text_ids(text, "red", "List:\n") == whole
  assert asked + text.encode("red") != whole


def test_half_a_character_in_a_prompt_is_named(prompter):
  parsed = prompter.parse(["red", "cut \ud83d"])
  with pytest.raises(vocabulary.BadText, match="half a character"):
    prompter.rows([parsed], form="codes")
