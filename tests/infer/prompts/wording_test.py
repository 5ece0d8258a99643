import pytest

from lavit_jax.core import errors
from lavit_jax.infer.presets import official, rules
from lavit_jax.infer.prompts import wording


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


WHOLE = (
  "a bottle of Dr. Pepper on a table",
  "a bottle of dr. pepper on a table",
  "St. Peter's church",
  "Mt. Fuji behind a lake",
  "Mr. and Mrs. Smith with Ms. Jones",
  "cats vs. dogs",
  "a Lakers vs. Celtics game",
  "a player with No. 5 on his back",
  "approx. 20 people",
  "a clock that reads 9 a.m. in a hall",
  "fruit, e.g. apples and pears",
  "the capital, i.e. Paris",
  "a sign for St. Louis Ave. and a bus",
  "apples, pears, etc. in a bowl",
  "Martin Luther King Jr. Boulevard",
  "a page dated Sept. 3",
  'a sign ("Mt. Rainier")',
  "a store that opens at 9 a.m.",
  "a man named Dr. A. Smith",
  "Dr. I. Newton and Mr. A. J. Foyt",
  "Sgt. A.J. Strong",
)


@pytest.mark.parametrize("text", WHOLE)
def test_an_abbreviation_ends_no_sentence(text):
  assert wording.first_sentence(text) == text
  assert wording.first_sentence(f" {text}. A dog") == text
  if "," not in text:
    assert wording.short_answer(text) == text
  assert official.clean_caption(text) == text.split(".")[0]  # parity


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("a house on Main St. The sky is blue", "a house on Main St"),
    ("No. It is red", "No"),
    ("it opens at 9 a.m. The door is shut", "it opens at 9 a.m"),
    ("apples etc. A bowl", "apples etc"),
    ("a bottle of Dr. Pepper. a glass", "a bottle of Dr. Pepper"),
    ("a man named Dr. A. Smith. He sits", "a man named Dr. A. Smith"),
    ("a house on Main St. A dog", "a house on Main St"),
    ("a best. friend", "a best"),
    ("this is Dr.", "this is Dr"),
    ("cats vs.", "cats vs"),
  ],
)
def test_a_sentence_may_end_with_an_abbreviation(text, sentence):
  assert wording.first_sentence(text) == sentence


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
