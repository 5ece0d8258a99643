"""Groups the files of a tar archive into samples, as WebDataset does.

A sample is a run of files whose names agree up to the first dot of the last
part: "d/17.jpg" and "d/17.txt" are fields jpg and txt of sample d/17. Its image
is its first field of IMAGES; its caption is the text of its field txt, or else
the "caption" of its field json.

The archive of a downloader holds samples in the order in which they arrived,
another one each time: here they are sorted by name.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Iterator

import numpy as np

from lavit_jax.data.indexes import tar_members

# Names that are taken for images. What the bytes are is seen when they are
# decoded: downloaders write .jpg for whatever they got.
IMAGES = (
  *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
  *("jfif", "jpe", "jp2", "ppm", "pgm", "pbm", "pnm", "heic", "img", "image"),
)
_MOST_TEXT = 1 << 20  # bytes of a caption, or of a json with one
_NAMED = 20  # faults of a kind whose names are kept

# A place in the archive is a number of blocks and of bytes: 2 TB of archive.
COLUMNS = np.dtype(
  [
    ("image", "<u4"),  # first block of the image
    ("image_size", "<u4"),
    ("text", "<u4"),  # first block of the file with the caption
    ("text_size", "<u4"),  # 0: no caption
    ("json", "<u4"),
    ("json_size", "<u4"),  # 0: no json
    ("hash", "<u4"),  # CRC-32 of the name, which divides into splits
    ("name_end", "<u4"),  # in the names of all samples, one after the other
    ("length", "<u2"),  # characters of the caption, at most 65,535
    ("text_is_json", "u1"),
  ]
)
_BLOCK = 512
_MOST_ARCHIVE = 1 << 41  # bytes
_OWN = re.compile("__[^/]*__(/|$)")  # metadata of WebDataset
_NONE = tar_members.Member("", 0, 0)
_Fields = dict[str, tar_members.Member]


@dataclasses.dataclass
class Samples:
  """The samples of an archive, sorted by name.

  Attributes:
    columns: COLUMNS[n], a row each.
    names: of all samples, one after the other, as they are in the archive.
    texts: CRC-32 of all captions.
    faults: reason -> [how often, names of the first ones], of what is left
      out.
  """

  columns: np.ndarray
  names: bytes
  texts: int = 0
  faults: dict[str, list] = dataclasses.field(default_factory=dict)


def of(read: tar_members.Read, length: int) -> Samples:
  """Returns the samples of an archive.

  Args:
    read: of the archive.
    length: of the archive, in bytes.

  Raises:
    tar_members.NoTar: it is none, or larger than 2 TB.
  """
  if length > _MOST_ARCHIVE:
    raise tar_members.NoTar("is larger than 2 TB")
  faults, window = _Faults(), tar_members.Window(read, length)
  rows, names, texts = [], [], []
  for name, fields in _groups(tar_members.members(window), faults):
    row, text = _row(window, name, fields, faults)
    if row is None:
      continue
    rows.append(row)
    names.append(_bytes(name))
    texts.append(zlib.crc32(text.encode()))
  order = sorted(range(len(rows)), key=names.__getitem__)
  names = [names[j] for j in order]
  columns = np.array([rows[j] for j in order], COLUMNS)
  columns["name_end"] = np.cumsum([len(name) for name in names])
  columns["hash"] = [zlib.crc32(name) for name in names]
  digest = np.array([texts[j] for j in order], "<u4").tobytes()
  return Samples(columns, b"".join(names), zlib.crc32(digest), faults.found)


class _Faults:
  """Counts what is left out, by reason."""

  def __init__(self):
    self.found: dict[str, list] = {}

  def add(self, name: str, reason: str) -> None:
    entry = self.found.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < _NAMED:
      entry[1].append(shown(_bytes(name)))


def _groups(
  members: Iterator[tar_members.Member | tar_members.Odd], faults: _Faults
) -> Iterator[tuple[str, _Fields]]:
  """Yields (name, fields) of each sample; none of one with a field twice."""
  name: str = ""
  fields: _Fields = {}
  twice = ""  # a field that the sample has two of
  for member in members:
    if isinstance(member, tar_members.Odd):
      faults.add(member.name, member.reason)
      continue
    path = member.name
    base = path.rfind("/") + 1
    dot = path.find(".", base)
    # No field; a hidden file, such as those of macOS; WebDataset's own.
    if dot <= base or (path.startswith("__") and _OWN.match(path)):
      continue
    if path[:dot] != name:
      if fields and not twice:
        yield name, fields
      name, fields, twice = path[:dot], {}, ""
    field = path[dot + 1 :].lower()
    if field in fields and not twice:
      twice = field
      faults.add(name, f"has two files .{field}")
    fields[field] = member
  if fields and not twice:
    yield name, fields


def _row(window, name, fields, faults):
  """Returns (row without name and hash, the caption), or (None, "")."""
  image = next((fields[kind] for kind in IMAGES if kind in fields), None)
  if image is None:
    faults.add(name, "has no image")
    return None, ""
  if not 0 < image.size < 1 << 32:
    faults.add(name, f"has an image of {image.size} bytes")
    return None, ""
  json_file = fields.get("json", _NONE)
  text_file = fields.get("txt", json_file)
  text = ""
  try:
    if text_file.size > _MOST_TEXT:
      raise ValueError("has a caption file of more than 1 MiB")
    if text_file.size:
      data = window.read(text_file.start, text_file.size)
      text = caption(data, text_file is json_file)
  except ValueError as error:
    faults.add(name, str(error))
    return None, ""
  if not text:
    text_file = _NONE
  row = (
    image.start // _BLOCK,
    image.size,
    text_file.start // _BLOCK,
    text_file.size,
    json_file.start // _BLOCK,
    json_file.size,
    0,
    0,
    min(len(text), 65_535),
    text_file is json_file and text != "",
  )
  return row, text


def shown(name: bytes) -> str:
  """Returns a name as text; what is not UTF-8 as in "caf\\xe9"."""
  return name.decode(errors="backslashreplace")


def _bytes(name):
  """Returns the bytes of a name that `tar_members` decoded."""
  return name.encode(errors="surrogateescape")


def caption(data: bytes, is_json: bool) -> str:
  """Returns the caption in a file of a sample; "" if there is none.

  Args:
    data: contents of the file.
    is_json: whether it is the sample's json.

  Raises:
    ValueError: it is no UTF-8, or no JSON object with a text.
  """
  return _caption_of(data) if is_json else _text(data)


def _text(data):
  """Returns a text without the white space around it."""
  try:
    return data.decode("utf-8-sig").strip()
  except UnicodeDecodeError as error:
    raise ValueError("has a caption that is not UTF-8") from error


def _caption_of(data):
  """Returns the caption in a json; "" if it is null or absent."""
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise ValueError("has a json that cannot be read") from error
  found = value.get("caption") if isinstance(value, dict) else None
  if found is None:
    return ""
  if not isinstance(found, str):
    raise ValueError("has a json whose caption is no text")
  try:
    found.encode()
  except UnicodeEncodeError as error:  # half of a character
    raise ValueError("has a caption that is not UTF-8") from error
  return found.strip()
