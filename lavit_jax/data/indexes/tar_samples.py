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
  *(b"jpg", b"jpeg", b"png", b"webp", b"gif", b"bmp", b"tif", b"tiff"),
  *(b"avif", b"jfif", b"jpe", b"jp2", b"ppm", b"pgm", b"pbm", b"pnm"),
  *(b"heic", b"img", b"image"),
)
_MOST_TEXT = 1 << 20  # bytes of a caption, or of a json with one
_NAMED = 20  # faults of a kind whose names are kept

# A place in the archive is a number of blocks and of bytes: 2 TB of archive.
COLUMNS = np.dtype(
  [
    ("image", "<u4"),  # first block of the image
    ("image_size", "<u4"),
    ("json", "<u4"),
    ("json_size", "<u4"),  # 0: no json
    ("hash", "<u4"),  # CRC-32 of the name, which divides into splits
    ("name_end", "<u4"),  # in the names of all samples, one after the other
    ("caption_end", "<u4"),  # in their captions; an empty one is none
    ("length", "<u4"),  # characters of the caption
  ]
)
_BLOCK = 512
_MOST_ARCHIVE = 1 << 41  # bytes
_MOST_STRINGS = 1 << 32  # bytes of all names, and of all captions
_BOM = b"\xef\xbb\xbf"
_OWN = re.compile(b"__[^/]*__(/|$)")  # metadata of WebDataset
_NONE = tar_members.Member(b"", 0, 0)
_Fields = dict[bytes, tar_members.Member]


@dataclasses.dataclass
class Samples:
  """The samples of an archive, sorted by name.

  Attributes:
    columns: COLUMNS[n], a row each.
    names: of all samples, one after the other, as they are in the archive.
    captions: of all samples, one after the other, in UTF-8.
    faults: reason -> [how often, names of the first ones], of what is left
      out.
  """

  columns: np.ndarray
  names: bytes = b""
  captions: bytes = b""
  faults: dict[str, list] = dataclasses.field(default_factory=dict)


def of(read: tar_members.Read, length: int) -> Samples:
  """Returns the samples of an archive.

  Args:
    read: of the archive.
    length: of the archive, in bytes.

  Raises:
    tar_members.NoTar: it is none, or larger than 2 TB, or its names or
      captions are more than 4 GB.
  """
  if length > _MOST_ARCHIVE:
    raise tar_members.NoTar("is larger than 2 TB")
  faults, window = _Faults(), tar_members.Window(read, length)
  rows, names, captions = [], [], []
  for name, fields in _groups(tar_members.members(window), faults):
    row, text = _row(window, name, fields, faults)
    if row is None:
      continue
    rows.append(row)
    names.append(name)
    captions.append(text)
  order = sorted(range(len(rows)), key=names.__getitem__)
  names, captions = ([some[j] for j in order] for some in (names, captions))
  columns = np.fromiter((rows[j] for j in order), COLUMNS, len(rows))
  columns["hash"] = [zlib.crc32(name) for name in names]
  for end, strings in (("name_end", names), ("caption_end", captions)):
    ends = np.cumsum([len(string) for string in strings], dtype=np.int64)
    if len(ends) and ends[-1] >= _MOST_STRINGS:
      raise tar_members.NoTar("has names or captions of more than 4 GB")
    columns[end] = ends
  return Samples(columns, b"".join(names), b"".join(captions), faults.found)


class _Faults:
  """Counts what is left out, by reason."""

  def __init__(self):
    self.found: dict[str, list] = {}

  def add(self, name: bytes, reason: str) -> None:
    entry = self.found.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < _NAMED:
      entry[1].append(shown(name))


def _groups(
  members: Iterator[tar_members.Member | tar_members.Odd], faults: _Faults
) -> Iterator[tuple[bytes, _Fields]]:
  """Yields (name, fields) of each sample; none of one with a field twice."""
  name = b""
  fields: _Fields = {}
  twice = b""  # a field that the sample has two of
  for member in members:
    if isinstance(member, tar_members.Odd):
      faults.add(member.name, member.reason)
      continue
    path = member.name
    base = path.rfind(b"/") + 1
    dot = path.find(b".", base)
    # No field; a hidden file, such as those of macOS; WebDataset's own.
    if dot <= base or (path.startswith(b"__") and _OWN.match(path)):
      continue
    if path[:dot] != name:
      if fields and not twice:
        yield name, fields
      name, fields, twice = path[:dot], {}, b""
    field = path[dot + 1 :].lower()
    if field in fields and not twice:
      twice = field
      faults.add(name, f"has two files .{shown(field)}")
    fields[field] = member
  if fields and not twice:
    yield name, fields


def _row(window, name, fields, faults):
  """Returns (row of COLUMNS, UTF-8 of the caption); (None, b"") of none.

  What is of the name, and of all samples together, is zero in the row.
  """
  image = _image(fields)
  if image is None:
    faults.add(name, "has no image")
    return None, b""
  if not 0 < image.size < 1 << 32:
    faults.add(name, f"has an image of {image.size} bytes")
    return None, b""
  json_file = fields.get(b"json", _NONE)
  text_file = fields.get(b"txt", json_file)
  text = ""
  try:
    if text_file.size > _MOST_TEXT:
      raise ValueError("has a caption file of more than 1 MiB")
    if text_file.size:
      data = window.read(text_file.start, text_file.size)
      text = caption(data, text_file is json_file)
  except ValueError as error:
    faults.add(name, str(error))
    return None, b""
  places = image.start // _BLOCK, image.size, json_file.start // _BLOCK
  return (*places, json_file.size, 0, 0, 0, len(text)), text.encode()


def _image(fields):
  """Returns the image among the files of a sample; None if there is none."""
  for kind in IMAGES:
    if kind in fields:
      return fields[kind]
  return None


def shown(name: bytes) -> str:
  """Returns a name as text; what is not UTF-8 as in "caf\\xe9"."""
  return name.decode(errors="backslashreplace")


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
    return data.removeprefix(_BOM).decode().strip()
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
