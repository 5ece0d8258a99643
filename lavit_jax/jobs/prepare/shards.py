"""Writes the shards of prepared data (`sources/prepared.py`), each as a whole.

What a shard holds follows from its number alone, so that any number of
processes writes the same bytes, and a shard that is there is not written again.
"""

import collections
import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from lavit_jax.core import image_io
from lavit_jax.data import examples
from lavit_jax.data.caches import shards as cache_shards
from lavit_jax.data.images import hashes
from lavit_jax.data.records import held_out
from lavit_jax.data.sources import filtered, kinds, prepared
from lavit_jax.jobs.prepare import looks
from lavit_jax.jobs.prepare import plan as plan_lib

# Images are packed already; of texts, 64 records are packed together.
_OPTIONS = {
  "images": "group_size:1,uncompressed",
  "about": "group_size:64,zstd:3",
  "examples": "group_size:64,zstd:3",
}
_GONE = "an image of it is left out"


def total(
  source: examples.Source, plan: plan_lib.Plan, settings: plan_lib.Settings
) -> dict[str, int]:
  """Returns the number of shards of images and of examples."""
  count = sum(source.num_examples(task) for task in prepared.TASKS)
  return {
    "images": -(-len(plan.old) // settings.images_per_shard),
    "examples": -(-count // settings.examples_per_shard),
  }


def maker(setup: Mapping[str, Any]) -> Callable[[Any], dict[str, Any]]:
  """Returns what writes a shard, in a process of its own.

  Args:
    setup: config (of data), split, folder (to write to), settings.
  """
  source = kinds.build(setup["config"], setup["split"])
  folder = pathlib.Path(setup["folder"])
  settings = plan_lib.Settings(**setup["settings"])
  plan = plan_lib.Plan.read(folder / "plan.npz")
  totals = total(source, plan, settings)
  writer = _Writer(source, folder, settings, plan, totals)

  def write(item):
    kind, number = item
    make = {"images": writer.images, "examples": writer.examples}[kind]
    return make(number)

  return write


def done_file(folder: pathlib.Path, kind: str, number: int) -> pathlib.Path:
  """Returns the file that says that a shard is written, and what it holds."""
  return folder / f"{kind}-{number:05d}.done.json"


class _Writer:
  """Writes shards of one source."""

  def __init__(self, source, folder, settings, plan, totals):
    self._source, self._folder, self._plan = source, folder, plan
    self._settings, self._totals = settings, totals
    self._merged: dict[int, list[int]] = collections.defaultdict(list)
    for old in plan.merged.tolist():
      self._merged[int(plan.new[old])].append(old)

  def images(self, number: int) -> dict[str, Any]:
    """Writes a shard of images; returns what `done_file` holds."""
    size, total_ = self._settings.images_per_shard, self._totals["images"]
    first = number * size
    numbers = range(first, min(first + size, len(self._plan.old)))
    columns = np.zeros(len(numbers), prepared.IMAGE_COLUMNS)
    name = lambda kind: prepared.file_name(kind, number, total_)
    with (
      _Records(self._folder / name("images"), "images") as images,
      _Records(self._folder / name("about"), "about") as abouts,
    ):
      for row, new in enumerate(numbers):
        old = int(self._plan.old[new])
        images.write(self._encoded(old, new))
        about = self._about(old, new)
        abouts.write(_json(about))
        hashed = held_out.hash_of(about["key"])
        columns[row] = len(about["captions"]), hashed
    table = prepared.file_name("images", number, total_, ".npy")
    looks.write_array(self._folder / table, columns)
    names = [name("images"), name("about"), table]
    more = {"captions": int(columns["captions"].sum(dtype=np.int64))}
    return self._finish("images", number, len(numbers), names, more)

  def _encoded(self, old, new) -> bytes:
    data = looks.encoded(self._source, old)
    if hashes.of_bytes(data) != int(self._plan.content[new]):
      raise image_io.ImageError(
        f"{self._source.image_key(old)} has changed since it was looked at."
        f" Delete {self._folder} and give the same command again."
      )
    side = self._settings.side
    if not side:
      return data
    image = image_io.load(data, name=self._source.image_key(old))
    if min(image.size) <= side:
      return data
    scale = side / min(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(
      file, "JPEG", quality=self._settings.quality
    )
    return file.getvalue()

  def _about(self, old, new) -> dict[str, Any]:
    """Returns what there is about an image and those that equal it."""
    captions: dict[str, None] = {}
    for one in (old, *self._merged.get(new, ())):
      captions |= dict.fromkeys(self._source.captions(one))
    about = {"key": self._source.image_key(old), "captions": list(captions)}
    # A filtered source has the numbers of the whole one.
    whole = filtered.whole(self._source)
    fields = whole.fields(old) if isinstance(whole, examples.HasFields) else {}
    return about | ({"fields": dict(fields)} if fields else {})

  def examples(self, number: int) -> dict[str, Any]:
    """Writes a shard of examples; returns what `done_file` holds."""
    size, total_ = self._settings.examples_per_shard, self._totals["examples"]
    columns: list[tuple[int, int]] = []
    joined: list[tuple[int, int]] = []
    left_out: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    name = prepared.file_name("examples", number, total_)
    with _Records(self._folder / name, "examples") as records:
      for task, i in self._numbers(number * size, (number + 1) * size):
        if task == "text" and not self._plan.texts[i]:
          continue  # counted by the plan
        record = self._example(task, i)
        if record is None:
          left_out[_GONE] += 1
          continue
        images = [p["image"] for p in record["parts"] if "image" in p]
        hashed = [self._hash_of_image(new) for new in dict.fromkeys(images)]
        if len(hashed) > 1:
          joined += [(len(columns), h) for h in hashed]
        text = "\n".join(p["text"] for p in record["parts"] if "text" in p)
        key = hashed[0] if hashed else held_out.hash_of(text)
        columns.append((prepared.TASKS.index(task), key))
        counts[task] += 1
        records.write(_json(record))
    tables = {
      prepared.file_name("examples", number, total_, ".npy"): np.array(
        columns, prepared.EXAMPLE_COLUMNS
      ),
      prepared.file_name("joined", number, total_, ".npy"): np.array(
        joined, prepared.JOINED
      ),
    }
    for file, table in tables.items():
      looks.write_array(self._folder / file, table)
    more = {"left_out": dict(left_out), "tasks": dict(counts)}
    return self._finish("examples", number, len(columns), [name, *tables], more)

  def _numbers(self, first, stop) -> Iterator[tuple[str, int]]:
    """Yields (task, number in it) of the examples first … stop of all."""
    for task in prepared.TASKS:
      count = self._source.num_examples(task)
      for i in range(max(first, 0), min(stop, count)):
        yield task, i
      first, stop = first - count, stop - count

  def _example(self, task, i) -> dict[str, Any] | None:
    """Returns the record of an example; None if an image of it is gone."""
    example = self._source.example(task, i)
    parts = []
    for part in example.parts:
      if isinstance(part, examples.TextPart):
        parts.append(prepared.part_of(part))
        continue
      new = int(self._plan.new[part.image])
      if new >= 0:
        parts.append(prepared.part_of(part, new))
      elif not part.optional:
        return None
    return {"task": task, "key": example.key, "parts": parts} if parts else None

  def _hash_of_image(self, new) -> int:
    return held_out.hash_of(self._source.image_key(int(self._plan.old[new])))

  def _finish(self, kind, number, count, names, more) -> dict[str, Any]:
    """Notes that a shard is written."""
    found = {
      "count": count,
      "files": {name: _checksum(self._folder / name) for name in names},
      **more,
    }
    path = done_file(self._folder, kind, number)
    cache_shards.replace_text(path, json.dumps(found))
    return found


class _Records:
  """Writes a file of ArrayRecord as a whole."""

  def __init__(self, path, kind):
    self._path = path
    self._unfinished = cache_shards.temporary_of(path)
    self._options = _OPTIONS[kind]

  def __enter__(self):
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._unfinished), self._options
    )
    return self

  def write(self, record: bytes) -> None:
    self._writer.write(record)

  def __exit__(self, kind, error, trace):
    try:
      self._writer.close()
    except RuntimeError as failure:  # such as a full disk
      if error is None:
        raise OSError(f"{self._path}: {failure}") from failure
    if error is None:
      cache_shards.replace(self._unfinished, self._path)
    else:
      self._unfinished.unlink(missing_ok=True)


def _json(value) -> bytes:
  text = json.dumps(value, ensure_ascii=False, default=str)
  return text.encode(errors="surrogatepass")


def _checksum(path) -> list[Any]:
  """Returns [SHA-256, length] of a file."""
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return [digest, path.stat().st_size]
