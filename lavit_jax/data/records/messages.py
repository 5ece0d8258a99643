"""Turns the messages of one row of a user's file into parts of a document."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from lavit_jax.data import examples
from lavit_jax.data.records import fields, known_fields, lines

_LEARNT = {"user": False, "system": False, "assistant": True}  # by role
_ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names
_IMAGE_FIELDS = ("image", "image_url", "path", "url")  # of a part
_MARK = "<image>"  # stands for an image in a text, in LLaVA's form


def field_of(row: fields.Row, image: Any) -> str | None:
  """Returns the field of a row that holds its messages, None if none does.

  Args:
    row: of the file.
    image: value of the row's own image, None if it has none.

  Raises:
    lines.BadLine: a field beside them would be lost.
  """
  named = [f for f in known_fields.MESSAGES if f in row]
  beside = [f for f in ("text", "txt") if f in row] if named else []
  if len(named) > 1 or beside:
    raise lines.BadLine(
      f"has {' and '.join([*named, *beside])}; keep one of them"
    )
  if not named and image is None and row.get("images"):
    raise lines.BadLine(
      "has images, which are read only beside messages; call one image"
      " image, and write a line for each"
    )
  return named[0] if named else None


def parts_of(
  row: fields.Row, field: str, image: Any, path: Callable[[Any], str]
) -> list[Any]:
  """Returns the parts of a document; `ImagePart.image` is still a path.

  Args:
    row: of the file.
    field: of the row that holds the messages.
    image: value of the row's own image, None if it has none.
    path: checks the value of an image, and returns its path.

  Raises:
    lines.BadLine: something in them is not understood, or would be lost.
  """
  items = fields.listed(row, field, (dict, str))
  images = _Images(row, image, path)
  parts: list[Any] = []
  for k, message in enumerate(items):
    role = _role(message)
    if role is None:
      parts += _parts_of_item(message, None, images)
      continue
    turn = []
    for item in _content(message):
      turn += _parts_of_item(item, _LEARNT[role], images)
    last = turn[-1] if turn else None
    goes_on = [_role(m) for m in items[k + 1 : k + 2]] == [role]
    if role == "assistant" and isinstance(last, examples.TextPart):
      turn[-1] = dataclasses.replace(last, end=not goes_on)
    parts += turn
  images.check_all_used()
  last = parts[-1] if parts else None
  if isinstance(last, examples.ImagePart) and last.weight:
    parts[-1] = dataclasses.replace(last, write=True)
  full = (isinstance(p, examples.ImagePart) or p.text.strip() for p in parts)
  return parts if any(full) else []


def check_marks(texts: Iterable[str]) -> None:
  """Refuses marks of images in texts outside messages.

  Raises:
    lines.BadLine: a text has one.
  """
  for text in texts:
    if _MARK in text:
      raise lines.BadLine(
        f"{text!r:.60} holds {_MARK}, which stands for an image only in"
        " messages; leave it out, or write messages"
      )


def _role(message):
  """Returns who speaks, None for a message without a role."""
  role = None
  if isinstance(message, dict):
    role = message.get("role", message.get("from"))
  if role is None:
    return None
  name = _ROLES.get(role, role) if isinstance(role, str) else role
  if not isinstance(name, str) or name not in _LEARNT:
    names = sorted({*_LEARNT, *_ROLES})
    raise lines.BadLine(f"role {role!r:.40} is not one of {names}")
  return name


def _content(message):
  """Returns the content of a message with a role, a list of str and dicts."""
  field = "content" if "content" in message else "value"
  if field not in message:
    raise lines.BadLine("a message has a role and no content")
  speaker = "role" if "role" in message else "from"
  _check_read(message, {speaker, field, "type"}, "a message")
  known_fields.check_alone(message, "messages")
  if isinstance(message[field], str):
    return [message[field]]
  return fields.listed(message, field, (dict, str))


def _check_read(item, used, name):
  """Refuses known fields that would be lost; empty ones hold nothing."""
  for field in sorted(known_fields.FIELDS["messages"] - used):
    if item.get(field) not in (None, "", [], {}):
      raise lines.BadLine(
        f"{name} has {' and '.join(sorted(used & item.keys()))}, beside which"
        f" {field} is not read; leave it out, or write a part of its own"
      )


def _parts_of_item(item, learn, images):
  """Returns the parts of one item of a message.

  Args:
    item: str or dict.
    learn: whether it is learnt; None where no role is given.
    images: the images beside the messages.
  """
  weight = 0.0 if learn is False else 1.0
  if isinstance(item, str):
    item = {"type": "text", "text": item}
  kind = item.get("type")
  if kind == "text":
    _check_read(item, {"type", "text", "write", "end"}, "a part")
    known_fields.check_alone(item, "messages")
    text = fields.raw_text(item, "text")
    parts = _split_at_marks(text, weight, learn, images)
    if _flag(item, "end", False) and parts:
      parts[-1] = _ended(parts[-1])
    return parts
  if kind not in ("image", "image_url"):
    raise lines.BadLine(
      f"a part of type {kind!r}; known: text, image, image_url"
    )
  named = next((f for f in _IMAGE_FIELDS if f in item), None)
  _check_read(item, {"type", "write", "optional", named}, "a part")
  write = _flag(item, "write", bool(learn))
  optional = _flag(item, "optional", False)
  path = images.take() if named is None else images.named(item[named])
  return [examples.ImagePart(path, write, weight, optional)]


def _flag(item, name, default):
  """Returns a field of a part that is true or false."""
  value = item.get(name, default)
  if not isinstance(value, bool):
    raise lines.BadLine(f"{name} is {value!r:.40}, expected true or false")
  return value


def _ended(part):
  """Returns a text after which the end is learnt; an image as it is."""
  if isinstance(part, examples.TextPart):
    return dataclasses.replace(part, end=True)
  return part


def _split_at_marks(text, weight, learn, images):
  """Returns a text with <image> marks as parts; "" gives none."""
  if _MARK not in text:
    return [examples.TextPart(text, weight)] if text else []
  # White space around a mark belongs to the form, not to the text.
  first, *rest = text.split(_MARK)
  texts = [first.rstrip(), *(t.strip() for t in rest[:-1]), rest[-1].lstrip()]
  parts = []
  for k, piece in enumerate(texts):
    if k:
      parts.append(examples.ImagePart(images.take(), bool(learn), weight))
    if piece:
      parts.append(examples.TextPart(piece, weight))
  return parts


class _Images:
  """Images that a row gives beside its messages, for their marks, in order."""

  def __init__(self, row, image, path):
    values = fields.listed(row, "images", (str, dict))
    if not values and image is not None:
      values = [image]
    self._count = len(values)
    self._left = [path(value) for value in reversed(values)]
    self._path, self._named = path, set()

  def named(self, value):
    """Returns the path of an image that a part names itself."""
    path = self._path(value)
    self._named.add(path)
    return path

  def take(self):
    """Returns the path of the next image."""
    if not self._left:
      raise lines.BadLine(
        f"the messages ask for more images than the {self._count} given as"
        f" image or images; each {_MARK} in a text stands for one"
      )
    return self._left.pop()

  def check_all_used(self):
    """Refuses images that have no position in the messages."""
    if left := [path for path in self._left if path not in self._named]:
      raise lines.BadLine(
        f"{len(left)} of {self._count} images given as image or images appear"
        f" nowhere in the messages; write {_MARK} where they belong"
      )
