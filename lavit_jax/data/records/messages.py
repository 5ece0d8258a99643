"""Messages of one row of a user's file as parts of a document."""

import dataclasses

from lavit_jax.data import examples
from lavit_jax.data.records import fields, known_fields, lines

_LEARNERS = {"user": False, "system": False, "assistant": True}
_ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names
_NAMES = ("image", "image_url", "path", "url")  # of a part's image
_HERE = "<image>"  # where an image stands in a text, in LLaVA's form


def field_of(row, image):
  """The field of a row that holds its messages, None if none does."""
  given = [f for f in known_fields.MESSAGES if f in row]
  beside = given and [f for f in ("text", "txt") if f in row]
  if len(given) > 1 or beside:
    raise lines.BadLine(
      f"has {' and '.join([*given, *beside])}; keep one of them"
    )
  if not given and image is None and row.get("images"):
    raise lines.BadLine(
      "has images, which are read beside messages alone; call one image"
      " image, and write a line for each"
    )
  return given[0] if given else None


def parts_of(row, field, image, path):
  """Parts of an interleaved document; ImagePart.image is still a path.

  Args:
    row: dict.
    field: of the row that holds the messages.
    image: what stands for the row's own image, None if nothing does.
    path: function that checks what stands for an image, and gives its path.

  Raises:
    lines.BadLine: something in them is not understood, or would be lost.
  """
  said = fields.listed(row, field, (dict, str))
  beside = _Beside(row, image, path)
  parts = []
  for k, message in enumerate(said):
    role = _role(message)
    if role is None:
      parts += _some(message, None, beside)
      continue
    turn = []
    for part in _content(message):
      turn += _some(part, _LEARNERS[role], beside)
    last = turn[-1] if turn else None
    again = [_role(m) for m in said[k + 1 : k + 2]] == [role]
    if role == "assistant" and isinstance(last, examples.TextPart):
      turn[-1] = dataclasses.replace(last, end=not again)
    parts += turn
  beside.check()
  last = parts[-1] if parts else None
  if isinstance(last, examples.ImagePart) and last.weight:
    parts[-1] = dataclasses.replace(last, write=True)
  held = (isinstance(p, examples.ImagePart) or p.text.strip() for p in parts)
  return parts if any(held) else []


def check_marks(texts):
  """Refuses marks of images in texts that stand outside of messages."""
  for text in texts:
    if _HERE in text:
      raise lines.BadLine(
        f"{text!r:.60} holds {_HERE}, which stands for an image in messages"
        " alone; leave it out, or write messages"
      )


def _role(message):
  """Who speaks, None for nobody."""
  role = None
  if isinstance(message, dict):
    role = message.get("role", message.get("from"))
  if role is None:
    return None
  name = _ROLES.get(role, role) if isinstance(role, str) else role
  if name not in _LEARNERS if isinstance(name, str) else True:
    names = sorted({*_LEARNERS, *_ROLES})
    raise lines.BadLine(f"role {role!r:.40} is none of {names}")
  return name


def _content(message):
  """What is said, a list of str and dicts."""
  field = "content" if "content" in message else "value"
  if field not in message:
    raise lines.BadLine("a message has a role and no content")
  who = "role" if "role" in message else "from"
  _check_read(message, {who, field, "type"}, "a message")
  known_fields.check_alone(message, "messages")
  if isinstance(message[field], str):
    return [message[field]]
  return fields.listed(message, field, (dict, str))


def _check_read(part, used, what):
  """Refuses known fields that would be lost; empty ones hold nothing."""
  for field in sorted(known_fields.FIELDS["messages"] - used):
    if part.get(field) not in (None, "", [], {}):
      raise lines.BadLine(
        f"{what} has {' and '.join(sorted(used & part.keys()))}, beside which"
        f" {field} is not read; leave it out, or write a part of its own"
      )


def _some(part, learn, beside):
  """Parts of one part; learn is None where nobody speaks."""
  weight = 0.0 if learn is False else 1.0
  if isinstance(part, str):
    part = {"type": "text", "text": part}
  kind = part.get("type")
  if kind == "text":
    _check_read(part, {"type", "text", "write"}, "a part")
    known_fields.check_alone(part, "messages")
    return _pieces(fields.whole_words(part, "text"), weight, learn, beside)
  if kind not in ("image", "image_url"):
    raise lines.BadLine(
      f"a part of type {kind!r}; known: text, image, image_url"
    )
  named = next((f for f in _NAMES if f in part), None)
  _check_read(part, {"type", "write", named}, "a part")
  write = part.get("write", bool(learn))
  if not isinstance(write, bool):
    raise lines.BadLine(f"write is {write!r:.40}, expected true or false")
  path = beside.take() if named is None else beside.name(part[named])
  return [examples.ImagePart(path, write, weight)]


def _pieces(text, weight, learn, beside):
  """A text with its <image> marks as parts; "" gives none."""
  if _HERE not in text:
    return [examples.TextPart(text, weight)] if text else []
  # White space round a mark belongs to the form, not to the text.
  first, *rest = text.split(_HERE)
  texts = [first.rstrip(), *(t.strip() for t in rest[:-1]), rest[-1].lstrip()]
  parts = []
  for k, piece in enumerate(texts):
    if k:
      parts.append(examples.ImagePart(beside.take(), bool(learn), weight))
    if piece:
      parts.append(examples.TextPart(piece, weight))
  return parts


class _Beside:
  """Images given beside messages, for the marks in them, in order."""

  def __init__(self, row, image, path):
    given = fields.listed(row, "images", (str, dict))
    if not given and image is not None:
      given = [image]
    self._count = len(given)
    self._left = [path(value) for value in reversed(given)]
    self._path, self._named = path, set()

  def name(self, value):
    """The path of an image that a part gives itself."""
    path = self._path(value)
    self._named.add(path)
    return path

  def take(self):
    """The path of the next image."""
    if not self._left:
      raise lines.BadLine(
        f"the messages ask for more images than the {self._count} given as"
        f" image or images; each {_HERE} in a text stands for one"
      )
    return self._left.pop()

  def check(self):
    """Refuses images that stand nowhere in the messages."""
    if left := [path for path in self._left if path not in self._named]:
      raise lines.BadLine(
        f"{len(left)} of {self._count} images given as image or images stand"
        f" nowhere in the messages; write {_HERE} in their places"
      )
