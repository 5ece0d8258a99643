"""From decoded text to a caption or an answer, and questions about questions.

The official code cuts at every "." and ","; here a number ("3.14", "1,000")
and an initial ("U.S.") stay whole. `official.py` has the other form, which
`parity=True` takes.
"""

import functools
import re

from lavit_jax import errors
from lavit_jax.data import examples

# A "." that ends a sentence: before a space or the end, not after an initial.
_SENTENCE_END = re.compile(r"(?<!\b[A-Z])\.(?=\s|$)")
_ANSWER_END = re.compile(
  r"\n|question:|Long answer:|,(?!\d)|(?<!\b[A-Z])\.(?=\s|$)"
)
UNANSWERABLE = "unanswerable"


def first_sentence(text: str) -> str:
  """The first sentence, without its "."; "It is 3.14 m. Yes" gives "It is…m".

  Captions run on after the sentence that was asked for; the official
  evaluation keeps the first.
  """
  return _SENTENCE_END.split(text.strip(), 1)[0].strip()


def short_answer(text: str) -> str:
  """The words before the first break: "red, or blue" gives "red"."""
  return _ANSWER_END.split(text.strip(), 1)[0].strip()


def question_prompt(question: str) -> str:
  """The prompt in which a question is asked, as in training."""
  return examples.QUESTION.format(question.strip())


def answerable_prompt(question: str) -> str:
  """The prompt that asks whether a question can be answered (VizWiz)."""
  question = question.strip()
  return question_prompt(f'Is the question: "{question}" answerable?')


def lemmatize(answer: str) -> str:
  """Every word in its base form: "two dogs running" gives "two dog run".

  By simplemma's tables. The official code has spaCy do it, for nouns and
  verbs as spaCy tags them; the two differ where a word is both.

  Raises:
    errors.UsageError: simplemma is not installed.
  """
  return " ".join(_lemma(word) for word in answer.split())


@functools.lru_cache(maxsize=4096)
def _lemma(word):
  try:
    import simplemma
  except ImportError as e:
    raise errors.UsageError(
      "Lemmas need simplemma: pip install 'lavit_jax[eval]'."
    ) from e
  return simplemma.lemmatize(word, lang="en")
