"""The code cache: keep masks and code ids of every image, beside the data.

DIR/meta.json           what it was made from and with; written last
DIR/counts.npy          int32[num_images], codes an image; -1: bad image
DIR/codes-00000.array_record …  one record an image, in order
DIR.partial             the same while it is being written; goes on from there
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pathlib

import grain.python as grain
import numpy as np
from array_record.python import array_record_module

from lavit_jax.core import errors
from lavit_jax.core.storage import fetched, files

BAD = -1
_FORMAT = 1
_NOT_COMPARED = ("shard_size", "data", "model")
_IN_MEMORY = 256 << 20  # bytes of records that are simply kept in memory


@dataclasses.dataclass(frozen=True)
class Meta:
  """What a cache belongs to.

  `source`, `tokenizer` and `pictures` (see `image_bytes.py`) are
  fingerprints; N = num_patches. `data` and `model` say in words what they are
  of. Caches of earlier versions have neither words nor `pictures`.
  """

  source: str
  tokenizer: str
  num_images: int
  num_patches: int
  num_codes: int
  shard_size: int = 2048
  format: int = _FORMAT
  data: str = ""
  model: str = ""
  pictures: str = ""


class CodeCache:
  """Read access: keep(i), codes(i), counts, meta. Safe between threads."""

  def __init__(self, directory, meta, counts):
    self.directory, self.meta, self.counts = directory, meta, counts
    paths = [str(directory / _shard(s)) for s in range(_num_shards(meta))]
    try:
      if sum(os.path.getsize(p) for p in paths) <= _IN_MEMORY:
        self._records = [r for p in paths for r in _read_all(p)]
      else:
        self._records = grain.ArrayRecordDataSource(paths)
    except Exception as error:  # the C++ reader has no error type of its own
      raise _damaged(directory, error) from error
    if len(self._records) != meta.num_images:
      raise _damaged(directory, f"{len(self._records)} records")

  @classmethod
  def load(cls, directory, *, source=None, tokenizer=None, images=None):
    """Opens a finished cache.

    Args:
      directory: what `write` was given, or where that was copied on gs://.
      source: expected fingerprint of the data, None for any.
      tokenizer: expected fingerprint of the visual tokenizer, None for any.
      images: expected one of their bytes; None, or a cache without: any.

    Raises:
      errors.DataError: missing, unfinished, damaged, or of other data or
        another tokenizer.
    """
    directory = files.place(directory)
    meta = _read_meta(directory)
    if meta is None:
      state = "is not finished" if _partial(directory).exists() else "is none"
      inside = [p.parent.name for p in sorted(directory.glob("*/meta.json"))]
      raise errors.DataError(
        f"{directory}: the code cache there {state}; run `lavit tokenize --data"
        f" … --split … --out {directory}` (it goes on where it stopped)."
        + (f" There are caches in it: {', '.join(inside)}." if inside else "")
      )
    for kind, ours in (("source", source), ("tokenizer", tokenizer)):
      if ours is not None and ours != getattr(meta, kind):
        raise _foreign(directory, kind, getattr(meta, kind), ours)
    if images and meta.pictures not in ("", images):
      raise _foreign(directory, "set of images", meta.pictures, images)
    names = ["counts.npy", *(_shard(s) for s in range(_num_shards(meta)))]
    try:  # ArrayRecord reads from a disk alone
      here = fetched.folder(directory, names)
      counts = np.load(here / "counts.npy")
    except (OSError, ValueError, EOFError) as error:
      if isinstance(error, errors.LavitError):
        raise
      raise _damaged(directory, error) from error
    if counts.shape != (meta.num_images,):
      raise _damaged(directory, f"counts of shape {counts.shape}")
    return cls(here, meta, counts)

  def __len__(self):
    return self.meta.num_images

  def fingerprint(self) -> str:
    """Hex digest of what it was made of, and of how many codes came of it."""
    told = dataclasses.asdict(self.meta)
    empty = () if self.meta.pictures else ("pictures",)  # as it ever was
    made = {k: v for k, v in told.items() if k not in _NOT_COMPARED + empty}
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(self.counts))
    return digest.hexdigest()[:32]

  @property
  def num_patches(self):
    """N, the length of a keep mask."""
    return self.meta.num_patches

  def keep(self, i):
    """The patches kept of image i, bool[N]; all False for a bad one."""
    return self._decode(i)[0]

  def codes(self, i):
    """Code ids of image i, int32[k] in raster order; empty for a bad one."""
    return self._decode(i)[1]

  def _decode(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f"image {i} of {len(self)} in {self.directory}")
    keep, codes = _unpack(self._records[i], self.meta)
    if len(codes) != max(int(self.counts[i]), 0):
      raise _damaged(self.directory, f"image {i} has {len(codes)} codes")
    return keep, codes


def write(directory, records, meta):
  """Writes a cache, or goes on with one that was interrupted.

  Args:
    directory: the finished cache appears here, whole or not at all.
    records: function of `start` giving an iterable of (index, keep, codes)
      for start, start + 1, … num_images - 1; keep bool[N], codes int[k] with
      k = keep.sum(); keep and codes None for a bad image.
    meta: a Meta.

  Returns:
    The finished CodeCache (the one there, if it is already finished).

  Raises:
    errors.DataError: the directory holds the cache of other data or another
      tokenizer, a record does not fit, or the disk is full; what is written
      stays and is used by the next call.
  """
  files.require_local(directory, "a code cache")
  directory = pathlib.Path(directory)
  if (there := _read_meta(directory)) is not None:
    _check_same(directory, there, meta)
    return CodeCache.load(directory)
  if directory.exists():
    raise errors.DataError(
      f"{directory} exists and is no code cache; give another --out."
    )
  partial = _partial(directory)
  done = 0
  try:
    if (whole := _read_meta(partial)) is not None:  # all but its name is done
      _check_same(partial, whole, meta)
    else:
      _begin(partial, meta)
      done = _finished_shards(partial, meta)
      stream = iter(records(done * meta.shard_size))
      for shard in range(done, _num_shards(meta)):
        _write_shard(partial, shard, stream, meta)
        done = shard + 1
      _finish(partial, meta)
    _publish(partial, directory, meta)
  except OSError as error:
    raise _no_room(error, partial, done * meta.shard_size) from error
  return CodeCache.load(directory)


def resume_point(directory, meta):
  """The first image `write` would ask for; num_images if it is finished."""
  files.require_local(directory, "a code cache")
  directory = pathlib.Path(directory)
  if (there := _read_meta(directory)) is not None:
    _check_same(directory, there, meta)
    return meta.num_images
  partial = _partial(directory)
  if (whole := _read_meta(partial)) is not None:
    _check_same(partial, whole, meta)
    return meta.num_images
  return min(_finished_shards(partial, meta) * meta.shard_size, meta.num_images)


def known_as(fingerprint: str, words: str) -> str:
  """What a message calls a source or a tokenizer: words, if any, and digest."""
  return f"{words} ({fingerprint[:12]})" if words else fingerprint


def _begin(partial, meta):
  """Opens the unfinished folder, or checks that it is ours to go on with."""
  partial.mkdir(parents=True, exist_ok=True)
  mine = partial / "begun.json"
  if mine.exists():
    _check_same(partial, Meta(**json.loads(mine.read_text())), meta)
    return
  _replace_text(mine, json.dumps(dataclasses.asdict(meta)))


def _write_shard(partial, shard, stream, meta):
  """Writes one shard of records, then its counts: the counts seal it."""
  first = shard * meta.shard_size
  length = min(meta.shard_size, meta.num_images - first)
  path, counts = partial / _shard(shard), np.empty(length, np.int32)
  unfinished = path.with_suffix(".tmp")
  batch = list(itertools.islice(stream, length))
  if len(batch) != length:
    raise errors.DataError(
      f"Only {len(batch)} of the images {first} to {first + length - 1} came"
      f" for {partial}: expected all {meta.num_images}, in order."
    )
  try:
    writer = array_record_module.ArrayRecordWriter(
      str(unfinished), "group_size:1"
    )
    for j, record in enumerate(batch):
      counts[j], data = _pack(record, first + j, meta)
      writer.write(data)
    writer.close()
    _sync_replace(unfinished, path)
    with unfinished.open("wb") as file:
      np.save(file, counts)
    _sync_replace(unfinished, path.with_suffix(".npy"))
  except RuntimeError as error:  # the C++ writer knows no OSError
    raise OSError(errno.EIO, str(error)) from error
  finally:
    unfinished.unlink(missing_ok=True)


def _finished_shards(partial, meta):
  """Number of sealed shards without a gap."""
  done = 0
  while (partial / _shard(done)).with_suffix(".npy").exists():
    done += 1
  return min(done, _num_shards(meta))


def _seals(partial, meta):
  shards = range(_num_shards(meta))
  return [(partial / _shard(s)).with_suffix(".npy") for s in shards]


def _finish(partial, meta):
  """Joins the counts, then writes meta.json: all else is there before it."""
  counts = [np.load(path) for path in _seals(partial, meta)]
  with (partial / "counts.tmp").open("wb") as file:
    np.save(file, np.concatenate([np.zeros(0, np.int32), *counts]))
  _sync_replace(partial / "counts.tmp", partial / "counts.npy")
  _replace_text(partial / "meta.json", json.dumps(dataclasses.asdict(meta)))


def _publish(partial, directory, meta):
  """Gives the folder its name, without what was needed to go on."""
  for path in [*_seals(partial, meta), partial / "begun.json"]:
    path.unlink(missing_ok=True)
  os.replace(partial, directory)


def _pack(record, index, meta):
  """(count, bytes) of one record, checked against its place and meta."""
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
      f" codes {codes.shape}; expected ({meta.num_patches},) and one code a"
      " patch kept, at least one."
    )
  if codes.min() < 0 or codes.max() >= meta.num_codes:
    raise errors.DataError(
      f"Image {index}: codes from {codes.min()} to {codes.max()}, expected"
      f" 0 to {meta.num_codes - 1}."
    )
  kind = _code_type(meta)
  return len(codes), np.packbits(keep).tobytes() + codes.astype(kind).tobytes()


def _unpack(data, meta):
  """(keep, codes) of one record's bytes; empty bytes are a bad image."""
  width = -(-meta.num_patches // 8)
  if not data:
    return np.zeros(meta.num_patches, bool), np.zeros(0, np.int32)
  bits = np.frombuffer(data[:width], np.uint8)
  keep = np.unpackbits(bits, count=meta.num_patches).astype(bool)
  return keep, np.frombuffer(data[width:], _code_type(meta)).astype(np.int32)


def _code_type(meta):
  return "<u2" if meta.num_codes <= 1 << 16 else "<u4"


def _read_all(path):
  """All records of one shard; RuntimeError if the file is damaged."""
  reader = array_record_module.ArrayRecordReader(str(path))
  if not reader.ok():
    raise RuntimeError(f"{path} cannot be read")
  try:
    return reader.read_all() if reader.num_records() else []
  finally:
    reader.close()


def _shard(number):
  return f"codes-{number:05d}.array_record"


def _num_shards(meta):
  return -(-meta.num_images // meta.shard_size)


def _partial(directory):
  return directory.with_name(directory.name + ".partial")


def _sync_replace(source, target):
  """Renames once the bytes are on the disk."""
  with source.open("rb") as file:
    os.fsync(file.fileno())
  os.replace(source, target)


def _replace_text(path, text):
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text)
  _sync_replace(temporary, path)


def _read_meta(directory):
  """The Meta of a finished cache, None if there is none."""
  path = directory / "meta.json"
  if not path.exists():
    return None
  try:
    fields = json.loads(path.read_text())
    if fields.get("format") != _FORMAT:
      raise ValueError(f"format {fields.get('format')}, known is {_FORMAT}")
    return Meta(**fields)
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise _damaged(directory, error) from error


def _check_same(directory, there, meta):
  """Refuses to mix the codes of two datasets, tokenizers or sizes."""
  for field in dataclasses.fields(meta):
    old, new = getattr(there, field.name), getattr(meta, field.name)
    if field.name == "pictures" and not (old and new):
      continue
    if old != new and field.name not in _NOT_COMPARED:
      words = {"source": "data", "tokenizer": "model"}.get(field.name)
      if words:
        old = known_as(old, getattr(there, words))
        new = known_as(new, getattr(meta, words))
      kind = "set of images" if field.name == "pictures" else field.name
      raise _foreign(directory, kind, old, new)


def _foreign(directory, kind, theirs, ours):
  return errors.DataError(
    f"The code cache {directory} was made with another {kind} ({theirs}, here"
    f" {ours}): its codes mean something else. Run `lavit tokenize` with"
    " another --out, or delete it first."
  )


def _damaged(directory, reason):
  return errors.DataError(
    f"The code cache {directory} is damaged ({reason}); delete it and run"
    " `lavit tokenize` again."
  )


def _no_room(error, partial, done):
  """The disk is full or otherwise refuses: say what is kept and what to do."""
  return errors.DataError(
    f"The code cache could not be written ({error}). The first {done} images"
    f" are kept in {partial}; make room and run the same command again, it"
    " goes on there."
  )
