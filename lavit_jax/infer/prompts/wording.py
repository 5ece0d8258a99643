"""Cuts decoded text to a caption or an answer; phrases questions.

The official code cuts at every "." and ","; here a number ("3.14", "1,000"),
an initial ("U.S.") and an abbreviation ("Dr. Pepper", "No. 5") stay whole.
`presets/official.py` has the official form, for `parity=True`.
"""

import functools
import re

from lavit_jax.core import errors
from lavit_jax.data import examples


def _words(text: str) -> frozenset[str]:
  return frozenset(text.split())


# Where a text may break: a "." only before a space or the end.
_SENTENCE_BREAK = re.compile(r"\.(?=\s|$)")
_ANSWER_BREAK = re.compile(r"\n|question:|Long answer:|,(?!\d)|\.(?=\s|$)")
# Abbreviations, by the word that must follow for the sentence to go on.
_BEFORE_ALL = _words("vs approx ca cf e.g i.e eg ie incl viz")
_BEFORE_NAMES = _words(
  "dr mr mrs ms mx prof st ste mt ft gen col capt cpt lt sgt rev gov sen"
  " jr sr messrs"
)
_BEFORE_NUMBERS = _words(
  "no nos nr fig figs vol vols p pp ch c rt hwy apt jan feb apr jun jul aug"
  " sep sept oct nov dec"
)
_BEFORE_SMALL = _words(
  "etc inc ltd co corp ave blvd rd lb lbs oz hr hrs sq yd dept"
)
# Capitals that begin a sentence rather than a name: "on Main St. The house".
_BEGINNINGS = _words(
  "a an the this that these those there here it its he she they we you i his"
  " her their in on at and but two three several some"
)
UNANSWERABLE = "unanswerable"


def first_sentence(text: str) -> str:
  """Returns the first sentence: "It is 3.14 m. Yes" gives "It is 3.14 m".

  Captions may run on after the first sentence; the official evaluation keeps
  that sentence alone.
  """
  return _up_to(_SENTENCE_BREAK, text.strip())


def short_answer(text: str) -> str:
  """Returns the text before the first break: "red, or blue" gives "red"."""
  return _up_to(_ANSWER_BREAK, text.strip())


def _up_to(breaks: re.Pattern, text: str) -> str:
  """Returns the text before the first break that ends a sentence."""
  for match in breaks.finditer(text):
    before, after = text[: match.start()], text[match.end() :]
    if match[0] != "." or not _goes_on(before, after):
      return before.strip()
  return text


def _goes_on(before: str, after: str) -> bool:
  """Whether a sentence goes on after the "." between two texts."""
  # The pattern matches the empty string too, so there is always a match.
  word = re.findall(r"[^\s(\"']*$", before)[0]
  following = after.lstrip()
  if re.search(r"\b[A-Z]$", word):  # an initial: "U.S. flag"
    return True
  word, begins = word.lower(), following[:1]
  if re.fullmatch(r"([a-z]\.)+[a-z]", word):  # "9 a.m." keeps its last "."
    return word in _BEFORE_ALL or not begins or not begins.isupper()
  if word in _BEFORE_ALL:
    return bool(following)
  if word in _BEFORE_NUMBERS:
    return begins.isdigit()
  if word in _BEFORE_NAMES and begins.isupper():
    if re.match(r"[A-Z]\.", following):  # an initial: "Dr. A. Smith"
      return True
    return re.findall(r"^\w*", following)[0].lower() not in _BEGINNINGS
  if word in _BEFORE_NAMES | _BEFORE_SMALL:
    return begins.islower() or begins.isdigit()
  return False


def question_prompt(question: str) -> str:
  """Returns the prompt of a question, as in training."""
  return examples.QUESTION.format(question.strip())


def answerable_prompt(question: str) -> str:
  """Returns the prompt that asks if a question can be answered (VizWiz)."""
  question = question.strip()
  return question_prompt(f'Is the question: "{question}" answerable?')


def lemmatize(answer: str) -> str:
  """Puts each word in its base form: "two dogs running" gives "two dog run".

  Uses the tables of simplemma. The official code uses spaCy, on the words that
  spaCy tags as nouns and verbs; the two differ where a word may be both.

  Raises:
    errors.UsageError: simplemma is not installed.
  """
  return " ".join(_lemma(word) for word in answer.split())


@functools.lru_cache(maxsize=4096)
def _lemma(word):
  try:
    import simplemma  # optional extra
  except ImportError as e:
    raise errors.UsageError(
      "Lemmas need simplemma: pip install 'lavit_jax[eval]'."
    ) from e
  return simplemma.lemmatize(word, lang="en")
