import pytest

from lavit_jax import errors
from lavit_jax.infer import official, rules, wording


@pytest.mark.parametrize(
  ("text", "sentence", "theirs"),
  [
    (" a dog. a cat", "a dog", "a dog"),
    ("It is 3.14 m. Yes", "It is 3.14 m", "It is 3"),
    ("a U.S. flag. blue", "a U.S. flag", "a U"),
    ("two dogs", "two dogs", "two dogs"),
    ("", "", ""),
    ("...", "..", ""),
  ],
)
def test_a_caption_ends_with_its_sentence(text, sentence, theirs):
  assert wording.first_sentence(text) == sentence
  assert official.clean_caption(text) == theirs


@pytest.mark.parametrize(
  ("text", "answer", "theirs"),
  [
    ("red, or blue", "red", "red"),
    ("1,000 people", "1,000 people", "1"),
    ("3.14", "3.14", "3"),
    ("yes\nno", "yes", "yes"),
    ("red question: what", "red", "red "),
    ("blue Long answer: because", "blue", "blue "),
    ("a dog. a cat", "a dog", "a dog"),
  ],
)
def test_an_answer_ends_at_its_first_break(text, answer, theirs):
  assert wording.short_answer(text) == answer
  assert official.clean_answer(text) == theirs


def test_questions_are_put_into_the_prompts_of_training():
  assert wording.question_prompt(" Is it red? ") == (
    "Question: Is it red? Answer:"
  )
  assert wording.answerable_prompt("Is it red?") == (
    'Question: Is the question: "Is it red?" answerable? Answer:'
  )


def test_words_are_given_in_their_base_form():
  pytest.importorskip("simplemma", reason="the extra eval")
  assert wording.lemmatize("two dogs running") == "two dog run"
  assert wording.lemmatize("") == ""


def test_rules_change_by_name_and_refuse_unknown_names():
  rule = rules.changed(rules.OFFICIAL.caption, {"num_beams": 3})
  assert (rule.num_beams, rule.max_new_tokens) == (3, 36)
  assert rules.changed(rule, {"num_beams": None}) == rule
  with pytest.raises(errors.UsageError, match="beams: expected one of num_b"):
    rules.changed(rule, {"beams": 3})


def test_official_rules_are_for_imported_models():
  assert rules.rules_of({"port": {"source": "lavit"}}) is rules.OFFICIAL
  assert rules.rules_of({"port": {"source": "llama"}}) is rules.OURS
  assert rules.rules_of({}) is rules.OURS
