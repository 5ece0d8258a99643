"""A source of which only some images and texts are used.

Which ones is computed once (`filters.py`) and, where they are many, kept beside
the indexes of archives. Images keep their numbers, so that a code cache of the
whole source fits.
"""

import hashlib
import io
import logging
import pathlib
import zipfile
from typing import Any

import numpy as np

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import array_files
from lavit_jax.data import contents, examples
from lavit_jax.data.images import image_bytes, image_sizes
from lavit_jax.data.indexes import stored
from lavit_jax.data.records import filters as filters_lib

_LOG = logging.getLogger(__name__)
_RULES = 2  # of filters, for what is kept
_KEPT = 20_000  # images or examples whose choice is worth keeping
_OF_TEXTS = ("image_text", "text_image", "text")  # tasks


class FilteredSource:
  """The images and examples of a source that filters keep.

  Attributes:
    source: the whole source.
    name: of the data, for messages.
    image_size: height and width of the images, in pixels.
    num_images: number of images of the whole source.
    usable: int32[n], the images that are kept, in order.
    shown: int32[n], the images that kept examples have.
  """

  def __init__(
    self, source: examples.Source, filters: filters_lib.Filters
  ) -> None:
    """Chooses the images and examples.

    Args:
      source: the whole source.
      filters: what to keep.

    Raises:
      errors.ConfigError: fields of a json are asked for, and this kind of data
        has none.
      errors.DataError: nothing is left.
    """
    self.source, self._filters = source, filters
    self.name, self.image_size = source.name, source.image_size
    self.num_images = source.num_images
    if filters.fields and not (
      isinstance(source, examples.HasFields) and source.num_images
    ):
      raise errors.ConfigError(
        f"filters.fields={dict(filters.fields)}, but {source.name} has no"
        " images with such fields. Those of tar archives and of tables have."
      )
    kept = self._kept()
    self.usable = np.flatnonzero(kept.pop("images")).astype(np.int32)
    self.shown = np.flatnonzero(kept.pop("shown")).astype(np.int32)
    self._examples = {
      task: np.flatnonzero(chosen).astype(np.int32)
      for task, chosen in kept.items()
    }
    total = sum(source.num_examples(task) for task in source.tasks())
    left = sum(len(chosen) for chosen in self._examples.values())
    _LOG.info(
      "%s: filters keep %d of %d images and %d of %d examples",
      *(self.name, len(self.usable), self.num_images, left, total),
    )
    if not left and not len(self.usable):
      raise errors.DataError(
        f"{self.name}: filters keep none of {self.num_images} images and of"
        f" {total} examples. Loosen them: {filters}.{self._lacking()}"
      )

  def _lacking(self) -> str:
    """Returns which fields of filters the first sample does not have."""
    if not self._filters.fields or not self.num_images:
      return ""
    assert isinstance(self.source, examples.HasFields)
    found = self.source.fields(0)
    lacking = sorted(set(self._filters.fields) - set(found))
    if not lacking:
      return ""
    return f" The first sample has no {lacking}, but {sorted(found)[:8]}."

  def _kept(self) -> dict[str, np.ndarray]:
    """Returns bool[n] of the images, and of the examples of each task."""
    source = self.source
    counts = {task: source.num_examples(task) for task in source.tasks()}
    if max(source.num_images, *counts.values(), 0) < _KEPT:
      return self._choose()
    states = source.states() if isinstance(source, examples.HasStates) else ""
    of_data = contents.of(source), image_bytes.of(source), states
    what = repr((_RULES, *of_data, self._filters))
    digest = hashlib.sha256(what.encode()).hexdigest()[:32]
    path = stored.folder() / "filters" / f"{digest}.npz"
    both = dict.fromkeys(("images", "shown"), source.num_images)
    kept = _read(path, counts | both)
    if kept is None:
      kept = self._choose()
      _write(path, kept)
    return kept

  def _choose(self):
    images = self._choose_images()
    shown = np.zeros(len(images), bool)
    kept = {"images": images, "shown": shown}
    captioned = np.zeros((2, len(images)), bool)  # before and after
    for task in self.source.tasks():
      count = self.source.num_examples(task)
      kept[task] = np.zeros(count, bool)
      for i in range(count):
        example = self.source.example(task, i)
        kept[task][i] = keeps = self._keeps(example, images)
        for part in example.parts:
          if isinstance(part, examples.ImagePart):
            shown[part.image] |= keeps
            if task == "image_text":
              captioned[:, part.image] |= (True, keeps)
    # An image whose captions are all left out is left out, too.
    kept["images"] = images & (captioned[1] | ~captioned[0])
    return kept

  def _choose_images(self):
    source, filters = self.source, self._filters
    chosen = np.ones(source.num_images, bool)
    if filters.of_sizes:
      sizes = image_sizes.of(source).tolist()
      kept = [filters.keeps_size(*size) for size in sizes]
      chosen &= np.array(kept, bool)
    if filters.fields:
      assert isinstance(source, examples.HasFields)
      label = f"filter {source.num_images} samples of {source.name}"
      with progress.Progress(source.num_images, label=label) as bar:
        for i in np.flatnonzero(chosen).tolist():
          chosen[i] = filters.keeps_fields(source.fields(i))
          if i % 1000 == 0:
            bar.update(i)
    return chosen

  def _keeps(self, example, images):
    """Whether an example is kept."""
    texts = []
    for part in example.parts:
      if isinstance(part, examples.TextPart):
        texts.append(part.text.strip())
      elif not images[part.image]:
        return False
    if self._filters.fields and len(texts) == len(example.parts):
      return False  # a text alone has no json
    if example.task not in _OF_TEXTS or not self._filters.of_texts:
      return True
    return self._filters.keeps_text("".join(texts))

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[size, size, 3]; ImageError for a bad one."""
    return self.source.image(i)

  def image_key(self, i: int) -> str:
    """Returns the name of image i."""
    return self.source.image_key(i)

  def encoded(self, i: int) -> Any:
    """Returns image i as `image_io.load` takes it."""
    if isinstance(self.source, examples.HasEncodedImages):
      return self.source.encoded(i)
    return self.source.image(i)

  def captions(self, i: int) -> list[str]:
    """Returns the captions of image i that are kept."""
    found = self.source.captions(i)
    if not self._filters.of_texts:
      return found
    return [text for text in found if self._filters.keeps_text(text.strip())]

  def tasks(self) -> tuple[str, ...]:
    """Returns the tasks of which examples are kept."""
    return tuple(t for t in self.source.tasks() if len(self._examples[t]))

  def num_examples(self, task: str) -> int:
    """Returns the number of examples of a task that are kept."""
    return len(self._examples.get(task, ()))

  def example(self, task: str, i: int) -> examples.Example:
    """Returns example i of those of a task that are kept."""
    return self.source.example(task, int(self._examples[task][i]))

  def fingerprint(self) -> str:
    """Returns that of the whole source: a code cache has all its images."""
    return examples.fingerprint(self.source)

  def contents(self) -> str:
    """Returns a digest of the whole source and of what is kept of it."""
    digest = hashlib.sha256(contents.of(self.source).encode())
    digest.update(self.usable.tobytes())
    for task, chosen in sorted(self._examples.items()):
      digest.update(task.encode() + chosen.tobytes())
    return digest.hexdigest()[:32]

  def stored(self) -> str:
    """Returns a digest of where the images are."""
    source = self.source
    return source.stored() if isinstance(source, examples.HasStorage) else ""


def whole(source: examples.Source) -> examples.Source:
  """Returns the source that filters choose from; without filters, itself."""
  return source.source if isinstance(source, FilteredSource) else source


def _read(path: pathlib.Path, counts) -> dict[str, np.ndarray] | None:
  """Returns what was chosen before; None if it is not kept, or damaged."""
  try:
    with np.load(path) as file:
      return {
        name: np.unpackbits(file[name], count=count).astype(bool)
        for name, count in counts.items()
      }
  except FileNotFoundError:
    return None
  except (
    *(OSError, ValueError, EOFError, zipfile.BadZipFile),
    *array_files.ODD,
  ) as error:
    _LOG.warning("%s is damaged (%s) and made again", path, error)
    return None


def _write(path: pathlib.Path, kept) -> None:
  """Keeps what was chosen, if its folder can be written."""
  data = io.BytesIO()
  np.savez(data, **{name: np.packbits(some) for name, some in kept.items()})
  try:
    stored.keep(path, "what filters keep", [data.getvalue()])
  except errors.DataError as error:
    _LOG.warning("%s Until then the next run computes it again.", error)
