"""Builds the source that config.data describes; the one list of data kinds.

With config.data.sources it is a mixture of several:

  data.sources = dict(
    coco=dict(kind="jsonl", path="coco.jsonl", weight=1.0),
    web=dict(kind="webdataset", path="web/*.tar", weight=3.0),
  )

Fields that a source lacks are those of config.data.
"""

import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.core.storage import files
from lavit_jax.data import examples, faults
from lavit_jax.data.images import decoding
from lavit_jax.data.indexes import archives
from lavit_jax.data.records import columns, filters
from lavit_jax.data.sources import (
  filtered,
  jsonl,
  mixed,
  prepared,
  shapes,
  tfds,
  webdataset,
)
from lavit_jax.data.sources.tables import hf, json_lines, parquet
from lavit_jax.data.sources.tables import source as tables
from lavit_jax.data.workers import decoders

_LOG = logging.getLogger(__name__)
# Fields of a source that config.data may not have.
_OF_MIXTURES = ("weight", "mixture", "cache_dir", "held_out_cache_dir")
_MOST_WORKERS = 512
_USUAL = columns.IMAGE, columns.TEXT  # the columns that are found by themselves
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_EXAMPLES = {  # of config.data.path, by kind
  "jsonl": ("a file of JSON lines", "my.jsonl"),
  "webdataset": ("tar archives", "'data/{00000..00331}.tar'"),
  "parquet": ("Parquet files", "'data/train-*.parquet'"),
  "hf": ("a folder of the library `datasets`", "my_dataset"),
  "arrayrecord": ("a folder that lavit data prepare wrote", "my_prepared"),
}
_OF_TABLES: dict[str, Callable[..., tables.TableSource]] = {
  "jsonl": json_lines.JsonLinesSource,  # of many or large files
  "parquet": parquet.ParquetSource,
  "hf": hf.HfSource,
}


def parts_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns config.data of each source of a mixture; {} if there is only one.

  Raises:
    errors.ConfigError: a source has a field that config.data does not know, or
      is no set of fields.
  """
  shared = {name: config[name] for name in config if name != "sources"}
  parts = {}
  sources = config.get("sources") or {}
  if not hasattr(sources, "items"):
    raise errors.ConfigError(
      f"config.data.sources={sources!r}: expected sources by name, such as"
      ' {"coco": {"kind": "jsonl", "path": "coco.jsonl"}}.'
    )
  for name, fields in sources.items():
    if not isinstance(fields, Mapping) and not hasattr(fields, "items"):
      raise errors.ConfigError(
        f"config.data.sources.{name}={fields!r}: expected the fields of a"
        " source, such as kind, path and weight."
      )
    fields = dict(fields.items())
    if unknown := sorted(set(fields) - set(shared) - set(_OF_MIXTURES)):
      raise errors.ConfigError(
        f"config.data.sources.{name} has the fields {unknown}, which"
        f" config.data has not. It has {sorted(shared)}, and a source of a"
        f" mixture {list(_OF_MIXTURES)}."
      )
    parts[name] = {**shared, "weight": 1.0, **fields}
    _check_part(name, parts[name])
  later = config.get("reweighted") or {}
  if not hasattr(later, "values"):
    raise errors.ConfigError(
      f"config.data.reweighted={later!r}: expected weights by the document from"
      ' which they hold, such as {"100000": {"coco": 2.0}}.'
    )
  changed = {
    name for some in later.values() if hasattr(some, "items") for name in some
  }
  # What has no weight now or later need not be there.
  return {
    name: part
    for name, part in parts.items()
    if part["weight"] or name in changed
  }


def _check_part(name, part):
  """Checks name, weight and mixture of a source of a mixture."""
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise errors.ConfigError(
      f"config.data.sources has the name {name!r}: expected letters, digits, _"
      " and -."
    )
  mixture = part.get("mixture", {})
  if not hasattr(mixture, "items"):
    raise errors.ConfigError(
      f"config.data.sources.{name}.mixture={mixture!r}: expected weights of"
      ' tasks, such as {"image_text": 1.0}.'
    )
  for field, value in (
    ("weight", part["weight"]),
    *((f"mixture.{task}", weight) for task, weight in mixture.items()),
  ):
    if not is_weight(value):
      raise errors.ConfigError(
        f"config.data.sources.{name}.{field}={value!r}: expected a number, 0 or"
        " more."
      )


def is_weight(value: Any) -> bool:
  """Returns whether a value can be a weight: a finite number, 0 or more."""
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return number and 0 <= value < math.inf


def build(config: Mapping[str, Any], split: str) -> examples.Source:
  """Returns the source that config.data describes.

  Args:
    config: fields `kind` ("shapes", "jsonl", "webdataset", "parquet", "hf",
      "arrayrecord" or "tfds"), `image_size`, `seed` and those of the kind:
      shapes `train_size`, `held_out_size`; tfds `name`, `train_split`,
      `held_out_split`, `data_dir`, `image_feature`, `text_feature`; the others
      `path`,
      `held_out_path` (empty: a tenth of `path`, by hash); jsonl, parquet and
      hf `allow_absolute`, `image_feature`, `text_feature`; hf `train_split`,
      `held_out_split`. `limit_share` is the share of bad lines,
      samples, rows or records that is an error; `filters` choose images and
      texts (`filters.py`); `workers` is the number of processes that decode
      images, and `decoding` how (`images/decoding.py`). Or `sources`, see
      above.
    split: "train", "held_out" or (shapes only) "never_seen".

  Raises:
    errors.ConfigError: an unknown kind, a split that this kind lacks, or a
      limit_share that is not a share.
    errors.DataError: the data cannot be read.
  """
  if parts := parts_of(config):
    return mixed.MixedSource(
      [
        mixed.Part(
          name,
          _build_part(name, part, split),
          part["weight"],
          part.get("mixture", {}),
        )
        for name, part in parts.items()
      ]
    )
  if config.get("sources"):
    raise errors.ConfigError(
      "config.data.sources: all have weight 0, so that there are no data. Give"
      " one of them a weight above 0."
    )
  _check_features(config)
  return _build_one(config, split)


def _build_part(name, part, split) -> examples.Source:
  """Returns a source of a mixture; errors tell which.

  Names of columns that are meant for another source are none of its own.
  """
  try:
    return _build_one(part, split)
  except errors.LavitError as error:
    raise type(error)(f"config.data.sources.{name}: {error}") from error


def _build_one(config, split) -> examples.Source:
  """Returns the only source that a config describes."""
  _check_numbers(config)
  chosen = filters.Filters.of(config.get("filters"))
  if not chosen.keep_all:
    whole = _build_one({**config, "filters": {}}, split)
    return filtered.FilteredSource(whole, chosen)
  common: dict[str, Any] = dict(
    limit_share=faults.share_of(config), decode=_decoding(config)
  )
  kind = config["kind"]
  if kind == "shapes":
    _check_no_path(config)
    return shapes.ShapesSource(
      split,
      size=config["train_size" if split == "train" else "held_out_size"],
      image_size=config["image_size"],
      seed=config["seed"],
    )
  if split not in ("train", "held_out"):
    raise errors.ConfigError(
      f"Data of kind {kind!r} has splits train and held_out, not {split!r};"
      " only the embedded shapes have never_seen."
    )
  make = _OF_TABLES.get(kind)
  if kind == "jsonl" and not _is_in_place(config):
    path, part = _path_of(config, split)
    return jsonl.JsonlSource(
      path,
      config["image_size"],
      split=part,
      allow_absolute=config.get("allow_absolute", False),
      **common,
    )
  if kind == "webdataset":
    path, part = _path_of(config, split)
    return webdataset.WebDatasetSource(
      path, config["image_size"], split=part, **common
    )
  if kind == "arrayrecord":
    path, part = _path_of(config, split)
    return prepared.PreparedSource(
      path, config["image_size"], split=part, **common
    )
  if make is not None:
    path, part = _path_of(config, split)
    if kind == "hf" and part == split:
      path, part = hf.part_of(
        path,
        split,
        config.get("train_split", "train"),
        config.get("held_out_split", "test"),
      )
    return make(
      path,
      config["image_size"],
      split=part,
      image_column=config.get("image_feature", columns.IMAGE),
      text_column=config.get("text_feature", columns.TEXT),
      allow_absolute=config.get("allow_absolute", False),
      **common,
    )
  if kind == "tfds" and not config.get("name"):
    raise errors.ConfigError(
      "config.data.kind='tfds', but config.data.name is empty. Give the name of"
      " a prepared dataset: --config.data.name=my_dataset."
    )
  if kind == "tfds":
    return tfds.TfdsSource(
      config["name"],
      split=config[f"{split}_split"],
      data_dir=config["data_dir"] or None,
      image_feature=config["image_feature"],
      text_feature=config["text_feature"],
      image_size=config["image_size"],
      **common,
    )
  raise errors.ConfigError(
    f"config.data.kind={kind!r} is unknown; expected shapes, jsonl,"
    " webdataset, parquet, hf, arrayrecord or tfds."
  )


def _check_no_path(config) -> None:
  """Raises ConfigError for a path beside the scenes, which would be ignored."""
  for field in ("path", "held_out_path"):
    if path := config.get(field):
      raise errors.ConfigError(
        f"config.data.{field}={path!r} is given, but config.data.kind='shapes'"
        " draws scenes and reads no files. Say of what kind the files are:"
        f" --config.data.kind={kind_of(path)}."
      )


def _check_features(config) -> None:
  """Raises ConfigError for names of columns, where there are no columns."""
  if config["kind"] not in ("webdataset", "arrayrecord"):
    return
  fields = ("image_feature", "text_feature")
  for field, usual in zip(fields, _USUAL, strict=True):
    if (given := config.get(field, usual)) != usual:
      raise errors.ConfigError(
        f"config.data.{field}={given!r} names a column, and data of kind"
        f" {config['kind']!r} have none: images and captions of archives are"
        " found by the names of their files (docs/data.md). Leave it out."
      )


def _check_numbers(config) -> None:
  """Checks the numbers that all kinds have.

  Raises:
    errors.ConfigError: one of them is none.
  """
  size = config["image_size"]
  if type(size) is not int or size < 1:
    raise errors.ConfigError(
      f"config.data.image_size={size!r}: expected pixels of a side, 1 or more."
    )
  share = faults.share_of(config)
  if isinstance(share, bool) or not isinstance(share, int | float):
    raise errors.ConfigError(
      f"config.data.limit_share={share!r}: expected a share, 0 to 1."
    )


def _is_in_place(config) -> bool:
  """Whether JSON lines are read in place.

  Both halves are, or none, so that it is seen whether they share files. What
  reads them so knows fields of other names.
  """
  image = config.get("image_feature", columns.IMAGE)
  if (image, config.get("text_feature", columns.TEXT)) != _USUAL:
    return True
  paths = filter(None, (config["path"], config.get("held_out_path")))
  return any(map(json_lines.is_meant, paths))


def _decoding(config) -> decoding.Decode:
  """Returns what decodes the images, in this process or in others.

  Raises:
    errors.ConfigError: config.data.decoding is unknown, or workers is no
      number.
  """
  count, way = config.get("workers", 0), config.get("decoding", "exact")
  if type(count) is not int or not 0 <= count <= _MOST_WORKERS:
    raise errors.ConfigError(
      f"config.data.workers={count!r}: expected the number of processes that"
      f" decode images, 0 (this one) to {_MOST_WORKERS}."
    )
  return _decoders(count, way) if count else decoding.way(way)


@functools.cache
def _decoders(count, way) -> decoders.Decoders:
  """Returns the processes, which all sources share."""
  return decoders.Decoders(count, way)


def kind_of(path: str | os.PathLike[str]) -> str:
  """Returns the kind of the data at a path, by its name and what is there.

  It is "arrayrecord", "parquet", "hf", "webdataset" or "jsonl".
  """
  if prepared.is_named(path):
    return "arrayrecord"
  if parquet.is_named(path):
    return "parquet"
  if json_lines.is_folder(path):
    return "jsonl"
  if hf.is_named(path):
    return "hf"
  return "webdataset" if archives.is_named(path) else "jsonl"


def is_empty(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is a folder without data that are known."""
  if files.is_remote(path) or not os.path.isdir(path):
    return False
  names = os.listdir(path)
  archive = (".tar", *archives.COMPRESSED)
  return kind_of(path) == "webdataset" and not any(
    name.lower().endswith(archive) for name in names
  )


def nothing_in(path: str | os.PathLike[str]) -> str:
  """Returns what to say of a folder that holds no data that are known."""
  path = os.fspath(path)
  names = sorted(os.listdir(path))
  some = ", ".join(names[:5]) or "nothing"
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  said = (
    f"{path} is a folder without data that are known: tar archives, Parquet"
    " files, JSON lines, metadata.csv, images, what `datasets` saved or lavit"
    f" data prepare wrote. It holds {some}{more}."
  )
  if any(name.endswith(".array_record") for name in names):
    return f"{said} The manifest.json of prepared data is missing."
  inner = [os.path.join(path, name) for name in names[:100]]
  known = [one for one in inner if os.path.isdir(one) and not is_empty(one)]
  return f"{said} Give one of its folders, {known[0]}." if known else said


def _path_of(config, split):
  """Returns (path, split of it): a path of its own, or a part of one.

  Raises:
    errors.ConfigError: config.data.path is empty.
  """
  path, part, kind = config["path"], split, config["kind"]
  if config.get("held_out_path"):
    path = config["held_out_path"] if split == "held_out" else path
    part = "all"
  if not path:
    example = _EXAMPLES[kind]
    raise errors.ConfigError(
      f"config.data.kind={kind!r}, but config.data.path is empty. Give"
      f" {example[0]}: --config.data.path={example[1]}."
    )
  return path, part


def describe(
  config: Mapping[str, Any], split: str, source: examples.Source
) -> str:
  """Returns a description of a source that `build` returned, for messages."""
  name = source.name
  if isinstance(source, mixed.MixedSource):
    parts = parts_of(config)
    return "; ".join(
      describe(parts[part.name], split, part.source) for part in source.parts
    )
  if config["kind"] in _EXAMPLES:
    part = "a tenth" if split == "held_out" else "nine tenths"
    split_of = getattr(filtered.whole(source), "split", "")
    apart = config.get("held_out_path") or split_of == "all"
    part = "all" if apart else f"{split}, {part} by hash,"
    name = f"{part} of {name}"
  return f"{name}: {source.num_images} images of {source.image_size} pixels"


def pair(
  config: Mapping[str, Any],
) -> tuple[examples.Source, examples.Source]:
  """Returns the (train, held-out) sources; warns if they share images."""
  train, held_out = build(config, "train"), build(config, "held_out")
  if not isinstance(train, mixed.MixedSource):
    _warn_of_shared(config, train, held_out)
    return train, held_out
  assert isinstance(held_out, mixed.MixedSource)
  for part, one, two in zip(
    parts_of(config).values(), train.parts, held_out.parts, strict=True
  ):
    _warn_of_shared(part, one.source, two.source)
  return train, held_out


def _warn_of_shared(config, train, held_out):
  """Warns if training and held-out data share images."""
  shared, total, unit = _count_shared(config, train, held_out)
  if shared:
    _LOG.warning(
      "%d of %d held-out %s are in the training data too (%s, %s):"
      " held-out numbers say nothing about new images",
      shared,
      total,
      unit,
      train.name,
      held_out.name,
    )


def _count_shared(config, train, held_out) -> tuple[int, int, str]:
  """Returns (number in both, number held out, name of these)."""
  train, held_out = (
    one.source if isinstance(one, filtered.FilteredSource) else one
    for one in (train, held_out)
  )
  if config["kind"] == "tfds":
    return tfds.overlap(train, held_out), held_out.num_images, "records"
  if config["kind"] == "arrayrecord":
    shared = prepared.overlap(train, held_out)
    return shared, held_out.num_images, "images"
  if config["kind"] == "webdataset":
    shared = webdataset.overlap(train, held_out)
    return shared, held_out.num_images, "samples"
  if isinstance(train, tables.TableSource):
    return tables.overlap(train, held_out), held_out.num_rows, "rows"
  if config["kind"] != "jsonl":
    return 0, held_out.num_images, "images"
  path = config.get("held_out_path")
  if not held_out.num_images and path and files.same(path, config["path"]):
    count = sum(held_out.num_examples(task) for task in held_out.tasks())
    return count, count, "examples"
  held = set(_image_files(held_out))
  both = {file for file in _image_files(train) if file in held}
  return len(both), len(held), "images"


def _image_files(source: jsonl.JsonlSource) -> Iterator[str]:
  """Yields the file of each image, with links followed.

  Lists each folder once, instead of asking for every image whether it is a
  link, which takes minutes on a network disk.
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
      entries = os.scandir(real) if os.path.isdir(real) else ()
      folders[folder] = real, {e.name for e in entries if e.is_symlink()}
    real, links = folders[folder]
    yield os.path.realpath(path) if name in links else os.path.join(real, name)


def sentences(source: examples.Source, limit: int) -> list[str]:
  """Returns up to `limit` texts of a source, for SentencePiece.

  Takes one example of every task in turn.
  """
  if isinstance(source, mixed.MixedSource):
    share = -(-limit // len(source.parts))
    found = [sentences(part.source, share) for part in source.parts]
    return [text for some in found for text in some][:limit]
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
