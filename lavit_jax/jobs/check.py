"""Looks at a source before it is trained on (`lavit data check`, `show`)."""

import collections
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import files
from lavit_jax.data import examples
from lavit_jax.data.sources import kinds, prepared
from lavit_jax.data.workers import pool
from lavit_jax.jobs.prepare import job, looks

_TEXTS = 20_000  # examples of which texts are measured


@dataclasses.dataclass(frozen=True)
class Found:
  """What was found of a source.

  Attributes:
    source: itself.
    images: looks.LOOK[num_images].
    bad: (name, reason) of every image that cannot be used.
    lines: (name, reason) of lines, rows or samples that the source left out,
      the first of each reason.
    left_out: how many the source left out.
    seen: how many lines, rows or samples it has.
    characters: of some texts, by task.
    checksums: what is wrong with the files of prepared data.
  """

  source: examples.Source
  images: np.ndarray
  bad: list[tuple[str, str]]
  lines: list[tuple[str, str]]
  left_out: int
  seen: int
  characters: dict[str, np.ndarray]
  checksums: list[str]

  @property
  def good(self) -> np.ndarray:
    """Returns the rows of the images that can be used."""
    return self.images[~self.images["bad"]]

  def summary(self) -> dict[str, Any]:
    """Returns what was found as numbers, for JSON."""
    good, source = self.good, self.source
    reasons = collections.Counter(kind_of(reason) for _, reason in self.bad)
    return {
      "name": source.name,
      "images": source.num_images,
      "bad_images": len(self.bad),
      "reasons": dict(reasons.most_common()),
      "left_out": self.left_out,
      "seen": self.seen,
      "examples": {task: source.num_examples(task) for task in source.tasks()},
      "bytes": int(good["size"].sum()),
      "shorter_side": quantiles(np.minimum(good["height"], good["width"])),
      "aspect": quantiles(aspects(good)),
      "characters": {t: quantiles(n) for t, n in self.characters.items()},
      "exact_duplicates": len(good) - len(np.unique(good["content"])),
      "near_duplicates": len(good) - len(np.unique(good["perceptual"], axis=0)),
      "checksums": self.checksums,
    }


def check(
  data: Mapping[str, Any] | str,
  *,
  fields: Mapping[str, Any] | None = None,
  workers: int = 0,
  quiet: bool = False,
) -> Found:
  """Decodes every image of a source, in several processes, and counts.

  Args:
    data: config.data, of which the split "train" is looked at; or a path, of
      which all is.
    fields: override those of config.data.
    workers: processes; 0: as many as there are cores.
    quiet: no progress bar.

  Raises:
    errors.DataError: the data cannot be read, however many of it are bad.
  """
  config, split = job.config_of(data, {"limit_share": 1.0, **(fields or {})})
  source = kinds.build(config, split)
  log = getattr(source, "faults", None)
  with tempfile.TemporaryDirectory() as folder:
    found, bad = _look(source, config, split, folder, workers, quiet)
  return Found(
    source=source,
    images=found,
    bad=bad,
    lines=list(log.reasons.items()) if log else [],
    left_out=log.bad if log else 0,
    seen=log.seen if log else source.num_images,
    characters=dict(_characters(source)),
    checksums=(
      job.verify(config["path"])
      if isinstance(source, prepared.PreparedSource)
      else []
    ),
  )


def _look(source, config, split, folder, workers, quiet):
  """Returns what is found of every image, and the bad ones."""
  items = [item for item in looks.chunks(source) if item[0] == "images"]
  setup = {"config": job.plain(config), "split": split, "folder": folder}
  for _ in pool.shown(
    f"look at {source.num_images} images",
    "lavit_jax.jobs.prepare.looks:maker",
    setup,
    items,
    count=workers,
    quiet=quiet,
  ):
    pass  # what is found is read together
  return looks.read(pathlib.Path(folder), "images", source.num_images)


def _characters(source) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (task, characters of the texts of some of its examples)."""
  for task in source.tasks():
    count = source.num_examples(task)
    numbers = np.linspace(0, count - 1, min(count, _TEXTS)).astype(int)
    yield (
      task,
      np.array(
        [
          sum(
            len(part.text)
            for part in source.example(task, i).parts
            if isinstance(part, examples.TextPart)
          )
          for i in numbers.tolist()
        ]
      ),
    )


def kind_of(reason: str) -> str:
  """Returns a reason without the name of the image before it."""
  _, _, rest = reason.partition(": ")
  return (rest or reason).partition(" (")[0].partition(";")[0]


def aspects(found: np.ndarray) -> np.ndarray:
  """Returns width over height of images, float[n]."""
  return found["width"] / np.maximum(found["height"], 1)


def quantiles(values: np.ndarray) -> dict[str, float]:
  """Returns the least, the quartiles and the most of some values."""
  if not len(values):
    return {}
  names = ("least", "quarter", "median", "three_quarters", "most")
  found = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
  return {n: round(float(v), 3) for n, v in zip(names, found, strict=True)}


def write_lines(
  path: str | os.PathLike[str], rows: list[tuple[str, str]]
) -> None:
  """Writes (name, reason) of bad images and lines as JSON lines."""
  text = "".join(
    json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in rows
  )
  target = files.path_of(path)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(target, text.encode())
  except OSError as error:
    raise errors.DataError(
      f"{path} cannot be written ({error.strerror or error}). Give another"
      " name."
    ) from error
