"""The latent cache: an autoencoder's latents of every image of a dataset.

DIR/meta.json     what it was made from; see `shards.py`
DIR/assigned.npy  int8[num_images], the bucket of each image, -1: unreadable
DIR/good.u1       uint8[n], 1 for an image that could be decoded
DIR/latents-0.f16 ...  float16[n_b, h, w, C], one file a bucket
DIR.partial/done.json  the meta, while the cache is being written
DIR.partial/sealed-000000 ...  empty; seals a shard

Images lie in the order of their buckets, those of one bucket by number, so
that each shard has its place in the files. Latents are means, not yet scaled;
images are cropped at the centre.
"""

import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import array_files, fetched, files
from lavit_jax.data.batching import buckets as buckets_lib
from lavit_jax.data.caches import shards

_SHARD_SIZE = 256  # images between two seals
_TYPE = np.dtype("<f2")
Record = np.ndarray | None  # float[h, w, C]; None for a bad image


@dataclasses.dataclass(frozen=True)
class Meta:
  """Identifies the data and the autoencoder of a latent cache.

  Attributes:
    source: fingerprint of the dataset, `examples.fingerprint`.
    vae: fingerprint of the autoencoder.
    num_images: images of the dataset.
    buckets: (height, width) of each bucket, in pixels.
    scale: pixels a latent, along each side.
    channels: C, channels of the latents.
    format: version of the files.
    data: describes the dataset; "" in caches of earlier versions.
    model: describes the autoencoder; likewise.
    pictures: fingerprint of images' bytes, see `image_bytes.py`; likewise.
  """

  source: str
  vae: str
  num_images: int
  buckets: tuple[tuple[int, int], ...]
  scale: int
  channels: int
  format: int = 1
  data: str = ""
  model: str = ""
  pictures: str = ""

  def __post_init__(self) -> None:
    object.__setattr__(self, "buckets", _pairs(self.buckets))

  def shape(self, size: Sequence[int]) -> tuple[int, int, int]:
    """Returns (h, w, C), the shape of the latents of a bucket.

    Args:
      size: (height, width) of the bucket, in pixels.
    """
    return size[0] // self.scale, size[1] // self.scale, self.channels


_FORMAT = shards.Format(
  name="latent cache",
  command="lavit latents",
  meta=Meta,
  descriptions={"source": "data", "vae": "model"},
  not_compared=("data", "model"),
)


class LatentCache:
  """Reads a cache: latents(i), good(i), assigned, meta."""

  def __init__(self, directory: shards.Folder, meta: Meta) -> None:
    """Opens the files.

    Args:
      directory: of a complete cache, on a disk or on gs://.
      meta: of the cache.

    Raises:
      errors.DataError: a file is missing, or has another size than expected.
    """
    self.directory, self.meta = directory, meta
    try:
      data = (directory / "assigned.npy").read_bytes()
      self.assigned = array_files.read(io.BytesIO(data))
      order = _order(self.assigned, meta)
      good = np.frombuffer((directory / "good.u1").read_bytes(), np.uint8)
      self._files = _open_files(directory, self.assigned, meta)
    except (OSError, ValueError, EOFError) as error:
      raise _FORMAT.damaged(directory, error) from error
    if len(self.assigned) != meta.num_images or len(good) != len(order):
      raise _FORMAT.damaged(directory, f"{len(good)} images")
    self._good = np.zeros(meta.num_images, bool)
    self._good[order] = good > 0
    self._row = np.zeros(meta.num_images, np.int64)  # in its bucket's file
    for chosen in buckets_lib.members(self.assigned, len(meta.buckets)):
      self._row[chosen] = np.arange(len(chosen))

  @classmethod
  def load(
    cls,
    directory: str | os.PathLike[str],
    *,
    source: str | None = None,
    vae: str | None = None,
    buckets: Iterable[Sequence[int]] | None = None,
    images: str | None = None,
  ) -> "LatentCache":
    """Opens a complete cache.

    Args:
      directory: as given to `write`, or a copy of it on gs://, from where
        latents are then read one by one.
      source: expected fingerprint of the dataset, None for any.
      vae: expected fingerprint of the autoencoder, None for any.
      buckets: expected (height, width) of each bucket, None for any.
      images: expected fingerprint of the images' bytes; None or "" for any.
        A cache without this fingerprint passes.

    Raises:
      errors.DataError: missing, unfinished, damaged, or of other data, another
        autoencoder or other buckets.
    """
    folder = files.input_path(directory)
    meta = _FORMAT.load_meta(folder)
    expected = {
      "source": source,
      "vae": vae,
      "buckets": None if buckets is None else _pairs(buckets),
      "pictures": images,
    }
    _FORMAT.check(folder, meta, expected)
    return cls(folder, meta)

  def __len__(self) -> int:
    return self.meta.num_images

  def fingerprint(self) -> str:
    """Returns a hex digest of what the cache was made from and its buckets."""
    return _FORMAT.fingerprint(self.meta, self.assigned)

  def good(self, i: int) -> bool:
    """Returns whether image i could be decoded."""
    return bool(self._good[i])

  def latents(self, i: int) -> np.ndarray:
    """Returns the latents of image i, float16[h, w, C]; zeros for a bad one."""
    return np.array(self._files[self.assigned[i]][self._row[i]])

  def shape_of(self, size: Sequence[int]) -> tuple[int, int, int]:
    """Returns (h, w, C), the shape of the latents of a bucket."""
    return self.meta.shape(size)


def write(
  directory: str | os.PathLike[str],
  records: Callable[[np.ndarray], Iterable[Record]],
  meta: Meta,
  assigned: np.ndarray,
  part: tuple[int, int] = (0, 1),
  *,
  quiet: bool = True,
  together: bool = False,
) -> LatentCache | None:
  """Writes a cache, or resumes one that was interrupted.

  Args:
    directory: the complete cache will be here, all of it or nothing.
    records: function of the image numbers int64[n] that are missing; gives the
      latents float[h, w, C] of each of them, in order, None for a bad image.
    meta: what the cache is made from.
    assigned: int8[num_images], see `buckets.assign`.
    part: (number of this process, number of all) that write the cache together,
      each some of its shards; all have the same directory.
    quiet: see `shards.Writer.write`.
    together: likewise.

  Returns:
    The cache, the existing one if it is complete; None for another process than
    the first, which completes it.

  Raises:
    errors.DataError: the directory holds another cache, latents of a wrong
      shape, too few of them, or the disk is full; sealed images stay and are
      used by the next call.
  """
  writer = _Writer(_FORMAT, directory, meta, assigned)
  writer.write(
    lambda first, stop: records(writer.order[first:stop]),
    part,
    quiet=quiet,
    together=together,
  )
  return None if part[0] else LatentCache.load(writer.directory)


def resume_point(
  directory: str | os.PathLike[str], meta: Meta, part: tuple[int, int] = (0, 1)
) -> int:
  """Returns how many images of a part `write` will not ask for.

  Raises:
    errors.DataError: the directory holds another cache.
  """
  return _Writer(_FORMAT, directory, meta).resume_point(part)


def size_of(assigned: np.ndarray, part: tuple[int, int]) -> int:
  """Returns how many images a part has.

  Args:
    assigned: int8[num_images], see `buckets.assign`.
    part: (number, number of parts).
  """
  total, (number, parts) = int((assigned != buckets_lib.NONE).sum()), part
  return sum(shards.sizes_of(total, _SHARD_SIZE)[number::parts])


class _Writer(shards.Writer[Meta, Record]):
  """Each shard has its place in the files of its buckets."""

  first_files = ("assigned.npy", "done.json")

  def __init__(self, kind, directory, meta, assigned=None):
    super().__init__(kind, directory, meta)
    self.shard_size = _SHARD_SIZE
    self._to_assign = assigned  # of a cache that is not begun yet

  @functools.cached_property
  def _members(self):
    """The images of each bucket, by the buckets that `begin` stored."""
    assigned = array_files.read(self.partial / "assigned.npy")
    return buckets_lib.members(assigned, len(self.meta.buckets))

  @functools.cached_property
  def order(self):
    """int64[n]: images in the order in which they lie in the files."""
    return np.concatenate(self._members)

  def begin(self):
    data = io.BytesIO()
    np.save(data, np.asarray(self._to_assign, np.int8))
    shards.replace_bytes(self.partial / "assigned.npy", data.getvalue())
    text = json.dumps({"meta": dataclasses.asdict(self.meta)})
    shards.replace_text(self.partial / "done.json", text)

  def begun_meta(self):
    fields = self._read_begun()
    return Meta(**fields["meta"]) if fields else None

  def is_sealed(self, shard):
    if self._seal(shard).exists():
      return True
    last = min((shard + 1) * self.shard_size, len(self.order))
    return self._done >= last

  @functools.cached_property
  def _done(self):
    """Images that an earlier version has finished, which counted them."""
    return self._read_begun().get("done", 0)

  def count_all(self, folder):
    assigned = array_files.read(folder / "assigned.npy")
    return int((assigned != buckets_lib.NONE).sum())

  def write_shard(self, first, records):
    last = first + len(records)
    ends = np.cumsum([len(chosen) for chosen in self._members])
    buckets = np.searchsorted(ends, np.arange(first, last), side="right")
    latents = [
      _checked(value, self.meta.shape(self.meta.buckets[b]), i)
      for value, b, i in zip(
        records, buckets, self.order[first:last], strict=True
      )
    ]
    good = bytes(value is not None for value in records)
    _write_at(self.partial / "good.u1", first, good)
    for b in np.unique(buckets):
      part = [
        x for x, bucket in zip(latents, buckets, strict=True) if bucket == b
      ]
      begin = int(ends[b]) - len(self._members[b])
      offset = max(first - begin, 0) * part[0].nbytes
      data = b"".join(x.tobytes() for x in part)
      _write_at(self.partial / _file(b), offset, data)
    self._seal(first // self.shard_size).touch()

  def journal(self):
    count = -(-len(self.order) // self.shard_size)
    seals = [self._seal(shard) for shard in range(count)]
    return [*seals, self.partial / "done.json"]

  def _seal(self, shard):
    return self.partial / f"sealed-{shard:06d}"

  def _read_begun(self):
    path = self.partial / "done.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _pairs(buckets):
  """Returns (height, width) of each bucket as tuples of int."""
  return tuple((int(h), int(w)) for h, w in buckets)


def _checked(value, shape, i):
  """Returns latents as they are stored; those of a bad image are zeros."""
  if value is None:
    return np.zeros(shape, _TYPE)
  value = np.asarray(value)
  if value.shape != shape:
    raise errors.DataError(
      f"Image {i} has latents of shape {value.shape}; its bucket expects"
      f" {shape}."
    )
  return value.astype(_TYPE)


def _write_at(path, offset, data):
  """Writes bytes at an offset, whoever else writes elsewhere in the file."""
  opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  with os.fdopen(opened, "r+b") as file:
    file.seek(offset)
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _order(assigned, meta):
  """Returns images in the order in which they lie in the files, int64[n]."""
  return np.concatenate(buckets_lib.members(assigned, len(meta.buckets)))


def _open_files(directory, assigned, meta):
  """Returns the mapped latents of each bucket; ValueError if one is short."""
  opened = {}
  for b, chosen in enumerate(buckets_lib.members(assigned, len(meta.buckets))):
    if len(chosen):
      shape = (len(chosen), *meta.shape(meta.buckets[b]))
      opened[b] = _open(directory / _file(b), shape)
  return opened


def _open(path, shape):
  """Opens an array by rows; ValueError if the file is too short."""
  if not files.is_remote(path):
    return np.memmap(path, _TYPE, "r", shape=shape)
  return _RemoteRows(path, shape)


class _RemoteRows:
  """The rows of an array in an object store, each read when asked for."""

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
