"""A prompt of several texts has the ids that training gave them."""

import types

import pytest

from lavit_jax import vocabulary
from lavit_jax.data import examples, sequences
from lavit_jax.infer import prompts


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


def test_half_a_character_in_a_prompt_is_named(prompter):
  parsed = prompter.parse(["red", "cut \ud83d"])
  with pytest.raises(vocabulary.BadText, match="half a character"):
    prompter.rows([parsed], form="codes")
