"""Any TFDS dataset with an image and a text feature, as a Source.

Read through `tfds.data_source`: no TensorFlow at run time. The dataset must
have been prepared with file_format="array_record" or "parquet"; of the latter
TFDS itself reads whole files whatever the slice of a split, so that slices are
cut here. Images are decoded by `core.images`, not by TFDS, so that they look
the same as anywhere else.
"""

import functools
import hashlib
import pathlib
import threading

import numpy as np
import tensorflow_datasets
from etils import epath

from lavit_jax.core import errors, image_io
from lavit_jax.data import examples, faults
from lavit_jax.data.sources import caption_counts

_TASKS = ("image_text", "text_image")


class TfdsSource:
  """Records of one split; record i is image i.

  Every caption is an example, those of a record one after the other; a record
  may have none. Where the text feature is a sequence, all records are read
  once to count them, and the counts kept (`caption_counts`).
  """

  def __init__(
    self,
    name,
    split,
    *,
    image_size,
    image_feature="image",
    text_feature="caption",
    data_dir=None,
    limit_share=faults.LIMIT_SHARE,
  ):
    """Opens the split; decodes nothing but the texts of its first record.

    Args:
      name: name of the dataset ("coco_captions"), or the folder of a prepared
        one (".../coco_captions/2014/1.1.0").
      split: split in TFDS's words, such as "train" or "train[:1000]".
      image_size: images are resized to this square.
      image_feature: path of the image feature, such as "image".
      text_feature: path of the text feature, one text or a sequence of them,
        such as "captions/text".
      data_dir: where TFDS keeps its data; None for its default.
      limit_share: share of records with a text that is no UTF-8 that is an
        error; such a text is left out, and named in `faults`.

    Raises:
      errors.DataError: the dataset, split or a feature is not there, a feature
        is of another type, or the files are in a format that cannot be read by
        record.
    """
    self.image_size = int(image_size)
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
    self._lock, self._ends = threading.Lock(), None
    self._several = self._has_several()

  def _has_several(self):
    """Whether a record has a sequence of texts; DataError if it has none."""
    value = _reach(self._records[0], self._text)
    several = not isinstance(value, (bytes, str)) and hasattr(value, "__len__")
    _texts(self.name, self._text, value if several else [value])
    return several

  def image(self, i):
    """Image i as uint8[size, size, 3]; images.ImageError for a bad one."""
    loaded = image_io.load(self.encoded(i), name=self.image_key(i))
    return image_io.to_uint8(loaded, self.image_size)

  def encoded(self, i):
    """Image i at its own size, as `images.load` takes it."""
    return _reach(self._records[i], self._image)

  def image_key(self, i):
    """Name of image i: its dataset, split and record."""
    return f"{self.name}[{i}]"

  def _read_captions(self, i):
    value = _reach(self._records[i], self._text)
    values = [value] if isinstance(value, (bytes, str)) else list(value)
    texts = []
    for text in _texts(self.name, self._text, values):
      if isinstance(text, str):
        texts.append(text)
        self.faults.good()
      else:
        self.faults.fault(self.image_key(i), f"a text is no UTF-8 ({text})")
    return tuple(t.strip() for t in texts if t.strip())

  def captions(self, i):
    """The captions of image i, list[str]."""
    return list(self._captions(i))

  def tasks(self):
    """image_text and text_image."""
    return _TASKS

  def _last(self):
    """int64[n]: captions of the records up to each, itself included."""
    with self._lock:
      if self._ends is None:
        counts = caption_counts.of(
          self.num_images,
          lambda i: len(self._read_captions(i)),
          key=[self.contents(), *(_changed(path) for path, _ in self.files)],
          name=self.name,
        )
        self._ends = np.cumsum(counts, dtype=np.int64)
      return self._ends

  def num_examples(self, task):
    """Number of captions, or of records where each has one text."""
    if task not in _TASKS:
      return 0
    return int(self._last()[-1]) if self._several else self.num_images

  def example(self, task, i):
    """Example i of a task."""
    turn = 0
    if self._several:
      ends, number = self._last(), i
      i = int(np.searchsorted(ends, number, side="right"))
      turn = number - (int(ends[i - 1]) if i else 0)
    captions = self.captions(i) or [""]  # of a single, empty text
    if turn >= len(captions):
      raise errors.DataError(
        f"{self.image_key(i)} has {len(captions)} captions, but had more when"
        f" they were counted. Delete {caption_counts.folder()}."
      )
    caption = captions[turn]
    build = getattr(examples, task)
    return build(self.image_key(i), i, caption)

  def contents(self) -> str:
    """Digest of dataset, split, features and which records of which files."""
    return self._digest(self.name, self.image_size, self._image, self._text)

  def stored(self) -> str:
    """Digest of which feature of which records of which files images are."""
    return self._digest(self._image)

  def _digest(self, *told):
    digest = hashlib.sha256()
    for part in told:
      digest.update(f"{part}\n".encode())
    for path, (begin, end, size) in self.files:
      file = epath.Path(path)
      told = file.name, file.stat().length, begin, end, size
      digest.update(f"{told}\n".encode())
    return digest.hexdigest()[:32]


def overlap(one: TfdsSource, other: TfdsSource) -> int:
  """Number of records that two splits share."""
  return sum(
    max(0, min(end, last) - max(begin, first))
    for path, (begin, end, _) in one.files
    for path_too, (first, last, _) in other.files
    if path == path_too
  )


def _open(name, split, image_feature, data_dir):
  """(data source with undecoded images, info) of a prepared dataset."""
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


def _texts(name, path, values):
  """Each text as a str, or as the UnicodeError of one that is none."""
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
  """Some records of a data source, by their numbers there."""

  def __init__(self, records, numbers):
    self._records, self._numbers = records, numbers

  def __len__(self):
    return len(self._numbers)

  def __getitem__(self, i):
    return self._records[int(self._numbers[i])]


def _sliced(records, instructions):
  """The records that a split names, of a source that may have more.

  TFDS's source of parquet files has all records of each file, in the order of
  the instructions.

  Raises:
    errors.DataError: it has neither these nor those.
  """
  bounds = [_bounds(part) for part in instructions]
  wanted = sum(end - begin for begin, end, _ in bounds)
  if len(records) == wanted:
    return records
  whole = sum(size for _, _, size in bounds)
  if len(records) != whole:
    raise errors.DataError(
      f"The split has {wanted} records of files with {whole}, but TFDS reads"
      f" {len(records)}. Prepare the dataset again, with"
      ' file_format="array_record".'
    )
  starts = np.cumsum([0, *(size for _, _, size in bounds)])
  numbers = [
    np.arange(start + begin, start + end)
    for start, (begin, end, _) in zip(starts[:-1], bounds, strict=True)
  ]
  return _Slice(records, np.concatenate(numbers))


def _bounds(part):
  """(first, end, records of the file) of one of TFDS's file instructions."""
  size = part.examples_in_shard
  end = size if part.take < 0 else min(part.skip + part.take, size)
  return part.skip, end, size


def _changed(path):
  """When a file was changed, and how long it is."""
  found = epath.Path(path).stat()
  return str(path), found.mtime, found.length


def _files(info, split):
  """[(path, (first record, end, records of the file))] of a split."""
  parts = info.splits[split].file_instructions
  return [(str(part.filename), _bounds(part)) for part in parts]


def _check_feature(name, features, path):
  """Raises DataError naming the features there are."""
  for part in path.split("/"):
    known = list(features.keys()) if hasattr(features, "keys") else []
    if part not in known:
      raise errors.DataError(
        f"{name} has no feature {path!r}: {part!r} is none of {known}. Set"
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
  """The value under a path "a/b" of a record."""
  for part in path.split("/"):
    record = record[part]
  return record.item() if isinstance(record, np.generic) else record
