"""From config.data to a source; the one list of kinds of data."""

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.core.storage import files
from lavit_jax.data import examples, faults

_LOG = logging.getLogger(__name__)


def build(config: Mapping[str, Any], split: str) -> examples.Source:
  """The source that config.data describes.

  Args:
    config: fields `kind` ("shapes", "jsonl" or "tfds"), `image_size`, `seed`
      and those of the kind: shapes `train_size`, `held_out_size`; jsonl
      `path`, `held_out_path` (empty: a tenth of `path`, by hash),
      `allow_absolute`; tfds `name`, `train_split`, `held_out_split`,
      `data_dir`, `image_feature`, `text_feature`. `limit_share` is the share
      of bad lines or records that is an error.
    split: "train", "held_out" or (shapes only) "never_seen".

  Raises:
    errors.ConfigError: an unknown kind, a split this kind lacks, or a
      limit_share that is no share.
  """
  limit_share = faults.share_of(config)
  kind = config["kind"]
  if kind == "shapes":
    from lavit_jax.data.sources import shapes

    size = "train_size" if split == "train" else "held_out_size"
    return shapes.ShapesSource(
      split,
      size=config[size],
      image_size=config["image_size"],
      seed=config["seed"],
    )
  if split not in ("train", "held_out"):
    raise errors.ConfigError(
      f"Data of kind {kind!r} has splits train and held_out, not {split!r};"
      " only the embedded shapes know never_seen."
    )
  if kind == "jsonl":
    from lavit_jax.data.sources import jsonl

    path, part = config["path"], split
    if config.get("held_out_path"):
      path = config["held_out_path"] if split == "held_out" else path
      part = "all"
    if not path:
      raise errors.ConfigError(
        "config.data.kind='jsonl', but config.data.path is empty. Give a file"
        " of JSON lines: --config.data.path=my.jsonl."
      )
    return jsonl.JsonlSource(
      path,
      config["image_size"],
      split=part,
      allow_absolute=config.get("allow_absolute", False),
      limit_share=limit_share,
    )
  if kind == "tfds":
    from lavit_jax.data.sources import tfds

    return tfds.TfdsSource(
      config["name"],
      split=config[f"{split}_split"],
      data_dir=config["data_dir"] or None,
      image_feature=config["image_feature"],
      text_feature=config["text_feature"],
      image_size=config["image_size"],
      limit_share=limit_share,
    )
  raise errors.ConfigError(
    f"config.data.kind={kind!r} is unknown; expected shapes, jsonl or tfds."
  )


def describe(
  config: Mapping[str, Any], split: str, source: examples.Source
) -> str:
  """What a source is, in words for messages; `build` made it."""
  name = source.name
  if config["kind"] == "jsonl":
    part = "a tenth" if split == "held_out" else "nine tenths"
    part = "all" if config.get("held_out_path") else f"{split}, {part} by hash,"
    name = f"{part} of {name}"
  return f"{name}: {source.num_images} images of {source.image_size} pixels"


def pair(config: Mapping[str, Any]) -> tuple:
  """The (train, held-out) sources; says so where they share images."""
  train, held_out = build(config, "train"), build(config, "held_out")
  shared, of, what = _shared(config, train, held_out)
  if shared:
    _LOG.warning(
      "%d of %d held-out %s are in the training data too (%s, %s):"
      " held-out numbers tell nothing of new images",
      shared,
      of,
      what,
      train.name,
      held_out.name,
    )
  return train, held_out


def _shared(config, train, held_out) -> tuple[int, int, str]:
  """(how many are in both, of how many held out, what they are)."""
  if config["kind"] == "tfds":
    from lavit_jax.data.sources import tfds

    return tfds.overlap(train, held_out), held_out.num_images, "records"
  if config["kind"] != "jsonl":
    return 0, held_out.num_images, "images"
  path = config.get("held_out_path")
  if not held_out.num_images and path and files.same(path, config["path"]):
    count = sum(held_out.num_examples(task) for task in held_out.tasks())
    return count, count, "examples"
  held = set(_image_files(held_out))
  both = {file for file in _image_files(train) if file in held}
  return len(both), len(held), "images"


def _image_files(source) -> Iterator[str]:
  """The file of each image of a jsonl source, links followed.

  A folder is listed once, in place of asking for every image whether it is
  a link: that takes minutes on a network's disk.
  """
  folders: dict[str, tuple[str, set[str]]] = {}
  for i in range(source.num_images):
    path = os.fspath(source.image_path(i))
    if files.is_remote(path):
      yield path
      continue
    folder, name = os.path.split(path)
    if folder not in folders:
      real = os.path.realpath(folder)
      there = os.scandir(real) if os.path.isdir(real) else ()
      folders[folder] = real, {e.name for e in there if e.is_symlink()}
    real, links = folders[folder]
    yield os.path.realpath(path) if name in links else os.path.join(real, name)


def sentences(source: examples.Source, limit: int) -> list[str]:
  """Up to `limit` texts of a source, every task in turn, for SentencePiece."""
  texts: list[str] = []
  tasks = [t for t in source.tasks() if source.num_examples(t)]
  index = 0
  while tasks and len(texts) < limit:
    for task in list(tasks):
      if index >= source.num_examples(task):
        tasks.remove(task)
        continue
      for part in source.example(task, index).parts:
        if isinstance(part, examples.TextPart) and part.text.strip():
          texts.append(part.text.strip())
    index += 1
  return texts[:limit]
