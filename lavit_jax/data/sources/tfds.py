"""Reads any TFDS dataset with an image and a text feature, as a Source.

Reads through `tfds.data_source`, without TensorFlow. The dataset must have been
prepared with file_format="array_record" or "parquet"; of the latter TFDS reads
whole files whatever the slice of a split, so slices are cut here. Images are
decoded by `core.image_io`, not by TFDS, so that they look the same as from
other sources.
"""

import functools
import hashlib
import pathlib
import threading
from collections.abc import Sequence

import numpy as np
from etils import epath

from lavit_jax.core import errors
from lavit_jax.data import examples, faults
from lavit_jax.data.images import decoding
from lavit_jax.data.sources import caption_counts

_Bounds = tuple[int, int, int]  # first record, end, records of the file


class TfdsSource:
  """The records of one split; record i is image i.

  Every caption is an example, those of one record one after the other; a
  record may have none. Where the text feature is a sequence, all records are
  read once to count their captions, and the counts kept (`caption_counts`).

  Attributes:
    name: of dataset and split.
    image_size: height and width of the images, in pixels.
    num_images: number of records.
    files: (path, (first record, end, records of the file)) of each file.
    faults: the FaultLog of texts that are not UTF-8.
  """

  def __init__(
    self,
    name: str,
    split: str,
    *,
    image_size: int,
    image_feature: str = "image",
    text_feature: str = "caption",
    data_dir: str | None = None,
    limit_share: float = faults.LIMIT_SHARE,
    decode: decoding.Decode = decoding.exact,
  ) -> None:
    """Opens the split; decodes nothing but the texts of its first record.

    Args:
      name: name of the dataset ("coco_captions"), or the folder of a prepared
        one (".../coco_captions/2014/1.1.0").
      split: split as TFDS writes it, such as "train" or "train[:1000]".
      image_size: images are resized to this square.
      image_feature: path of the image feature, such as "image".
      text_feature: path of the text feature, one text or a sequence of them,
        such as "captions/text".
      data_dir: where TFDS keeps its data; None for its default.
      limit_share: share of texts that are not UTF-8 above which reading stops;
        such a text is left out and logged in `faults`.
      decode: makes the square of an encoded image.

    Raises:
      errors.DataError: the dataset, split or a feature does not exist, a
        feature is of another type, or the files are in a format that TFDS
        cannot read record by record.
    """
    self.image_size, self._square = int(image_size), decode
    self._image, self._text = image_feature, text_feature
    self._records, info = _open(name, split, image_feature, data_dir)
    self.name = f"tfds:{info.full_name}:{split}"
    for path in (image_feature, text_feature):
      _check_feature(self.name, info.features, path)
    self.files = _files(info, split)
    self.num_images = len(self._records)
    if not self.num_images:
      raise errors.DataError(
        f"{self.name} has no records; choose another split."
      )
    if not isinstance(first := self.encoded(0), bytes):
      raise errors.DataError(
        f"{self.name}: feature {image_feature!r} holds a"
        f" {type(first).__name__}, expected an encoded image. Set"
        " image_feature to another one (parts of a path joined by '/')."
      )
    self.faults = faults.FaultLog(f"texts of {self.name}", limit_share)
    self._captions = functools.lru_cache(maxsize=4096)(self._read_captions)
    self._lock = threading.Lock()
    self._ends: np.ndarray | None = None
    self._several = self._has_several()

  def _has_several(self):
    """Whether a record has a sequence of texts; DataError if it has no text."""
    value = _reach(self._records[0], self._text)
    several = not isinstance(value, (bytes, str)) and hasattr(value, "__len__")
    _decode_texts(self.name, self._text, value if several else [value])
    return several

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[size, size, 3]; ImageError for a bad one."""
    name = self.image_key(i)
    return self._square(self.encoded(i), self.image_size, name)

  def encoded(self, i: int) -> bytes:
    """Returns the encoded bytes of image i."""
    return _reach(self._records[i], self._image)

  def image_key(self, i: int) -> str:
    """Returns the name of image i: its dataset, split and record."""
    return f"{self.name}[{i}]"

  def _read_captions(self, i):
    value = _reach(self._records[i], self._text)
    values = [value] if isinstance(value, (bytes, str)) else list(value)
    texts = []
    for text in _decode_texts(self.name, self._text, values):
      if isinstance(text, str):
        texts.append(text)
        self.faults.good()
      else:
        self.faults.fault(self.image_key(i), f"a text is not UTF-8 ({text})")
    return tuple(t.strip() for t in texts if t.strip())

  def captions(self, i: int) -> list[str]:
    """Returns the captions of image i."""
    return list(self._captions(i))

  def tasks(self) -> tuple[str, ...]:
    """Returns image_text and text_image."""
    return tuple(examples.OF_CAPTIONS)

  def _caption_ends(self):
    """int64[n]: number of captions of records 0 … i, for each record i."""
    with self._lock:
      if self._ends is None:
        counts = caption_counts.of(
          self.num_images,
          lambda i: len(self._read_captions(i)),
          key=[self.contents(), *(_version_of(path) for path, _ in self.files)],
          name=self.name,
        )
        self._ends = np.cumsum(counts, dtype=np.int64)
      return self._ends

  def num_examples(self, task: str) -> int:
    """Returns the number of captions; of records where each has one text."""
    if task not in examples.OF_CAPTIONS:
      return 0
    return int(self._caption_ends()[-1]) if self._several else self.num_images

  def example(self, task: str, i: int) -> examples.Example:
    """Returns example i of a task.

    Raises:
      errors.DataError: the record has fewer captions than were counted.
    """
    which = 0  # of the record's captions
    if self._several:
      ends, number = self._caption_ends(), i
      i = int(np.searchsorted(ends, number, side="right"))
      which = number - (int(ends[i - 1]) if i else 0)
    captions = self.captions(i) or [""]  # of a single, empty text
    if which >= len(captions):
      raise errors.DataError(
        f"{self.image_key(i)} has {len(captions)} captions, but had more when"
        f" they were counted. Delete {caption_counts.folder()}."
      )
    return examples.OF_CAPTIONS[task](self.image_key(i), i, captions[which])

  def contents(self) -> str:
    """Returns a digest of dataset, split, features, files and records."""
    return self._digest(self.name, self.image_size, self._image, self._text)

  def stored(self) -> str:
    """Returns a digest of the image feature, the files and the records."""
    return self._digest(self._image)

  def _digest(self, *values):
    """Hashes values, then name, length and records of each file."""
    digest = hashlib.sha256()
    for value in values:
      digest.update(f"{value}\n".encode())
    for path, (begin, end, size) in self.files:
      file = epath.Path(path)
      part = file.name, file.stat().length, begin, end, size
      digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:32]


def overlap(one: TfdsSource, other: TfdsSource) -> int:
  """Returns the number of records that two splits share."""
  return sum(
    max(0, min(end, other_end) - max(begin, other_begin))
    for path, (begin, end, _) in one.files
    for other_path, (other_begin, other_end, _) in other.files
    if path == other_path
  )


def _open(name, split, image_feature, data_dir):
  """Returns (data source with encoded images, info) of a prepared dataset."""
  import tensorflow_datasets  # optional extra: slow to import, for one kind

  decoder = tensorflow_datasets.decode.SkipDecoding()
  for part in reversed(image_feature.split("/")):
    decoder = {part: decoder}
  try:
    if "/" in name and pathlib.Path(name).is_dir():
      builder = tensorflow_datasets.builder_from_directory(name)
    else:
      builder = tensorflow_datasets.builder(name, data_dir=data_dir)
    records = builder.as_data_source(split=split, decoders=decoder)
    records = _sliced(records, builder.info.splits[split].file_instructions)
  except errors.DataError:
    raise
  except Exception as error:  # TFDS has many, some from the file system
    reason = " ".join(str(error).split())[:300]
    raise errors.DataError(
      f"TFDS dataset {name!r}, split {split!r}, cannot be opened ({reason})."
      " Check the name, split and data_dir; prepare it once with"
      ' builder.download_and_prepare(file_format="array_record"), as only'
      " array_record and parquet are read without TensorFlow."
    ) from error
  return records, builder.info


def _decode_texts(name, path, values):
  """Returns each text as a str, or the UnicodeError of one that is not UTF-8.

  Raises:
    errors.DataError: a value is not a text.
  """
  texts = []
  for value in values:
    if not isinstance(value, (bytes, str)):
      raise errors.DataError(
        f"{name}: feature {path!r} holds {value!r:.60}, a"
        f" {type(value).__name__}, expected a text or a sequence of texts. Set"
        " text_feature to another one (parts of a path joined by '/')."
      )
    try:
      texts.append(value.decode() if isinstance(value, bytes) else value)
    except UnicodeDecodeError as error:
      texts.append(error)
  return texts


class _Slice:
  """Some records of a data source, by their numbers in it."""

  def __init__(self, records, numbers):
    self._records, self._numbers = records, numbers

  def __len__(self):
    return len(self._numbers)

  def __getitem__(self, i):
    return self._records[int(self._numbers[i])]


def _sliced(records, instructions):
  """Returns the records of a split, from a source that may have more.

  TFDS's source of parquet files has all records of each file, in the order of
  the instructions.

  Raises:
    errors.DataError: the source has neither the records of the split nor all.
  """
  bounds = [_bounds(part) for part in instructions]
  wanted = sum(end - begin for begin, end, _ in bounds)
  if len(records) == wanted:
    return records
  total = sum(size for _, _, size in bounds)
  if len(records) != total:
    raise errors.DataError(
      f"The split has {wanted} records of files with {total}, but TFDS reads"
      f" {len(records)}. Prepare the dataset again, with"
      ' file_format="array_record".'
    )
  starts = np.cumsum([0, *(size for _, _, size in bounds)])
  numbers = [
    np.arange(start + begin, start + end)
    for start, (begin, end, _) in zip(starts[:-1], bounds, strict=True)
  ]
  return _Slice(records, np.concatenate(numbers))


def _bounds(part) -> _Bounds:
  """Returns the records that one of TFDS's file instructions names."""
  size = part.examples_in_shard
  end = size if part.take < 0 else min(part.skip + part.take, size)
  return part.skip, end, size


def _version_of(path):
  """Returns a file's path, time of change and length."""
  stat = epath.Path(path).stat()
  return str(path), stat.mtime, stat.length


def _files(info, split) -> Sequence[tuple[str, _Bounds]]:
  """Returns path and records of each file of a split."""
  parts = info.splits[split].file_instructions
  return [(str(part.filename), _bounds(part)) for part in parts]


def _check_feature(name, features, path):
  """Raises DataError, with the existing features, unless `path` is one."""
  for part in path.split("/"):
    known = list(features.keys()) if hasattr(features, "keys") else []
    if part not in known:
      raise errors.DataError(
        f"{name} has no feature {path!r}: {part!r} is not one of {known}. Set"
        " image_feature and text_feature (parts of a path joined by '/')."
      )
    features = features[part]
  if hasattr(features, "keys"):
    first, *_ = features.keys()
    raise errors.DataError(
      f"{name}: feature {path!r} is a group of {list(features.keys())},"
      f" expected one of these: give its path, such as '{path}/{first}'."
    )


def _reach(record, path):
  """Returns the value at a path "a/b" of a record."""
  for part in path.split("/"):
    record = record[part]
  return record.item() if isinstance(record, np.generic) else record
