"""The code cache: keep masks and code ids of every image of a dataset.

DIR/meta.json           what it was made from; see `shards.py`
DIR/counts.npy          int32[num_images], codes of each image; -1: bad image
DIR/codes-00000.array_record …  one record an image, in order
DIR.partial/begun.json  the meta, while the cache is being written
DIR.partial/codes-00000.npy …   counts of a shard; they seal it
"""

import dataclasses
import errno
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import grain.python as grain
import numpy as np
from array_record.python import array_record_module

from lavit_jax.core import errors
from lavit_jax.core.storage import array_files, fetched, files
from lavit_jax.data.caches import shards

BAD = -1
_IN_MEMORY = 256 << 20  # bytes of records; smaller caches are read into memory
# (index, keep bool[N], codes int[k]); keep and codes are None for a bad image.
Record = tuple[int, np.ndarray | None, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Meta:
  """Identifies the data and the tokenizer that a code cache was made from.

  Attributes:
    source: fingerprint of the dataset, `examples.fingerprint`.
    tokenizer: fingerprint of the visual tokenizer.
    num_images: images of the dataset.
    num_patches: N, patches of an image.
    num_codes: size of the codebook.
    shard_size: images a file.
    format: version of the files.
    data: describes the dataset; "" in caches of earlier versions.
    model: describes the tokenizer; likewise.
    pictures: fingerprint of images' bytes, see `image_bytes.py`; likewise.
  """

  # `batching/rows.py` hashes the repr: names and order of the fields stay.
  source: str
  tokenizer: str
  num_images: int
  num_patches: int
  num_codes: int
  shard_size: int = 2048
  format: int = 1
  data: str = ""
  model: str = ""
  pictures: str = ""

  @property
  def num_shards(self) -> int:
    """Number of files of records."""
    return -(-self.num_images // self.shard_size)

  def size_of(self, part: tuple[int, int]) -> int:
    """Returns the number of images in the shards of a part: see `write`."""
    number, parts = part
    return sum(shards.sizes_of(self.num_images, self.shard_size)[number::parts])

  @property
  def code_type(self) -> str:
    """Type of a code id on disk."""
    return "<u2" if self.num_codes <= 1 << 16 else "<u4"


_FORMAT = shards.Format(
  name="code cache",
  command="lavit tokenize",
  meta=Meta,
  descriptions={"source": "data", "tokenizer": "model"},
  not_compared=("shard_size", "data", "model"),
)


class CodeCache:
  """Reads a cache: keep(i), codes(i), counts, meta. Safe between threads."""

  def __init__(
    self, directory: pathlib.Path, meta: Meta, counts: np.ndarray
  ) -> None:
    """Opens the shards.

    Args:
      directory: of a complete cache, on a disk.
      meta: of the cache.
      counts: int32[num_images], codes of each image.

    Raises:
      errors.DataError: a shard is missing or damaged.
    """
    self.directory, self.meta, self.counts = directory, meta, counts
    paths = [str(directory / _shard(s)) for s in range(meta.num_shards)]
    self._records: Sequence[bytes]
    try:
      if sum(os.path.getsize(p) for p in paths) <= _IN_MEMORY:
        self._records = [r for p in paths for r in _read_all(p)]
      else:
        self._records = grain.ArrayRecordDataSource(paths)
    except Exception as error:  # the C++ reader has no error type of its own
      raise _FORMAT.damaged(directory, error) from error
    if len(self._records) != meta.num_images:
      raise _FORMAT.damaged(directory, f"{len(self._records)} records")

  @classmethod
  def load(cls, directory: str | os.PathLike[str]) -> "CodeCache":
    """Opens a complete cache.

    Whether its source and tokenizer are those of a run is for the caller to
    compare (`meta`): a run may accept a difference.

    Args:
      directory: as given to `write`, or a copy of it on gs://.

    Raises:
      errors.DataError: missing, unfinished or damaged.
    """
    folder = files.input_path(directory)
    meta = _FORMAT.load_meta(folder)
    names = ["counts.npy", *(_shard(s) for s in range(meta.num_shards))]
    try:  # ArrayRecord reads only from a disk
      local = fetched.folder(folder, names)
      counts = array_files.read(local / "counts.npy")
    except (OSError, ValueError, EOFError) as error:
      if isinstance(error, errors.LavitError):
        raise
      raise _FORMAT.damaged(folder, error) from error
    if counts.shape != (meta.num_images,):
      raise _FORMAT.damaged(folder, f"counts of shape {counts.shape}")
    return cls(local, meta, counts)

  def __len__(self) -> int:
    return self.meta.num_images

  def fingerprint(self) -> str:
    """Returns a hex digest of what the cache was made from and its counts."""
    return _FORMAT.fingerprint(self.meta, self.counts)

  @property
  def num_patches(self) -> int:
    """N, the length of a keep mask."""
    return self.meta.num_patches

  def keep(self, i: int) -> np.ndarray:
    """Returns which patches of image i are kept, bool[N]; none of a bad one."""
    return self._decode(i)[0]

  def codes(self, i: int) -> np.ndarray:
    """Returns the code ids of image i, int32[k] in raster order.

    A bad image has none.
    """
    return self._decode(i)[1]

  def _decode(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f"image {i} of {len(self)} in {self.directory}")
    keep, codes = _unpack(self._records[i], self.meta)
    if len(codes) != max(int(self.counts[i]), 0):
      raise _FORMAT.damaged(self.directory, f"image {i} has {len(codes)} codes")
    return keep, codes


def write(
  directory: str | os.PathLike[str],
  records: Callable[[int, int], Iterable[Record]],
  meta: Meta,
  part: tuple[int, int] = (0, 1),
  *,
  quiet: bool = True,
  together: bool = False,
) -> CodeCache | None:
  """Writes a cache, or resumes one that was interrupted.

  Args:
    directory: the complete cache will be here, all of it or nothing.
    records: function of (first, stop) that gives (index, keep, codes) of images
      first, first + 1, … stop - 1; keep bool[N], codes int[k] with
      k = keep.sum(); keep and codes are None for a bad image.
    meta: what the cache is made from.
    part: (number of this process, number of all) that write the cache together,
      each some of its shards; all have the same directory.
    quiet: see `shards.Writer.write`.
    together: likewise.

  Returns:
    The cache, the existing one if it is complete; None for another process than
    the first, which completes it.

  Raises:
    errors.DataError: the directory holds the cache of other data or another
      tokenizer, a record does not fit, or the disk is full; finished shards
      stay and are used by the next call.
  """
  writer = _Writer(_FORMAT, directory, meta)
  writer.write(records, part, quiet=quiet, together=together)
  return None if part[0] else CodeCache.load(directory)


def resume_point(
  directory: str | os.PathLike[str], meta: Meta, part: tuple[int, int] = (0, 1)
) -> int:
  """Returns how many images of a part `write` will not ask for.

  Raises:
    errors.DataError: the directory holds another cache.
  """
  return _Writer(_FORMAT, directory, meta).resume_point(part)


class _Writer(shards.Writer[Meta, Record]):
  """Each shard is a file of records; the file of its counts seals it."""

  first_files = ("begun.json",)

  @property
  def shard_size(self):
    return self.meta.shard_size

  def begin(self):
    text = json.dumps(dataclasses.asdict(self.meta))
    shards.replace_text(self.partial / "begun.json", text)

  def begun_meta(self):
    path = self.partial / "begun.json"
    return Meta(**json.loads(path.read_text())) if path.exists() else None

  def is_sealed(self, shard):
    return self._seals()[shard].exists()

  def count_all(self, folder):
    del folder
    return self.meta.num_images

  def write_shard(self, first, records):
    path = self.partial / _shard(first // self.shard_size)
    counts = np.empty(len(records), np.int32)
    temporary = shards.temporary_of(path)
    try:
      writer = array_record_module.ArrayRecordWriter(
        str(temporary), "group_size:1"
      )
      for j, record in enumerate(records):
        counts[j], data = _pack(record, first + j, self.meta)
        writer.write(data)
      writer.close()
      shards.replace(temporary, path)
      with temporary.open("wb") as file:
        np.save(file, counts)
      shards.replace(temporary, path.with_suffix(".npy"))
    except RuntimeError as error:  # the C++ writer knows no OSError
      raise OSError(errno.EIO, str(error)) from error
    finally:
      temporary.unlink(missing_ok=True)

  def finish(self):
    """Joins the counts of the shards."""
    counts = [array_files.read(path) for path in self._seals()]
    temporary = self.partial / "counts.tmp"
    with temporary.open("wb") as file:
      np.save(file, np.concatenate([np.zeros(0, np.int32), *counts]))
    shards.replace(temporary, self.partial / "counts.npy")

  def journal(self):
    return [*self._seals(), self.partial / "begun.json"]

  def _seals(self):
    names = [_shard(s) for s in range(self.meta.num_shards)]
    return [(self.partial / name).with_suffix(".npy") for name in names]


def _pack(record, index, meta):
  """Returns (count, bytes) of a record, checked against its index and meta."""
  i, keep, codes = record
  if i != index:
    raise errors.DataError(
      f"Image {i} came where {index} was due: a cache is written in order."
    )
  if keep is None:
    return BAD, b""
  keep, codes = np.asarray(keep, bool), np.asarray(codes)
  fits = keep.shape == (meta.num_patches,) and codes.shape == (keep.sum(),)
  if not fits or not len(codes):
    raise errors.DataError(
      f"Image {index}: keep {keep.shape} with {keep.sum()} patches kept and"
      f" codes {codes.shape}; expected ({meta.num_patches},) and one code for"
      " each patch kept, at least one."
    )
  if codes.min() < 0 or codes.max() >= meta.num_codes:
    raise errors.DataError(
      f"Image {index}: codes from {codes.min()} to {codes.max()}, expected"
      f" 0 to {meta.num_codes - 1}."
    )
  ids = codes.astype(meta.code_type)
  return len(codes), np.packbits(keep).tobytes() + ids.tobytes()


def _unpack(data, meta):
  """Returns (keep, codes) of one record; empty bytes are a bad image."""
  width = -(-meta.num_patches // 8)
  if not data:
    return np.zeros(meta.num_patches, bool), np.zeros(0, np.int32)
  bits = np.frombuffer(data[:width], np.uint8)
  keep = np.unpackbits(bits, count=meta.num_patches).astype(bool)
  return keep, np.frombuffer(data[width:], meta.code_type).astype(np.int32)


def _read_all(path):
  """Returns all records of a shard; RuntimeError if the file is damaged."""
  reader = array_record_module.ArrayRecordReader(str(path))
  if not reader.ok():
    raise RuntimeError(f"{path} cannot be read")
  try:
    return reader.read_all() if reader.num_records() else []
  finally:
    reader.close()


def _shard(number):
  return f"codes-{number:05d}.array_record"
