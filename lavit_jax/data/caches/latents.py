"""The latent cache: what an autoencoder makes of every image, on disk.

DIR/meta.json     what it was made from and with; written last
DIR/assigned.npy  int8[num_images], the bucket of each image, -1: unreadable
DIR/good.u1       uint8[n], 1 for an image that could be read
DIR/latents-0.f16 ...  float16[n_b, h, w, C], one file a bucket
DIR.partial       the same while it is being written; goes on from there

Images lie in the order of their buckets, those of one bucket by number, so
that every file only grows. Latents are means, not yet scaled; images are cut
from the centre.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import fetched, files
from lavit_jax.data.batching import buckets as buckets_lib

_FORMAT = 1
_SEALED = 256  # images between two moments from which writing can go on
_NOT_COMPARED = ("data", "model")
_TYPE = np.dtype("<f2")


@dataclasses.dataclass(frozen=True)
class Meta:
  """What a cache belongs to.

  `source`, `vae` and `pictures` (see `image_bytes.py`) are fingerprints; a
  bucket of height h has latents of h / scale places.
  """

  source: str
  vae: str
  num_images: int
  buckets: tuple[tuple[int, int], ...]
  scale: int
  channels: int
  format: int = _FORMAT
  data: str = ""  # in words; "" in caches of earlier versions
  model: str = ""
  pictures: str = ""  # likewise

  def __post_init__(self):
    pairs = tuple((int(h), int(w)) for h, w in self.buckets)
    object.__setattr__(self, "buckets", pairs)

  def shape(self, size) -> tuple[int, int, int]:
    """Height, width and channels of the latents of a bucket."""
    return size[0] // self.scale, size[1] // self.scale, self.channels


class LatentCache:
  """Read access: latents(i), good(i), assigned, meta."""

  def __init__(self, directory, meta):
    self.directory, self.meta = directory, meta
    try:
      data = (directory / "assigned.npy").read_bytes()
      self.assigned = np.load(io.BytesIO(data))
      order = _order(self.assigned, meta)
      good = np.frombuffer((directory / "good.u1").read_bytes(), np.uint8)
      self._files = _open_files(directory, self.assigned, meta)
    except (OSError, ValueError, EOFError) as error:
      raise _damaged(directory, error) from error
    if len(self.assigned) != meta.num_images or len(good) != len(order):
      raise _damaged(directory, f"{len(good)} images")
    self._good = np.zeros(meta.num_images, bool)
    self._good[order] = good > 0
    self._place = np.zeros(meta.num_images, np.int64)
    for chosen in buckets_lib.members(self.assigned, len(meta.buckets)):
      self._place[chosen] = np.arange(len(chosen))

  @classmethod
  def load(cls, directory, *, source=None, vae=None, buckets=None, images=None):
    """Opens a finished cache.

    Args:
      directory: what `write` was given, or where that was copied on gs://:
        latents are then read from there, one by one.
      source: expected fingerprint of the data, None for any.
      vae: expected fingerprint of the autoencoder, None for any.
      buckets: expected heights and widths, None for any.
      images: expected fingerprint of their bytes; None or "" for any. A
        cache that does not tell passes.

    Raises:
      errors.DataError: missing, unfinished, damaged, or of other data, another
        autoencoder or other buckets.
    """
    directory = files.place(directory)
    meta = _read_meta(directory)
    if meta is None:
      state = "is not finished" if _partial(directory).exists() else "is none"
      inside = [p.parent.name for p in sorted(directory.glob("*/meta.json"))]
      raise errors.DataError(
        f"{directory}: the latent cache there {state}; run `lavit latents`,"
        " the same command goes on where it stopped."
        + (f" There are caches in it: {', '.join(inside)}." if inside else "")
      )
    wanted = {"source": source, "vae": vae, "buckets": buckets}
    if buckets is not None:
      wanted["buckets"] = tuple((int(h), int(w)) for h, w in buckets)
    for kind, ours in wanted.items():
      if ours is not None and ours != getattr(meta, kind):
        raise _foreign(directory, kind, _known(meta, kind), ours)
    if images and meta.pictures not in ("", images):
      raise _foreign(directory, "set of images", meta.pictures, images)
    return cls(directory, meta)

  def __len__(self):
    return self.meta.num_images

  def fingerprint(self) -> str:
    """Hex digest of what it was made of, and of which bucket has what."""
    told = dataclasses.asdict(self.meta)
    made = {k: v for k, v in told.items() if k not in _NOT_COMPARED}
    if not made["pictures"]:  # caches of earlier versions stay what they are
      del made["pictures"]
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(self.assigned))
    return digest.hexdigest()[:32]

  def good(self, i) -> bool:
    """Whether image i could be read."""
    return bool(self._good[i])

  def latents(self, i) -> np.ndarray:
    """Those of image i, float16[h, w, C]; zeros for a bad one."""
    return np.array(self._files[self.assigned[i]][self._place[i]])

  def shape_of(self, size) -> tuple[int, int, int]:
    """Height, width and channels of the latents of a bucket."""
    return self.meta.shape(size)


def write(directory, records, meta, assigned) -> LatentCache:
  """Writes a cache, or goes on with one that was interrupted.

  Args:
    directory: the finished cache appears here, whole or not at all.
    records: function of the image numbers still to come, giving an iterable
      of latents float[h, w, C], or None for a bad image, for each of them,
      in order.
    meta: a Meta.
    assigned: int8[num_images], see `buckets.assign`.

  Returns:
    The finished LatentCache (the one there, if it is already finished).

  Raises:
    errors.DataError: the directory holds another cache, latents of a wrong
      shape, too few of them, or the disk is full; what is written stays and is
      used by the next call.
  """
  files.require_local(directory, "a latent cache")
  directory = pathlib.Path(directory)
  if (there := _read_meta(directory)) is not None:
    _check_same(directory, there, meta)
    return LatentCache(directory, there)
  if directory.exists():
    raise errors.DataError(
      f"{directory} exists and is no latent cache; give another place."
    )
  partial = _partial(directory)
  try:
    if (whole := _read_meta(partial)) is not None:  # all but its name is done
      _check_same(partial, whole, meta)
    else:
      done = _begin(partial, meta, assigned)
      assigned = np.load(partial / "assigned.npy")
      order = _order(assigned, meta)
      _append(partial, order, done, records, meta, assigned)
      _replace(partial / "meta.json", json.dumps(dataclasses.asdict(meta)))
    (partial / "done.json").unlink(missing_ok=True)
    os.replace(partial, directory)
  except OSError as error:
    raise errors.DataError(
      f"The latent cache could not be written ({error}). What is finished is"
      f" kept in {partial}; make room and give the same command again, it goes"
      " on there."
    ) from error
  return LatentCache(directory, meta)


def resume_point(directory, meta) -> int:
  """How many images are finished.

  Raises:
    errors.DataError: the directory holds another cache.
  """
  files.require_local(directory, "a latent cache")
  directory = pathlib.Path(directory)
  if (there := _read_meta(directory)) is not None:
    _check_same(directory, there, meta)
    return int((np.load(directory / "assigned.npy") != buckets_lib.NONE).sum())
  partial = _partial(directory)
  if (whole := _read_meta(partial)) is not None:
    _check_same(partial, whole, meta)
    return int((np.load(partial / "assigned.npy") != buckets_lib.NONE).sum())
  begun = partial / "done.json"
  if not begun.exists():
    return 0
  fields = json.loads(begun.read_text())
  _check_same(_partial(directory), Meta(**fields["meta"]), meta)
  return fields["done"]


def _begin(partial, meta, assigned):
  """Opens the unfinished folder; how many images are in it."""
  partial.mkdir(parents=True, exist_ok=True)
  if not (partial / "done.json").exists():
    with (partial / "assigned.npy").open("wb") as file:
      np.save(file, np.asarray(assigned, np.int8))
    _seal(partial, meta, 0)
    return 0
  fields = json.loads((partial / "done.json").read_text())
  _check_same(partial, Meta(**fields["meta"]), meta)
  return fields["done"]


def _append(partial, order, done, records, meta, assigned):
  """Appends what is still to come, sealed every few images."""
  stream = iter(records(order[done:]))
  counts = np.bincount(assigned[order], minlength=len(meta.buckets))
  ends = np.cumsum(counts)
  for first in range(done, len(order), _SEALED):
    chunk = order[first : first + _SEALED]
    last = first + len(chunk)
    values = list(itertools.islice(stream, len(chunk)))
    if len(values) < len(chunk):
      raise errors.DataError(
        f"Only {first + len(values)} of {len(order)} images came for {partial}."
      )
    latents = [
      _checked(value, meta.shape(meta.buckets[assigned[i]]), i)
      for i, value in zip(chunk, values, strict=True)
    ]
    good = bytes(value is not None for value in values)
    _write_at(partial / "good.u1", first, good)
    for b, end in enumerate(ends):
      begin = end - counts[b]
      mine = latents[max(begin, first) - first : max(min(end, last) - first, 0)]
      if mine:
        place = (max(begin, first) - begin) * mine[0].nbytes
        data = b"".join(x.tobytes() for x in mine)
        _write_at(partial / _file(b), int(place), data)
    _seal(partial, meta, last)


def _checked(value, shape, i):
  """Latents as they are stored; a bad image's are zeros."""
  if value is None:
    return np.zeros(shape, _TYPE)
  value = np.asarray(value)
  if value.shape != shape:
    raise errors.DataError(
      f"Image {i} has latents of shape {value.shape}, its bucket {shape}."
    )
  return value.astype(_TYPE)


def _write_at(path, start, data):
  """Writes bytes at a place; what lay behind it, unsealed, is cut off."""
  with path.open("r+b" if path.exists() else "w+b") as file:
    file.truncate(start)
    file.seek(start)
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _seal(partial, meta, done):
  fields = {"meta": dataclasses.asdict(meta), "done": done}
  _replace(partial / "done.json", json.dumps(fields))


def _replace(path, text):
  """Writes a small file, whole or not at all."""
  temporary = path.with_suffix(".tmp")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _order(assigned, meta):
  """int64[n]: images in the order in which they lie in the files."""
  return np.concatenate(buckets_lib.members(assigned, len(meta.buckets)))


def _open_files(directory, assigned, meta):
  """The mapped latents of each bucket; ValueError if one is too short."""
  opened = {}
  for b, chosen in enumerate(buckets_lib.members(assigned, len(meta.buckets))):
    if len(chosen):
      shape = (len(chosen), *meta.shape(meta.buckets[b]))
      opened[b] = _open(directory / _file(b), shape)
  return opened


def _open(path, shape):
  """An array in a file, by rows; ValueError if the file is too short."""
  if not files.is_remote(path):
    return np.memmap(path, _TYPE, "r", shape=shape)
  return _Rows(path, shape)


class _Rows:
  """As `_open` gives it, of an object: each row is asked for by itself."""

  def __init__(self, path, shape):
    self._path, self._shape = path, shape[1:]
    self._bytes = int(np.prod(self._shape)) * _TYPE.itemsize
    if (length := path.stat().length) < shape[0] * self._bytes:
      raise ValueError(f"{path} has {length} bytes")

  def __getitem__(self, row):
    start = int(row) * self._bytes
    data = fetched.read_range(self._path, start, start + self._bytes)
    return np.frombuffer(data, _TYPE).reshape(self._shape)


def _file(bucket):
  return f"latents-{bucket}.f16"


def _partial(directory):
  return directory.with_name(directory.name + ".partial")


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
  """Refuses to mix the latents of two datasets, autoencoders or buckets."""
  for field in dataclasses.fields(meta):
    old, new = getattr(there, field.name), getattr(meta, field.name)
    if field.name == "pictures" and not (old and new):
      continue
    if old != new and field.name not in _NOT_COMPARED:
      theirs, ours = _known(there, field.name), _known(meta, field.name)
      kind = "set of images" if field.name == "pictures" else field.name
      raise _foreign(directory, kind, theirs, ours)


def _known(meta, kind):
  """A field as a message has it: of a fingerprint, what it is of as well."""
  value = getattr(meta, kind)
  words = {"source": meta.data, "vae": meta.model}.get(kind, "")
  return f"{words} ({value[:12]})" if words else value


def _foreign(directory, kind, theirs, ours):
  return errors.DataError(
    f"The latent cache {directory} was made with another {kind} ({theirs}, here"
    f" {ours}). Write one at another place, or delete it first."
  )


def _damaged(directory, reason):
  return errors.DataError(
    f"The latent cache {directory} is damaged ({reason}); delete it and write"
    " it again."
  )
