"""Any TFDS dataset with an image and a text feature, as a Source.

Read through `tfds.data_source`: no TensorFlow at run time. The dataset must
have been prepared with file_format="array_record". Pictures are decoded by
`lavit_jax.images`, not by TFDS, so that they look the same as anywhere else.
"""

import functools
import pathlib

import numpy as np
import tensorflow_datasets

from lavit_jax import errors, images
from lavit_jax.data import examples, faults

_TASKS = ("image_text", "text_image")


class TfdsSource:
  """Records of one split; record i is picture i.

  Example i of a task is record i % n with its caption number i // n, where n
  is the number of records; the first record says how many captions there are.
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
      image_size: pictures are resized to this square.
      image_feature: path of the image feature, such as "image".
      text_feature: path of the text feature, one text or a sequence of them,
        such as "captions/text".
      data_dir: where TFDS keeps its data; None for its default.
      limit_share: share of records with a text that is no UTF-8 that is an
        error; such a text is left out, and named in `faults`.

    Raises:
      errors.DataError: the dataset, split or a feature is not there, or a
        feature is of another type.
    """
    self.image_size = int(image_size)
    self._image, self._text = image_feature, text_feature
    self._records, info = _open(name, split, image_feature, data_dir)
    self.name = f"tfds:{info.full_name}:{split}"
    for path in (image_feature, text_feature):
      _check_feature(self.name, info.features, path)
    self.num_images = len(self._records)
    if not self.num_images:
      raise errors.DataError(
        f"{self.name} has no records; choose another split."
      )
    if not isinstance(first := self.encoded(0), bytes):
      raise errors.DataError(
        f"{self.name}: feature {image_feature!r} holds a"
        f" {type(first).__name__}, expected an encoded picture. Set"
        " image_feature to another one (parts of a path joined by '/')."
      )
    self.faults = faults.FaultLog(f"records of {self.name}", limit_share)
    self._captions = functools.lru_cache(maxsize=4096)(self._read_captions)
    self._per_record = max(1, len(self.captions(0)))

  def image(self, i):
    """Picture i as uint8[size, size, 3]; images.ImageError for a bad one."""
    loaded = images.load(self.encoded(i), name=self.image_key(i))
    return images.to_uint8(loaded, self.image_size)

  def encoded(self, i):
    """Picture i at its own size, as `images.load` takes it."""
    return _reach(self._records[i], self._image)

  def image_key(self, i):
    """Name of picture i: its dataset, split and record."""
    return f"{self.name}[{i}]"

  def _read_captions(self, i):
    value = _reach(self._records[i], self._text)
    alone = isinstance(value, (bytes, str)) or not hasattr(value, "__len__")
    texts = _texts(self.name, self._text, [value] if alone else value)
    if fault := next((t for t in texts if isinstance(t, Exception)), None):
      self.faults.fault(self.image_key(i), f"a text is no UTF-8 ({fault})")
    else:
      self.faults.good()
    return tuple(t.strip() for t in texts if isinstance(t, str) and t.strip())

  def captions(self, i):
    """The captions of picture i, list[str]."""
    return list(self._captions(i))

  def tasks(self):
    """image_text and text_image."""
    return _TASKS

  def num_examples(self, task):
    """Records times captions a record."""
    return self.num_images * self._per_record if task in _TASKS else 0

  def example(self, task, i):
    """Example i of a task; without a caption its text is empty."""
    turn, i = divmod(i, self.num_images)
    captions = self.captions(i)
    caption = captions[turn % len(captions)] if captions else ""
    build = getattr(examples, task)
    return build(self.image_key(i), i, caption)


def _open(name, split, image_feature, data_dir):
  """(data source with undecoded pictures, info) of a prepared dataset."""
  decoder = tensorflow_datasets.decode.SkipDecoding()
  for part in reversed(image_feature.split("/")):
    decoder = {part: decoder}
  try:
    if "/" in name and pathlib.Path(name).is_dir():
      builder = tensorflow_datasets.builder_from_directory(name)
    else:
      builder = tensorflow_datasets.builder(name, data_dir=data_dir)
    records = builder.as_data_source(split=split, decoders=decoder)
  except Exception as error:  # TFDS has many, some from the file system
    reason = " ".join(str(error).split())[:300]
    raise errors.DataError(
      f"TFDS dataset {name!r}, split {split!r}, cannot be opened ({reason})."
      " Check the name, split and data_dir; prepare it once with"
      ' builder.download_and_prepare(file_format="array_record").'
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


def _reach(record, path):
  """The value under a path "a/b" of a record."""
  for part in path.split("/"):
    record = record[part]
  return record.item() if isinstance(record, np.generic) else record
