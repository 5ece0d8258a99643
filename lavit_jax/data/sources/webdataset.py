"""Reads tar archives of images and captions in place, as a Source.

The archives are those of WebDataset and img2dataset: 17.jpg, 17.txt and
17.json are a sample (`indexes/tar_samples.py`). Nothing is unpacked or
converted; an index of each archive, made once, says where each file is. A
sample's caption is its .txt, or the "caption" of its .json; a sample may have
none, and is for the tokenizer alone then.
"""

import collections
import functools
import hashlib
import json
import logging
import os
import threading
import zlib
from typing import Any

import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import fetched, files
from lavit_jax.data import examples, faults
from lavit_jax.data.images import decoding
from lavit_jax.data.indexes import archives, stored, tar_members, tar_samples

_LOG = logging.getLogger(__name__)
_BLOCK = 512
_MOST_JSON = 1 << 20  # bytes
_OPEN = 512  # archives and indexes kept open
_SPLITS = 1 << 32  # what the hashes of names run to
# Of tar_samples.COLUMNS, those that are held in memory.
_FIELDS = ("image", "image_size", "name_end", "caption_end")
_HELD = np.dtype([(name, tar_samples.COLUMNS[name]) for name in _FIELDS])


class _File:
  """A file that is open while somebody holds this."""

  def __init__(self, path):
    self.descriptor = -1
    self.descriptor = os.open(path, os.O_RDONLY)

  def __del__(self):
    if self.descriptor >= 0:
      os.close(self.descriptor)


class WebDatasetSource:
  """The samples of tar archives; sample i is image i.

  Samples come in the order of the archives, those of one by name. Samples that
  cannot be used are left out, counted and logged in `faults`; the data are
  refused when their share exceeds `limit_share`.

  Attributes:
    name: of the data, for messages.
    image_size: height and width of the images, in pixels.
    num_images: number of samples.
    faults: the FaultLog of samples that are left out.
    archives: the paths of the archives.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    image_size: int,
    *,
    split: str = "all",
    held_out_share: float = 0.1,
    limit_share: float = faults.LIMIT_SHARE,
    decode: decoding.Decode = decoding.exact,
    quiet: bool = False,
  ) -> None:
    """Reads the indexes; makes those that are not there.

    Args:
      path: an archive, a folder of them or a pattern: see `archives.of`.
      image_size: images are resized to this square.
      split: "all", or "train" / "held_out" by a hash of each sample's name.
      held_out_share: share of the samples that is held out.
      limit_share: share of bad samples above which the data are refused.
      decode: makes the square of an encoded image.
      quiet: no progress bar while indexes are made.

    Raises:
      errors.DataError: there are no such archives, or one cannot be read; no
        sample can be used, or too many cannot.
      errors.ConfigError: there is no such split.
    """
    if split not in ("all", "train", "held_out"):
      raise errors.ConfigError(
        f"split={split!r}: archives have all, train and held_out."
      )
    self.image_size, self._square = int(image_size), decode
    self.archives = archives.of(path)
    self.name = os.fspath(path).rstrip("/").rpartition("/")[2]
    indexes = stored.of(self.archives, quiet=quiet)
    sizes = [len(index.samples.columns) for index in indexes]
    self._starts = np.cumsum([0, *sizes])
    self._strings = [index.strings for index in indexes]
    self._states = [index.state for index in indexes]
    self._versions = [index.version for index in indexes]
    self._texts = [index.texts for index in indexes]
    # Only these are held, once: there may be a hundred million samples.
    self._columns = np.empty(sum(sizes), _HELD)
    for name in _FIELDS:
      parts = [index.samples.columns[name] for index in indexes]
      np.concatenate(parts, out=self._columns[name])
    self.faults = self._faults(indexes, limit_share)
    self._split = (split, held_out_share)
    hashes = np.concatenate([i.samples.columns["hash"] for i in indexes])
    self._numbers = _chosen(hashes, split, held_out_share)
    self.num_images = len(self._numbers)
    lengths = np.concatenate([i.samples.columns["length"] for i in indexes])
    captioned = np.flatnonzero(lengths[self._numbers])
    self._captioned = captioned.astype(np.int32)
    self._hashes = zlib.crc32(hashes.tobytes())
    if not self.num_images:
      raise errors.DataError(
        f"{os.fspath(path)}: no usable sample for split={split!r} in"
        f" {len(self.archives)} archives ({self.faults.summary()}). Expected"
        " files such as 17.jpg and 17.txt, one after the other. What is held"
        " out can be data of its own: config.data.held_out_path."
      )
    self._files: collections.OrderedDict[os.PathLike[str], _File]
    self._files = collections.OrderedDict()
    self._lock = threading.Lock()
    if not len(captioned):
      self._warn_of_words()

  def _faults(self, indexes, limit_share):
    """Returns the log of all samples that are left out of the indexes."""
    log = faults.FaultLog(f"samples of {self.name}", limit_share)
    log.good(len(self._columns))
    for index in indexes:
      archive = os.fspath(index.path).rpartition("/")[2]
      for reason, (count, names) in index.samples.faults.items():
        named = [f"{archive}/{name}" for name in names]
        log.fault_all(dict.fromkeys(named, reason), count)
    broken = [
      os.fspath(index.path)
      for index in indexes
      if any(map(tar_members.loses_more, index.samples.faults))
    ]
    if broken:
      _LOG.warning(
        "%d of %d archives are cut off or broken, such as %s: what follows in"
        " them is lost, and nobody can tell how much. Download or write them"
        " again.",
        len(broken),
        len(indexes),
        broken[0],
      )
    log.check()
    return log

  def _warn_of_words(self):
    """Warns that no sample has a caption, and which words are not read."""
    words = [name for name, text in self.fields(0).items() if _is_text(text)]
    beside = f"; the json of {self.image_key(0)} has {words}" if words else ""
    _LOG.warning(
      "%s: no sample has a caption, which is its file .txt, or the 'caption' of"
      " its .json%s.",
      self.name,
      beside,
    )

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[size, size, 3]; ImageError for a bad one."""
    encoded, side = self.encoded(i), self.image_size
    try:
      return self._square(encoded, side, None)
    except image_io.ImageError:  # only then its name is read
      return self._square(encoded, side, self.image_key(i))

  def encoded(self, i: int) -> bytes:
    """Returns the encoded bytes of image i.

    Raises:
      image_io.ImageError: they cannot be read.
    """
    row = self._columns[self._numbers[i]]
    try:
      return self._read(i, int(row["image"]), int(row["image_size"]))
    except OSError as error:
      raise image_io.ImageError(
        f"{self.image_key(i)}: cannot be read ({error.strerror or error})"
      ) from error

  def image_key(self, i: int) -> str:
    """Returns the name of image i: its archive, and the sample's in that."""
    archive, name = self._string(i, "name")
    archive = os.fspath(archive).rpartition("/")[2]
    return f"{archive}/{tar_samples.shown(name)}"

  def _string(self, i, kind):
    """Returns (archive, the "name" or "caption" of sample i in its index)."""
    number = int(self._numbers[i])
    which = self._archive_of(number)
    ends, start = self._columns[f"{kind}_end"], 0
    if number > self._starts[which]:
      start = int(ends[number - 1])
    strings, size = self._strings[which], int(ends[number]) - start
    try:
      file = self._open(strings.file)
      offset = getattr(strings, f"{kind}s") + start
      data = os.pread(file.descriptor, size, offset)
      if len(data) != size:
        raise OSError("it ends too early")
    except OSError as error:
      raise errors.DataError(
        f"{strings.file} cannot be read any more ({error.strerror or error}):"
        " indexes must stay while they are in use. Start again: it is made"
        " anew."
      ) from error
    return self.archives[which], data

  def _archive_of(self, number):
    """Returns the number of the archive that holds a sample."""
    return int(np.searchsorted(self._starts, number, side="right")) - 1

  def _read(self, i, block, size) -> bytes:
    """Returns bytes of the archive of sample i; OSError if there are fewer."""
    which = self._archive_of(int(self._numbers[i]))
    path, start = self.archives[which], block * _BLOCK
    if files.is_remote(path):
      data = fetched.read_range(path, start, start + size)
    else:
      data = self._read_file(which, start, size)
    if len(data) != size:
      raise OSError(f"{len(data)} of {size} bytes are there")
    return data

  def _open(self, path):
    """Returns a file that is kept open; several threads may read of it."""
    with self._lock:
      file = self._files.pop(path, None) or _File(path)
      self._files[path] = file  # the one used last
      if len(self._files) > _OPEN:
        self._files.popitem(last=False)
    return file

  def _read_file(self, which, start, size):
    """Reads of an archive, as long as it is the one that was indexed."""
    file = self._open(self.archives[which])
    if stored.state_of(os.fstat(file.descriptor)) != self._states[which]:
      raise OSError("the archive has changed since it was indexed")
    return os.pread(file.descriptor, size, start)

  def captions(self, i: int) -> list[str]:
    """Returns the caption of image i, or nothing."""
    _, caption = self._string(i, "caption")
    return [caption.decode()] if caption else []

  def states(self) -> str:
    """Returns what changes whenever an archive does."""
    return repr(self._versions)

  def fields(self, i: int) -> dict[str, Any]:
    """Returns the json of sample i; {} without one, or if it is no object."""
    block, size = self._jsons[self._numbers[i]].tolist()
    if not 0 < size <= _MOST_JSON:
      return {}
    try:
      found = json.loads(self._read(i, block, size))
    except OSError as error:  # not the sample's fault, nor for ever
      raise errors.DataError(
        f"The json of {self.image_key(i)} cannot be read ({error}). Give the"
        " same command again."
      ) from error
    except (ValueError, RecursionError):  # a filter leaves it out
      return {}
    return found if isinstance(found, dict) else {}

  @functools.cached_property
  def _jsons(self):
    """Where the json of each sample is, uint32[n, 2]: block and size.

    Read when it is first asked for: only filters need it.
    """
    return np.concatenate(
      [
        np.stack([index.samples.columns[n] for n in ("json", "json_size")], 1)
        for index in stored.of(self.archives, quiet=True)
      ]
    )

  def tasks(self) -> tuple[str, ...]:
    """Returns image_text and text_image, where there are captions."""
    return tuple(examples.OF_CAPTIONS) if len(self._captioned) else ()

  def num_examples(self, task: str) -> int:
    """Returns the number of samples with a caption."""
    return len(self._captioned) if task in examples.OF_CAPTIONS else 0

  def example(self, task: str, i: int) -> examples.Example:
    """Returns example i of a task."""
    number = int(self._captioned[i])
    (caption,) = self.captions(number)
    return examples.OF_CAPTIONS[task](self.image_key(number), number, caption)

  def fingerprint(self) -> str:
    """Returns a digest of the samples' names and images, and their order."""
    return self._digest(("name_end", "image_size"), self._hashes)

  def contents(self) -> str:
    """Returns a digest of the samples' names, captions and their order."""
    texts = self._hashes, self._texts
    return self._digest(("name_end", "caption_end"), texts)

  def stored(self) -> str:
    """Returns a digest of where each image is."""
    return self._digest(("image", "image_size"), None)

  def _digest(self, names, more):
    digest = hashlib.sha256()
    digest.update(repr((self.image_size, self._split, more)).encode())
    for name in names:
      digest.update(np.ascontiguousarray(self._columns[name]).tobytes())
    return digest.hexdigest()[:32]


def _is_text(value) -> bool:
  """Whether a field of a json holds words, and no address."""
  value = value[0] if isinstance(value, list) and value else value
  return isinstance(value, str | dict) and "://" not in value


def _chosen(hashes, split, share):
  """Returns the numbers of the samples of a split, int32[n]."""
  held = hashes < share * _SPLITS
  if share and len(held) > 1 and not held.any():  # of few samples, one
    held[np.argmin(hashes)] = True
  if split == "all":
    held = np.ones_like(held)
  chosen = np.flatnonzero(~held if split == "train" else held)
  return chosen.astype(np.int32)


def overlap(one: WebDatasetSource, other: WebDatasetSource) -> int:
  """Returns the number of samples of `other` in archives of `one` too.

  None if both are parts of the same samples, by the hash of their names.
  """
  if {one._split[0], other._split[0]} == {"train", "held_out"}:
    return 0
  real = lambda path: (
    os.fspath(path) if files.is_remote(path) else os.path.realpath(path)
  )
  mine = {real(path) for path in one.archives}
  return sum(
    int(stop - start)
    for path, start, stop in zip(
      other.archives, other._starts[:-1], other._starts[1:], strict=True
    )
    if real(path) in mine
  )
