"""Names of the fields in a user's file: which are read, what others may hold.

A line with a field that is not read is refused if without the field it would
be taken for something else; other such fields are part of one warning a file.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lavit_jax.data.records import lines

MESSAGES = ("messages", "document", "conversations")
IMAGES = ("image", "file_name", "filename")  # of a line; the first counts
ANSWERS = ("answers", "answer", "multiple_choice_answer")  # the last is VQA's
KINDS = ("answer_type", "type")  # of a question
FIELDS = {
  "": {
    *("images", "filepath", *IMAGES),
    *("caption", "captions", "sentences", "text", "txt"),
    *("question", "questions", *ANSWERS, *KINDS),
    *("edits", *MESSAGES),
  },
  "questions": {"question", *ANSWERS, *KINDS},
  "edits": {"instruction", "image"},
} | {
  field: {
    *("role", "from", "content", "value", "type", "text"),
    *("image", "image_url", "path", "url", "write", "end", "optional"),
  }
  for field in MESSAGES
}
# Fields of a row that hold something to learn.
LEARNABLE = FIELDS[""] - {"images", "filepath", *IMAGES}
# Fields whose misspelling would change what a line means.
_CHECKED = (*sorted(LEARNABLE - set(KINDS)), "image", "file_name")
# Fields about the origin of a line, not about its content.
_ORIGIN = re.compile(
  r"(^|_)(id|url|key|source|repo|split|license|date|time|hash|sha256|md5|lang"
  r"|language|dataset|format|shard|path)s?$"
)
_TRAINING_SPLITS = ("train", "restval")  # the latter is Karpathy's, of COCO
_SUFFIX = re.compile(r"\.(avif|bmp|gif|heic|jpe?g|png|tiff?|webp)$", re.I)
_IMAGE = re.compile(  # names of fields: img, image_paths, photoUrl, jpg
  r"^(?!(?:has|is|num)_)(.*_)?(image|img|picture|pic|photo|jpe?g|png|webp)s?_?\d*"
  r"(_(path|file|file_?name|name|url|uri|link|src|bytes|data|b64|base64)s?)*$"
)


def filled(row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the row without empty texts, by which tables mean absent ones.

  {"image": "a.jpg", "caption": ""} becomes {"image": "a.jpg"}.
  """
  empty = lambda v: isinstance(v, str) and not v.strip()
  return {k: v for k, v in row.items() if k not in LEARNABLE or not empty(v)}


def check_spelling(row: Mapping[str, Any]) -> None:
  """Refuses a field that differs from a known one only in spelling.

  Raises:
    lines.BadLine: there is one, such as "Caption".
  """
  plain = lambda name: re.sub(r"[^a-z]", "", name.lower())
  known = {plain(name): name for name in _CHECKED}
  for field in row.keys() - FIELDS[""]:
    meant = known.get(plain(field))
    if meant and meant not in row:
      raise lines.BadLine(f"has a field {field!r:.40}: write it {meant!r}")


def check_read(row: Mapping[str, Any], used: Collection[str]) -> None:
  """Refuses a row with known fields that were not used, and would be lost.

  The type of a question without a question is only warned of (`unknown`).

  Raises:
    lines.BadLine: there is such a field.
  """
  unread = FIELDS[""] - set(used) - set(KINDS)
  if left := sorted(f for f in unread if row.get(f) not in (None, "", [], {})):
    beside = " and ".join(sorted(row.keys() & set(used)))
    raise lines.BadLine(
      f"{' and '.join(left)} cannot be read beside {beside}: captions,"
      " questions and edits need an image as image, and text stands alone or"
      " beside one; leave out what is not to be learnt, or put it on a line of"
      " its own"
    )


def check_alone(row: Mapping[str, Any], within: str = "") -> None:
  """Refuses texts without an image if an unknown field looks like one.

  Args:
    row: a row, or a message of it.
    within: field that holds the message; "" for a row.

  Raises:
    lines.BadLine: there is such a field.
  """
  for field, value in row.items():
    if field in FIELDS[within]:
      continue
    if (image := _image_in(field, value)) is None:
      continue
    advice = "call it image, or leave it out"
    if "://" in image:
      advice = (
        "images are read from files, not from addresses: download it and"
        " give its path as image, or leave the field out"
      )
    where = f" in {within}" if within else ""
    raise lines.BadLine(
      f"has no image{where}, but a field {field!r:.40} that looks like one,"
      f" {image!r:.60}; {advice}"
    )


def hint(row: Mapping[str, Any]) -> str:
  """Returns advice on a row without anything usable, "" if there is none."""
  if isinstance(row.get("annotations"), list):
    return "; it looks like COCO's annotations: write a line for each image"
  if "answer" in row and "question" not in row:
    return "; an answer needs its question"
  others = [v for k, v in row.items() if k not in FIELDS[""]]
  if any(isinstance(v, str) and "://" in v for v in others):
    return (
      "; images are read from files, not from addresses: download them, and"
      " give their paths as image"
    )
  return ""


def unknown(
  row: Mapping[str, Any], used: Collection[str], within: str = ""
) -> Iterator[tuple[str, str]]:
  """Yields (field, text) of fields that hold text and are not read.

  Args:
    row: a row, or an item of one of its fields.
    used: fields that were read.
    within: field that holds the item; "" for a row.
  """
  for field, value in row.items():
    name = f"{within}.{field}" if within else field
    if field in FIELDS[within] and (field not in KINDS or field in used):
      inner = within or field
      if inner in FIELDS and isinstance(value, list):
        for item in value:
          if isinstance(item, dict):
            yield from unknown(item, FIELDS[inner], inner)
      continue
    plain = _plain(field)
    text = _text_in(value)
    origin = bool(_ORIGIN.search(plain)) and not _IMAGE.search(plain)
    if plain == "split":
      origin = value in _TRAINING_SPLITS  # "test" is not to be learnt
    if text is not None and not origin:
      yield name, text


def _plain(field):
  """Returns a field's name in one spelling: image_path for imagePath."""
  separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", field)
  return re.sub(r"\W", "_", separated).lower()


def _image_in(field, value):
  """Returns the first text in a value that may stand for an image, or None.

  Judges by the name of its field, and by its suffix. `lines` bounds the depth
  of the value.
  """
  if isinstance(value, str):
    named = _IMAGE.search(_plain(field)) and value.strip()
    path = re.split(r"[?#]", value)[0] if "://" in value else value
    like = _SUFFIX.search(path) or value.startswith("data:image/")
    return value if named or like else None
  if isinstance(value, list):
    inner = ((field, v) for v in value)
  elif isinstance(value, dict):
    named = _IMAGE.search(_plain(field))
    inner = ((field if named else k, v) for k, v in value.items())
  else:
    return None
  return next((p for k, v in inner if (p := _image_in(k, v))), None)


def _text_in(value):
  """Returns the first text with a letter in a value, None if there is none."""
  if isinstance(value, str):
    wordless = "://" in value or not any(c.isalpha() for c in value)
    return None if wordless else value
  if isinstance(value, (list, dict)):
    inner = value.values() if isinstance(value, dict) else value
    return next((t for v in inner if (t := _text_in(v)) is not None), None)
  return None
