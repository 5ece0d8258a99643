"""Values of a row's fields: texts, captions, questions with their answers."""

import collections
import math

from lavit_jax.data.records import known_fields, lines


def check_unicode(field, text):
  """Refuses half characters, which JSON can hold and UTF-8 cannot."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise lines.BadLine(
      f"{field} holds half a character, {text[error.start]!r}, at place"
      f" {error.start}: it was cut off, or is no UTF-8"
    ) from None


def listed(row, field, kind):
  """A list field whose items are of a kind; absent gives []."""
  value = row.get(field, [])
  if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
    raise lines.BadLine(
      f"{field} is not a list of the right kind: {value!r:.60}"
    )
  return value


def whole_words(row, field):
  """A text field with its white space."""
  value = row.get(field)
  if not isinstance(value, str):
    raise lines.BadLine(f"{field} is {value!r:.60}, expected some text")
  check_unicode(field, value)
  return value


def words(row, field):
  """A text field that is not empty, without white space at its ends."""
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    raise lines.BadLine(f"{field} is {value!r:.60}, expected some text")
  return whole_words(row, field).strip()


def captions(row):
  """(captions, fields read) of captions, caption, sentences, or a text."""
  named = [f for f in ("captions", "sentences", "caption") if f in row]
  text = [f for f in ("text", "txt") if f in row]
  if len(text) > 1 or (named and text):
    raise lines.BadLine(
      f"has {' and '.join([*named, *text])}: beside an image {text[0]} is its"
      " caption; keep one of them"
    )
  read = [*named, *text]
  return [c for field in read for c in _captions_of(row, field)], read


def _captions_of(row, field):
  """The captions of one field, one or many, without the empty ones."""
  if isinstance(row[field], str):
    return [words(row, field)]
  out = []
  for one in listed(row, field, (str, dict)):
    if isinstance(one, dict):  # COCO's, and Karpathy's
      name = "raw" if "raw" in one else "caption"
      one = whole_words(one, name)
    check_unicode(field, one)
    out.append(one.strip())
  return [c for c in out if c]


def questions(row):
  """([(type, question, answer)], fields read) of a row.

  They are those of `questions` and the one of `question`.
  """
  asked, read = listed(row, "questions", dict), ["questions"]
  if "question" in row:
    asked = [*asked, row]
    read += ["question", *known_fields.ANSWERS, *known_fields.KINDS]
  elif given := row.keys() & set(known_fields.ANSWERS):
    raise lines.BadLine(f"has {min(given)} without a question")
  out = []
  for one in asked:
    answers = next(
      filter(None, (_answers(one, f) for f in known_fields.ANSWERS)), None
    )
    if not answers:
      raise lines.BadLine(
        f"answer is {one.get('answer')!r:.60}, expected some text"
      )
    _check_agree(one, answers)
    answer = collections.Counter(answers).most_common(1)[0][0]
    kind = str(one.get("answer_type", one.get("type", "any")))
    check_unicode("answer_type", kind)
    out.append((kind, words(one, "question"), answer))
  return out, read


def _check_agree(row, answers):
  """Refuses an answer that is none of the answers: one of them is lost."""
  plain = {answer.casefold() for answer in answers}
  if other := [a for a in _answers(row, "answer") if a.casefold() not in plain]:
    raise lines.BadLine(
      f"answer is {other[0]!r:.40}, which is none of answers {answers!r:.60};"
      " keep one of the two fields"
    )


def _answers(row, field):
  """Answers of one field as texts, without the empty ones."""
  value = row.get(field, [])
  out = []
  for one in value if isinstance(value, list) else [value]:
    if isinstance(one, dict):  # VQA's own form
      one = one.get("answer")
    if isinstance(one, bool):
      one = "yes" if one else "no"
    elif isinstance(one, float) and one.is_integer():
      one = str(int(one))  # 3.0: what tables make of a 3
    elif isinstance(one, (int, float)) and math.isfinite(one):
      one = str(one)
    if not isinstance(one, str):
      raise lines.BadLine(f"{field} holds {one!r:.60}, expected some text")
    check_unicode(field, one)
    out.append(one.strip())
  return [a for a in out if a]
