"""Names of fields in a user's file: which are read, and what the others hold.

A field that is not read is either refused, where the line would be taken for
something else without it, or told of in one warning a file.
"""

import re

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
    *("image", "image_url", "path", "url", "write"),
  }
  for field in MESSAGES
}
SAYING = FIELDS[""] - {"images", "filepath", *IMAGES}
# Those that would change what a line is, were they misspelt.
_SPELT = (*sorted(SAYING - set(KINDS)), "image", "file_name")
# Fields that say where a line comes from, not what it is about.
_ABOUT = re.compile(
  r"(^|_)(id|url|key|source|repo|split|license|date|time|hash|sha256|md5|lang"
  r"|language|dataset|format|shard|path)s?$"
)
_TRAINED = ("train", "restval")  # the latter of Karpathy's splits of COCO
_ENDING = re.compile(r"\.(avif|bmp|gif|heic|jpe?g|png|tiff?|webp)$", re.I)
_IMAGE = re.compile(  # names of fields: img, image_paths, photoUrl, jpg
  r"^(?!(?:has|is|num)_)(.*_)?(image|img|picture|pic|photo|jpe?g|png|webp)s?_?\d*"
  r"(_(path|file|file_?name|name|url|uri|link|src|bytes|data|b64|base64)s?)*$"
)


def filled(row):
  """The row without texts that are empty: so tables write what is not there.

  {"image": "a.jpg", "caption": ""} becomes {"image": "a.jpg"}.
  """
  empty = lambda v: isinstance(v, str) and not v.strip()
  return {k: v for k, v in row.items() if k not in SAYING or not empty(v)}


def check_spelling(row):
  """Refuses a field that is a known one but for its spelling."""
  plain = lambda name: re.sub(r"[^a-z]", "", name.lower())
  known = {plain(name): name for name in _SPELT}
  for field in row.keys() - FIELDS[""]:
    meant = known.get(plain(field))
    if meant and meant not in row:
      raise lines.BadLine(f"has a field {field!r:.40}: write it {meant!r}")


def check_read(row, used):
  """Refuses a row with known fields that were not used: they would be lost.

  A kind of question beside none is only told of (`unknown`).
  """
  left = FIELDS[""] - set(used) - set(KINDS)
  if left := sorted(f for f in left if row.get(f) not in (None, "", [], {})):
    beside = " and ".join(sorted(row.keys() & set(used)))
    raise lines.BadLine(
      f"{' and '.join(left)} cannot be read beside {beside}: captions,"
      " questions and edits need an image as image, and text stands alone or"
      " beside one; leave out what is not to be learnt, or write a line of its"
      " own for it"
    )


def check_alone(row, within=""):
  """Refuses words without an image beside what looks like one."""
  for field, value in row.items():
    if field in FIELDS[within]:
      continue
    if (found := _image_in(field, value)) is None:
      continue
    way = "call it image, or leave it out"
    if "://" in found:
      way = (
        "images are read from files, not from addresses: download it and"
        " give its path as image, or leave the field out"
      )
    place = f" in {within}" if within else ""
    raise lines.BadLine(
      f"has no image{place}, but a field {field!r:.40} that looks like one,"
      f" {found!r:.60}; {way}"
    )


def hint(row):
  """What a row without anything usable may be meant as."""
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


def unknown(row, used, within=""):
  """Yields (field, text) of fields that carry text and are not read."""
  for field, value in row.items():
    name = f"{within}.{field}" if within else field
    if field in FIELDS[within] and (field not in KINDS or field in used):
      inner = within or field
      if inner in FIELDS and isinstance(value, list):
        for one in value:
          if isinstance(one, dict):
            yield from unknown(one, FIELDS[inner], inner)
      continue
    plain = _plain(field)
    text = _text_in(value)
    about = _ABOUT.search(plain) and not _IMAGE.search(plain)
    if plain == "split":
      about = value in _TRAINED  # "test" is not to be learnt
    if text is not None and not about:
      yield name, text


def _plain(field):
  """A field's name in one spelling: imagePath is image_path."""
  parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", field)
  return re.sub(r"\W", "_", parted).lower()


def _image_in(field, value):
  """The first text in a value that may stand for an image, or None.

  By the name of its field, or by what it ends with. The value's depth is
  bounded by `lines`.
  """
  if isinstance(value, str):
    named = _IMAGE.search(_plain(field)) and value.strip()
    path = re.split(r"[?#]", value)[0] if "://" in value else value
    like = _ENDING.search(path) or value.startswith("data:image/")
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
  """The first text with a letter in a value, None if there is none."""
  if isinstance(value, str):
    wordless = "://" in value or not any(c.isalpha() for c in value)
    return None if wordless else value
  if isinstance(value, (list, dict)):
    inner = value.values() if isinstance(value, dict) else value
    return next((t for v in inner if (t := _text_in(v)) is not None), None)
  return None
