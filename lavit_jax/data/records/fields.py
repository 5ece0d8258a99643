"""Reads the values of a row's fields: texts, captions, questions, answers."""

import collections
import math
from collections.abc import Mapping
from typing import Any

from lavit_jax.data.records import known_fields, lines

Row = Mapping[str, Any]
Question = tuple[str, str, str]  # type, question, answer


def check_unicode(field: str, text: str) -> None:
  """Refuses half characters, which JSON can hold and UTF-8 cannot.

  Raises:
    lines.BadLine: the text, a value of `field`, has one.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise lines.BadLine(
      f"{field} holds half a character, {text[error.start]!r}, at position"
      f" {error.start}: the text was cut off, or is not UTF-8"
    ) from None


def listed(row: Row, field: str, kind: type | tuple[type, ...]) -> list[Any]:
  """Returns a list field whose items are of a type; [] if it is absent.

  Raises:
    lines.BadLine: it is not a list, or an item is of another type.
  """
  value = row.get(field, [])
  if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
    raise lines.BadLine(
      f"{field} is not a list of the right type: {value!r:.60}"
    )
  return value


def raw_text(row: Row, field: str) -> str:
  """Returns a text field with its white space, possibly empty.

  Raises:
    lines.BadLine: it is absent, not a text, or has half a character.
  """
  value = row.get(field)
  if not isinstance(value, str):
    raise lines.BadLine(f"{field} is {value!r:.60}, expected some text")
  check_unicode(field, value)
  return value


def text(row: Row, field: str) -> str:
  """Returns a text field without white space at its ends.

  Raises:
    lines.BadLine: as of `raw_text`, or it is empty.
  """
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    raise lines.BadLine(f"{field} is {value!r:.60}, expected some text")
  return raw_text(row, field).strip()


def captions(row: Row) -> tuple[list[str], list[str]]:
  """Returns (captions, fields read) of captions, caption, sentences or text.

  Raises:
    lines.BadLine: a text beside captions, which one of them would replace.
  """
  named = [f for f in ("captions", "sentences", "caption") if f in row]
  plain = [f for f in ("text", "txt") if f in row]
  if len(plain) > 1 or (named and plain):
    raise lines.BadLine(
      f"has {' and '.join([*named, *plain])}: beside an image {plain[0]} is its"
      " caption; keep one of them"
    )
  read = [*named, *plain]
  return [c for field in read for c in _captions_of(row, field)], read


def _captions_of(row, field):
  """Returns the captions of one field, one or several, without empty ones."""
  if isinstance(row[field], str):
    return [text(row, field)]
  out = []
  for item in listed(row, field, (str, dict)):
    if isinstance(item, dict):  # COCO's form, and Karpathy's
      item = raw_text(item, "raw" if "raw" in item else "caption")
    check_unicode(field, item)
    out.append(item.strip())
  return [c for c in out if c]


def questions(row: Row) -> tuple[list[Question], list[str]]:
  """Returns ([(type, question, answer)], fields read) of a row.

  These are the questions of field `questions` and the one of `question`.

  Raises:
    lines.BadLine: a question without an answer, or the reverse.
  """
  items, read = listed(row, "questions", dict), ["questions"]
  if "question" in row:
    items = [*items, row]
    read += ["question", *known_fields.ANSWERS, *known_fields.KINDS]
  elif alone := row.keys() & set(known_fields.ANSWERS):
    raise lines.BadLine(f"has {min(alone)} without a question")
  out = []
  for item in items:
    answers = next(
      filter(None, (_answers(item, f) for f in known_fields.ANSWERS)), None
    )
    if not answers:
      raise lines.BadLine(
        f"answer is {item.get('answer')!r:.60}, expected some text"
      )
    _check_agree(item, answers)
    answer = collections.Counter(answers).most_common(1)[0][0]
    kind = str(item.get("answer_type", item.get("type", "any")))
    check_unicode("answer_type", kind)
    out.append((kind, text(item, "question"), answer))
  return out, read


def _check_agree(row, answers):
  """Refuses an `answer` that is not one of the answers: it would be lost."""
  plain = {answer.casefold() for answer in answers}
  if other := [a for a in _answers(row, "answer") if a.casefold() not in plain]:
    raise lines.BadLine(
      f"answer is {other[0]!r:.40}, which is not one of answers"
      f" {answers!r:.60}; keep one of the two fields"
    )


def _answers(row, field):
  """Returns the answers of one field as texts, without empty ones."""
  value = row.get(field, [])
  out = []
  for item in value if isinstance(value, list) else [value]:
    if isinstance(item, dict):  # VQA's own form
      item = item.get("answer")
    if isinstance(item, bool):
      item = "yes" if item else "no"
    elif isinstance(item, float) and item.is_integer():
      item = str(int(item))  # a table may write 3 as 3.0
    elif isinstance(item, (int, float)) and math.isfinite(item):
      item = str(item)
    if not isinstance(item, str):
      raise lines.BadLine(f"{field} holds {item!r:.60}, expected some text")
    check_unicode(field, item)
    out.append(item.strip())
  return [a for a in out if a]
