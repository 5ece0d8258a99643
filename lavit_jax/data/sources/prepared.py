"""Reads what `lavit data prepare` wrote, as a Source: files of ArrayRecord.

DIR/manifest.json                 what is there, from what, and what was left
                                  out; written last
DIR/images-00000-of-00002.array_record      record j: image j of the shard,
                                  encoded as it is in a file
DIR/about-00000-of-00002.array_record       record j: JSON about image j:
                                  {"key": its name, "captions": [text, …],
                                  "fields": {what the source had beside it}}
DIR/images-00000-of-00002.npy     IMAGE_COLUMNS, a row an image
DIR/examples-00000-of-00001.array_record    record j: JSON of an example that
                                  is not a caption: {"task", "key", "parts":
                                  [{"text": …} or {"image": number of an image
                                  of DIR, "write": true}, …]}
DIR/examples-00000-of-00001.npy   EXAMPLE_COLUMNS, a row an example
DIR/joined-00000-of-00001.npy     JOINED, a row an image of an example with
                                  several

A part also has "weight", "end" and "optional" where they are not 1.0, false
and false (`examples.py`). Numbers are little-endian; images are numbered
through all shards. A caption is an example in both directions.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import array_files, fetched, files
from lavit_jax.data import examples, faults
from lavit_jax.data.images import decoding
from lavit_jax.data.indexes.tables import decoded, numbers, splits

MANIFEST = "manifest.json"
FORMAT = 1
SUFFIX = ".array_record"
IMAGE_COLUMNS = np.dtype([("captions", "<u2"), ("hash", "<u4")])
EXAMPLE_COLUMNS = np.dtype([("task", "u1"), ("hash", "<u4")])
JOINED = np.dtype([("row", "<u4"), ("hash", "<u4")])
# Of EXAMPLE_COLUMNS. Captions are not among them.
TASKS = tuple(t for t in examples.TASKS if t not in examples.OF_CAPTIONS)
_OPEN = 256  # files that are kept open
_TEXTS = 4096  # texts of images that are kept


def file_name(kind: str, number: int, total: int, suffix: str = SUFFIX) -> str:
  """Returns the name of a file of shard `number` of `total`."""
  return f"{kind}-{number:05d}-of-{total:05d}{suffix}"


def part_of(part: examples.Part, number: int | None = None) -> dict[str, Any]:
  """Returns a part as the record of an example has it.

  Args:
    part: of an example.
    number: of its image, if it is one.
  """
  value: dict[str, Any]
  if isinstance(part, examples.TextPart):
    value = {"text": part.text} | ({"end": True} if part.end else {})
  else:
    value = {"image": number}
    value |= {k: True for k in ("write", "optional") if getattr(part, k)}
  return value if part.weight == 1.0 else value | {"weight": part.weight}


def _part(value: Mapping[str, Any]) -> examples.Part:
  """Returns a part from the record of an example."""
  weight = float(value.get("weight", 1.0))
  if "image" not in value:
    if not isinstance(value["text"], str):
      raise ValueError(f"{value!r:.80}")
    return examples.TextPart(value["text"], weight, value.get("end", False))
  if type(value["image"]) is not int:
    raise ValueError(f"{value!r:.80}")
  return examples.ImagePart(
    value["image"],
    value.get("write", False),
    weight,
    value.get("optional", False),
  )


class PreparedSource:
  """The images and examples of a folder that `lavit data prepare` wrote.

  Attributes:
    name: of the folder.
    image_size: height and width of the images, in pixels.
    split: "all", "train" or "held_out".
    num_images: number of images.
    manifest: what the folder's manifest says.
    faults: an empty FaultLog: bad samples were left out before.
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
  ) -> None:
    """Reads the manifest and the columns.

    Args:
      path: the folder; of one on gs:// a copy is made on this disk.
      image_size: images are resized to this square.
      split: "all", or "train" / "held_out" by a hash of each image's name, or
        of a text; what shares images stays together.
      held_out_share: share that is held out.
      limit_share: share of images that may turn out to be damaged.
      decode: makes the square of an encoded image.

    Raises:
      errors.DataError: there is no such folder, it is unfinished, damaged or
        of a later format, or nothing of it is in the split.
      errors.ConfigError: there is no such split.
    """
    if split not in ("all", "train", "held_out"):
      raise errors.ConfigError(
        f"split={split!r}: prepared data have all, train and held_out."
      )
    folder = files.input_path(os.fspath(path).rstrip("/"))
    self.name, self.image_size = folder.name, int(image_size)
    self.manifest, self._square = read_manifest(folder), decode
    self.faults = faults.FaultLog(f"images of {self.name}", limit_share)
    self.split, self._share = split, held_out_share
    self._folder = fetched.folder(folder, sorted(self.manifest["files"]))
    counts = self.manifest["shards"]
    self._shards = {kind: len(counts[kind]) for kind in ("images", "examples")}
    images = self._columns("images", IMAGE_COLUMNS)
    some = self._columns("examples", EXAMPLE_COLUMNS)
    self._starts = {
      kind: np.cumsum([0, *self.manifest["shards"][kind]])
      for kind in self._shards
    }
    held = self._held(images, some)
    self._images = np.flatnonzero(held[: len(images)]).astype(np.int32)
    self.num_images = len(self._images)
    self._captions = numbers.Counts(images["captions"][self._images])
    chosen = np.flatnonzero(held[len(images) :])
    tasks = some["task"][chosen]
    self._examples = {
      task: chosen[tasks == t].astype(np.int64) for t, task in enumerate(TASKS)
    }
    if not self.num_images and not len(chosen):
      raise errors.DataError(
        f"{folder}: nothing of it is in split={split!r}. What is held out can"
        " be data of its own: config.data.held_out_path."
      )
    self._open = decoded.Decoded(_OPEN, lambda reader: 1)
    self._about = decoded.Decoded(_TEXTS, lambda about: 1)
    self._locks: dict[str, threading.Lock] = {}

  def _columns(self, kind, dtype) -> np.ndarray:
    """Returns the columns of all shards of a kind."""
    parts = [np.zeros(0, dtype)]
    for number, count in enumerate(self.manifest["shards"][kind]):
      found = self._array(kind, number, self._shards[kind], dtype)
      if len(found) != count:
        name = file_name(kind, number, self._shards[kind], ".npy")
        raise self._damaged(name, f"{len(found)} rows, expected {count}")
      parts.append(found)
    return np.concatenate(parts)

  def _array(self, kind, number, total, dtype) -> np.ndarray:
    """Returns the array of a file.

    Raises:
      errors.DataError: it is damaged.
    """
    name = file_name(kind, number, total, ".npy")
    try:
      found = array_files.read(self._folder / name)
    except (OSError, ValueError, EOFError) as error:
      raise self._damaged(name, error) from error
    if found.dtype != dtype:
      raise self._damaged(name, found.dtype)
    return found

  def _held(self, images, some) -> np.ndarray:
    """Returns which images, and after them examples, are in the split."""
    total = len(images) + len(some)
    if self.split == "all":
      return np.ones(total, bool)
    joined, start = [], len(images)
    for number, count in enumerate(self.manifest["shards"]["examples"]):
      part = self._array("joined", number, self._shards["examples"], JOINED)
      joined.append((part["row"].astype(np.int64) + start, part["hash"]))
      start += count
    held = splits.held_out(
      np.concatenate([images["hash"], some["hash"]]),
      (
        np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in joined)]),
        np.concatenate([np.zeros(0, np.uint32), *(h for _, h in joined)]),
      ),
      (np.zeros(total, bool), lambda rows: []),
      self._share,
    )
    return held if self.split == "held_out" else ~held

  def _damaged(self, name, reason) -> errors.DataError:
    return errors.DataError(
      f"{self._folder / name} is missing or damaged ({reason}). Copy the folder"
      " again, or prepare the data again: lavit data prepare."
    )

  def _record(self, kind, number, columns="images") -> bytes:
    """Returns a record by its number through all shards.

    Raises:
      OSError: it cannot be read.
    """
    starts = self._starts[columns]
    shard = int(np.searchsorted(starts, number, side="right")) - 1
    name = file_name(kind, shard, self._shards[columns])
    reader = self._open.get(name, lambda: _Reader(self._folder / name))
    return reader.read(number - int(starts[shard]))

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[size, size, 3]; ImageError for a bad one."""
    name = f"{self.name}:{i}"
    return self._square(self.encoded(i), self.image_size, name)

  def encoded(self, i: int) -> bytes:
    """Returns the encoded bytes of image i.

    Raises:
      image_io.ImageError: they cannot be read.
    """
    try:
      return self._record("images", int(self._images[i]))
    except OSError as error:
      raise image_io.ImageError(
        f"{self.name}:{i}: cannot be read ({error})"
      ) from error

  def _json(self, kind, number, columns="images") -> dict[str, Any]:
    """Returns the JSON object of a record.

    Raises:
      errors.DataError: it cannot be read.
    """
    try:
      value = json.loads(self._record(kind, number, columns))
    except (OSError, ValueError, RecursionError) as error:
      name = f"record {number} of {kind}"
      raise self._damaged(name, error) from error
    if not isinstance(value, dict):
      raise self._damaged(f"record {number} of {kind}", f"{value!r:.40}")
    return value

  def _about_image(self, i) -> dict[str, Any]:
    return self._about.get(i, lambda: self._read_about(i))

  def _read_about(self, i) -> dict[str, Any]:
    """Returns what there is about image i, as the columns say.

    Raises:
      errors.DataError: it is something else.
    """
    number = int(self._images[i])
    about = self._json("about", number)
    captions, fields = about.get("captions"), about.get("fields", {})
    if (
      not isinstance(about.get("key"), str)
      or not isinstance(fields, dict)
      or not isinstance(captions, list)
      or not all(isinstance(text, str) for text in captions)
      or len(captions) != self._captions.start(i + 1) - self._captions.start(i)
    ):
      raise self._damaged(f"record {number} of about", f"{about!r:.80}")
    return about

  def image_key(self, i: int) -> str:
    """Returns the name that image i had in its source."""
    return self._about_image(i)["key"]

  def captions(self, i: int) -> list[str]:
    """Returns the captions of image i."""
    return list(self._about_image(i)["captions"])

  def fields(self, i: int) -> dict[str, Any]:
    """Returns the json that the source had about image i, for filters."""
    return self._about_image(i).get("fields", {})

  def tasks(self) -> tuple[str, ...]:
    """Returns the tasks of which there are examples."""
    return tuple(t for t in examples.TASKS if self.num_examples(t))

  def num_examples(self, task: str) -> int:
    """Returns the number of examples of a task, 0 if there are none."""
    if task in examples.OF_CAPTIONS:
      return self._captions.total
    return len(self._examples.get(task, ()))

  def example(self, task: str, i: int) -> examples.Example:
    """Returns example i of a task.

    Raises:
      errors.DataError: it cannot be read.
    """
    if task in examples.OF_CAPTIONS:
      image, which = self._captions.find(i)
      about = self._about_image(image)
      caption = about["captions"][which]
      return examples.OF_CAPTIONS[task](about["key"], image, caption)
    number = int(self._examples[task][i])
    record = self._json("examples", number, "examples")
    try:
      if record["task"] != task or not isinstance(record["key"], str):
        raise ValueError(f"{record!r:.80}")
      parts = tuple(self._renumbered(_part(v)) for v in record["parts"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise self._damaged(f"record {number} of examples", error) from error
    return examples.Example(record["key"], task, parts)

  def _renumbered(self, part):
    """Returns a part with its image numbered within the split.

    Raises:
      ValueError: there is no such image.
    """
    if isinstance(part, examples.TextPart):
      return part
    number = int(np.searchsorted(self._images, part.image))
    if self._images[number : number + 1] != [part.image]:
      raise ValueError(f"image {part.image!r} is not there")
    return dataclasses.replace(part, image=number)

  def stored(self) -> str:
    """Returns a digest of the files that hold the images."""
    return self._digest("images-")

  def fingerprint(self) -> str:
    """Returns a digest of the images' names, their order and size."""
    return self._digest("images-", "about-", self.image_size)

  def contents(self) -> str:
    """Returns a digest of the images' names, the words and their order."""
    return self._digest("about-", "examples-", self.image_size)

  def _digest(self, *what) -> str:
    listed = {
      name: known
      for name, known in self.manifest["files"].items()
      if name.startswith(tuple(w for w in what if isinstance(w, str)))
    }
    value = (sorted(listed.items()), what, self.split, self._share)
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


class _Reader:
  """A file of ArrayRecord that is open; threads read of it in turn."""

  def __init__(self, path):
    self._lock = threading.Lock()
    # What is wrong with a file shows when it is closed, not when it is opened.
    options = "readahead_buffer_size:0"
    self._reader = array_record_module.ArrayRecordReader(str(path), options)
    self._count = self._reader.num_records() if self._reader.ok() else -1
    if self._count < 0:
      with contextlib.suppress(RuntimeError):  # it raises the reason
        self._reader.close()
      raise OSError(f"{path.name} is missing, cut off, or no ArrayRecord file")
    self._path = path

  def read(self, number: int) -> bytes:
    """Returns a record.

    Raises:
      OSError: it cannot be read.
    """
    if not 0 <= number < self._count:
      raise OSError(f"{self._path.name} ends before record {number}")
    try:
      with self._lock:
        (record,) = self._reader.read([number])
    except (RuntimeError, IndexError, ValueError) as error:
      raise OSError(f"{self._path.name} is damaged ({error})") from error
    return record


def is_named(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is a folder of prepared data."""
  folder = files.path_of(os.fspath(path).rstrip("/") or "/")
  if not files.is_remote(path) and not os.path.isdir(folder):
    return False
  if files.is_remote(path) and any(c in str(path) for c in "*{["):
    return False
  manifest = folder / MANIFEST
  if not manifest.exists():
    return False
  try:
    found = json.loads(manifest.read_text())
    return isinstance(found, dict) and {"shards", "files"} <= set(found)
  except (OSError, ValueError, RecursionError):  # perhaps ours, and damaged
    return any(folder.glob(f"images-*{SUFFIX}"))


def read_manifest(folder: Any) -> dict[str, Any]:
  """Returns the manifest of a folder.

  Raises:
    errors.DataError: there is none, or it is damaged or of a later format.
  """
  path = folder / MANIFEST
  try:
    found = json.loads(path.read_text())
    _check_manifest(found)
  except (FileNotFoundError, NotADirectoryError) as error:
    begun = folder.with_name(folder.name + ".partial").exists()
    more = " It is unfinished: give the same command again." if begun else ""
    raise errors.DataError(
      f"{folder} has no {MANIFEST}, as lavit data prepare writes it.{more}"
    ) from error
  except PermissionError as error:
    raise errors.DataError(f"{path} may not be read ({error}).") from error
  except (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    RecursionError,
  ) as error:
    raise errors.DataError(
      f"{path} is damaged or of another version ({error}). Prepare the data"
      " again: lavit data prepare."
    ) from error
  return found


def _check_manifest(found: Any) -> None:
  """Checks that a manifest fits together.

  Raises:
    ValueError: it does not; also KeyError, TypeError and AttributeError.
  """
  if type(found["format"]) is not int or found["format"] != FORMAT:
    raise ValueError(f"format {found['format']!r}, expected {FORMAT}")
  for name in ("shards", "files", "examples", "left_out", "from", "settings"):
    if not isinstance(found[name], dict):
      raise ValueError(f"{name} {found[name]!r:.40}")
  counts = {kind: found["shards"][kind] for kind in ("images", "examples")}
  numbers_of = {
    **{f"shards of {kind}": part for kind, part in counts.items()},
    "images, captions, bytes": [
      found[n] for n in ("images", "captions", "bytes")
    ],
    "examples": list(found["examples"].values()),
    "left_out": list(found["left_out"].values()),
    "files": [size for _, size in found["files"].values()],
  }
  for name, values in numbers_of.items():
    if not all(type(value) is int and value >= 0 for value in values):
      raise ValueError(f"{name} {values!r:.40}")
  sums = {
    "images": (found["images"], sum(counts["images"])),
    "examples": (sum(found["examples"].values()), sum(counts["examples"])),
    "bytes": (found["bytes"], sum(numbers_of["files"])),
  }
  for name, (one, two) in sums.items():
    if one != two:
      raise ValueError(f"{one} {name}, of which its shards have {two}")
  expected = {
    file_name(kind, number, len(counts[columns]), suffix)
    for columns, kind, suffix in (
      *(("images", "images", suffix) for suffix in (SUFFIX, ".npy")),
      ("images", "about", SUFFIX),
      *(("examples", "examples", suffix) for suffix in (SUFFIX, ".npy")),
      ("examples", "joined", ".npy"),
    )
    for number in range(len(counts[columns]))
  }
  if odd := expected ^ set(found["files"]):
    raise ValueError(
      f"its list of files is not of its shards: {min(odd)!r:.60}"
    )


def overlap(one: PreparedSource, other: PreparedSource) -> int:
  """Returns the number of images of `other` that are in `one` too."""
  if {one.split, other.split} == {"train", "held_out"}:
    return 0
  same = one.manifest["files"] == other.manifest["files"]
  return other.num_images if same else 0
