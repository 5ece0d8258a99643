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

import numpy as np

from lavit_jax.data.indexes import tar_groups, tar_members, tar_runs

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
_MOST_IMAGE = 1 << 32  # bytes
_MOST_STRINGS = 1 << 32  # bytes of all names, and of all captions
_BOM = b"\xef\xbb\xbf"
_OWN = re.compile(b"__[^/]*__(/|$)")  # metadata of WebDataset
_NONE = tar_members.Member(b"", 0, 0)


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
  window = tar_members.Window(read, length)
  found = _Found(window)
  for some in tar_members.runs(window):
    if isinstance(some, tar_runs.Run):
      found.add_run(some)
    elif isinstance(some, tar_members.Odd):
      found.faults.add(some.name, some.reason)
    else:
      found.add(some)
  return found.samples()


class _Found:
  """Samples in the order of the archive, as they are found.

  Attributes:
    faults: what is left out.
  """

  def __init__(self, window):
    self.faults = _Faults()
    self._window = window
    self._columns: list[np.ndarray] = []
    self._rows: list[tuple] = []  # behind those of the columns
    self._names: list[bytes] = []
    self._captions: list[bytes] = []
    # The sample of the last file: its name, its files, a field it has twice.
    self._name, self._fields, self._twice = b"", {}, b""

  def add_run(self, run: tar_runs.Run) -> None:
    """Adds the files of a run."""
    groups = tar_groups.of(run, IMAGES)
    if groups is None:
      self._add_files(run)
      return
    self._add_files(run.part(0, int(groups.first[0])))
    self._end()
    text, json_file = groups.text, groups.json
    text = np.where(text == tar_groups.NONE, json_file, text)
    sizes = np.where(text == tar_groups.NONE, 0, run.sizes[text])
    usual = (groups.image != tar_groups.NONE) & (sizes <= _MOST_TEXT)
    size = run.sizes[groups.image]
    usual &= (size > 0) & (size < _MOST_IMAGE)
    places = zip(run.starts[text].tolist(), sizes.tolist(), strict=True)
    captions, lengths = [], []
    for i, (start, count) in enumerate(places):
      try:
        data = self._window.read(start, count) if count and usual[i] else b""
        found = caption(data, text[i] == json_file[i]) if data else ""
      except ValueError:  # counted file by file
        usual[i], found = False, ""
      captions.append(found.encode())
      lengths.append(len(found))
    columns = np.zeros(len(usual), COLUMNS)
    for name, file in (("image", groups.image), ("json", json_file)):
      there = file != tar_groups.NONE
      columns[name] = np.where(there, run.starts[file] // _BLOCK, 0)
      columns[f"{name}_size"] = np.where(there, run.sizes[file], 0)
    columns["length"] = lengths
    self._add_groups(run, groups, usual, columns, captions)
    self._add_files(run.part(int(groups.stop[-1]), len(run.sizes)))

  def _add_groups(self, run, groups, usual, columns, captions):
    """Adds the usual samples of a run, and the others file by file."""
    begin = 0
    for i in [*np.flatnonzero(~usual).tolist(), len(usual)]:
      if begin < i:
        self._flush()
        self._columns.append(columns[begin:i])
        self._names += groups.names[begin:i]
        self._captions += captions[begin:i]
      if i < len(usual):
        self._add_files(run.part(int(groups.first[i]), int(groups.stop[i])))
        self._end()
      begin = i + 1

  def _add_files(self, run):
    for file in run.files():
      self.add(tar_members.Member(*file))

  def add(self, member: tar_members.Member) -> None:
    """Adds a file."""
    path = member.name
    base = path.rfind(b"/") + 1
    dot = path.find(b".", base)
    # No field; a hidden file, such as those of macOS; WebDataset's own.
    if dot <= base or (path.startswith(b"__") and _OWN.match(path)):
      return
    if path[:dot] != self._name:
      self._end()
      self._name = path[:dot]
    field = path[dot + 1 :].lower()
    if field in self._fields and not self._twice:
      self._twice = field
      self.faults.add(self._name, f"has two files .{shown(field)}")
    self._fields[field] = member

  def _end(self):
    """Ends the sample of the last file; none if it has a field twice."""
    name, fields, twice = self._name, self._fields, self._twice
    self._name, self._fields, self._twice = b"", {}, b""
    if not fields or twice:
      return
    row, text = _row(self._window, name, fields, self.faults)
    if row is not None:
      self._rows.append(row)
      self._names.append(name)
      self._captions.append(text)

  def _flush(self):
    if self._rows:
      self._columns.append(np.array(self._rows, COLUMNS))
      self._rows = []

  def samples(self) -> Samples:
    """Returns all samples, sorted by name.

    Raises:
      tar_members.NoTar: their names or captions are too long.
    """
    self._end()
    self._flush()
    names, captions = self._names, self._captions
    order = sorted(range(len(names)), key=names.__getitem__)
    names, captions = ([some[j] for j in order] for some in (names, captions))
    columns = np.concatenate([np.zeros(0, COLUMNS), *self._columns])[order]
    columns["hash"] = [zlib.crc32(name) for name in names]
    for end, strings in (("name_end", names), ("caption_end", captions)):
      ends = np.cumsum([len(string) for string in strings], dtype=np.int64)
      if len(ends) and ends[-1] >= _MOST_STRINGS:
        raise tar_members.NoTar("has names or captions of more than 4 GB")
      columns[end] = ends
    found = self.faults.found
    return Samples(columns, b"".join(names), b"".join(captions), found)


class _Faults:
  """Counts what is left out, by reason."""

  def __init__(self):
    self.found: dict[str, list] = {}

  def add(self, name: bytes, reason: str) -> None:
    entry = self.found.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < _NAMED:
      entry[1].append(shown(name))


def _row(window, name, fields, faults):
  """Returns (row of COLUMNS, UTF-8 of the caption); (None, b"") of none.

  What is of the name, and of all samples together, is zero in the row.
  """
  image = _image(fields)
  if image is None:
    faults.add(name, "has no image")
    return None, b""
  if not 0 < image.size < _MOST_IMAGE:
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
