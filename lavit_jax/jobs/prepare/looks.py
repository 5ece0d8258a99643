"""Looks at every image and text of a source once, in several processes.

FOLDER/images-00000.npy has LOOK, a row for each of CHUNK images, and beside it
images-00000.json the reasons why some cannot be used; texts-00000.npy has
uint64 hashes of as many texts. A chunk that is there is not looked at again.
"""

import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import array_files, files
from lavit_jax.data import examples
from lavit_jax.data.caches import shards
from lavit_jax.data.images import hashes
from lavit_jax.data.sources import filtered, kinds

CHUNK = 512  # images or texts
LOOK = np.dtype(
  [
    ("bad", "?"),
    ("height", "<u4"),  # in pixels
    ("width", "<u4"),
    ("size", "<u8"),  # of the encoded image, in bytes
    ("content", "<u8"),  # hash of its bytes
    ("perceptual", "<u8", 2),  # hashes of what it looks like
  ]
)


def chunks(source: examples.Source) -> Iterator[list[Any]]:
  """Yields [kind, number] of every chunk of a source."""
  for number in range(-(-source.num_images // CHUNK)):
    yield ["images", number]
  for number in range(-(-source.num_examples("text") // CHUNK)):
    yield ["texts", number]


def is_done(folder: pathlib.Path, kind: str, number: int) -> bool:
  """Returns whether a chunk has been looked at."""
  path = folder / f"{kind}-{number:05d}.npy"
  return path.exists() and path.with_suffix(".json").exists()


def needed(source: examples.Source) -> np.ndarray:
  """Returns which images are used, or shown by an example that is, bool[n]."""
  found = np.zeros(source.num_images, bool)
  found[examples.usable(source)] = True
  if isinstance(source, filtered.FilteredSource):
    found[source.shown] = True
  return found


def maker(setup: Mapping[str, Any]) -> Callable[[Any], dict[str, Any]]:
  """Returns what looks at a chunk, in a process of its own.

  Args:
    setup: config (of data), split, and folder, where to keep what is found.
  """
  source = kinds.build(setup["config"], setup["split"])
  folder = pathlib.Path(setup["folder"])
  usable = needed(source)

  def look(item):
    kind, number = item
    found = np.zeros(0)
    bad: list[tuple[str, str]] = []
    first = number * CHUNK
    if kind == "texts":
      stop = min(first + CHUNK, source.num_examples("text"))
      found = np.array(
        [_hash_of_text(source, i) for i in range(first, stop)], np.uint64
      )
    else:
      stop = min(first + CHUNK, source.num_images)
      found = np.zeros(stop - first, LOOK)
      for row, i in enumerate(range(first, stop)):
        if not usable[i]:
          found[row]["bad"] = True  # left out by filters, which count it
          continue
        try:
          found[row] = look_at(source, i)
        except image_io.ImageError as error:
          found[row]["bad"] = True
          bad.append((source.image_key(i), str(error)))
    path = folder / f"{kind}-{number:05d}.npy"
    shards.replace_text(path.with_suffix(".json"), json.dumps(bad))
    write_array(path, found)
    images = len(found) if kind == "images" else 0
    return {"images": images, "bad": bad}

  return look


def look_at(source: examples.Source, i: int) -> tuple[Any, ...]:
  """Returns a row of LOOK; decodes the image.

  Raises:
    image_io.ImageError: it cannot be read.
  """
  data, name = _read(source, i)
  image = image_io.load(data, name=name)
  return (
    *(False, image.height, image.width, len(data)),
    *(hashes.of_bytes(data), hashes.perceptual(image)),
  )


def encoded(source: examples.Source, i: int) -> bytes:
  """Returns the encoded bytes of an image; one that is drawn becomes a PNG.

  Raises:
    image_io.ImageError: they cannot be read.
  """
  return _read(source, i)[0]


def _read(source, i) -> tuple[bytes, str]:
  """Returns (encoded bytes of an image, its name, with its file if it has)."""
  name = source.image_key(i)
  if not isinstance(source, examples.HasEncodedImages):
    return _png(source.image(i)), name
  found = source.encoded(i)
  if isinstance(found, str | os.PathLike):
    path = files.input_path(found)
    if not str(path).endswith(name):
      name = f"{name} ({path})"
    found = _bytes_of(path, name)
  return (found if isinstance(found, bytes) else _png(found)), name


def _bytes_of(path, name) -> bytes:
  try:
    with files.open_bytes(path) as stream:
      found = stream.read(_MOST + 1)
  except OSError as error:
    reason = error.strerror or str(error)
    raise image_io.ImageError(f"{name}: cannot be read ({reason})") from error
  if len(found) > _MOST:
    raise image_io.ImageError(f"{name}: is larger than {_MOST >> 20} MiB")
  return found


def _png(image) -> bytes:
  file = io.BytesIO()
  image_io.to_pil(np.asarray(image)).save(file, "PNG")
  return file.getvalue()


_MOST = 256 << 20  # bytes of an encoded image


def _hash_of_text(source, i) -> int:
  parts = source.example("text", i).parts
  text = "\n".join(p.text for p in parts)
  return hashes.of_bytes(text.strip().encode(errors="surrogatepass"))


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes an array as a whole."""
  data = io.BytesIO()
  np.save(data, array)
  shards.replace_bytes(path, data.getvalue())


def read(
  folder: pathlib.Path, kind: str, count: int
) -> tuple[np.ndarray, list[tuple[str, str]]]:
  """Returns what was found of all images or texts, and (name, reason) of bad.

  Raises:
    errors.DataError: a file is damaged.
  """
  dtype = LOOK if kind == "images" else np.dtype(np.uint64)
  found, bad = [np.zeros(0, dtype)], []
  for number in range(-(-count // CHUNK)):
    path = folder / f"{kind}-{number:05d}.npy"
    try:
      found.append(array_files.read(path))
      named = json.loads(path.with_suffix(".json").read_text())
      bad += [(name, reason) for name, reason in named]
    except (OSError, ValueError, EOFError, TypeError) as error:
      raise errors.DataError(
        f"{path} is damaged ({error}). Delete it and give the same command"
        " again."
      ) from error
  array = np.concatenate(found)
  if array.dtype != dtype or len(array) != count:
    raise errors.DataError(
      f"{folder} is of other data ({len(array)} {kind}, expected {count})."
      " Delete it and give the same command again."
    )
  return array, bad
