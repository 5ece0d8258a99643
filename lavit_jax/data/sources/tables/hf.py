"""Reads folders of Hugging Face's library `datasets`, without that library.

What `save_to_disk` wrote: Arrow files, which are mapped into memory, of one
split or of several. And what it calls an imagefolder: images beside a
metadata.csv, .jsonl or .parquet, whose file_name (or mask_file_name, or
file_names) names them, in the folder or in folders below it; or images with a
.txt of the same name beside them, their caption; or, where there is no such
text, in a folder for each class, whose name is their caption (of one folder
alone the name says nothing).

A row is what a row of `parquet.py` is.
"""

import filecmp
import hashlib
import itertools
import json
import logging
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

from lavit_jax.core import errors
from lavit_jax.core.storage import fetched, files
from lavit_jax.data.indexes import stored, tar_samples
from lavit_jax.data.indexes.tables import tables as tables_lib
from lavit_jax.data.records import columns
from lavit_jax.data.sources.tables import source

_LOG = logging.getLogger(__name__)
_STATE, _DICT, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"
_LISTINGS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {
  *("train", "training", "test", "testing", "dev", "eval"),
  *("val", "valid", "validation"),
}
_MOST_TEXT = 1 << 20  # bytes of a text beside an image
_LOOKED_AT = 1000  # entries of a folder that tell what it is
_SUFFIXES = {f".{kind.decode()}" for kind in tar_samples.IMAGES}
# What may hold words of images that it lies beside.
_OF_WORDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


class HfSource(source.TableSource):
  """The rows of one split of a dataset in a folder."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    image_size: int,
    *,
    image_column: str = columns.IMAGE,
    text_column: str = columns.TEXT,
    allow_absolute: bool = False,
    **kwargs: Any,
  ) -> None:
    """Reads the texts of the dataset once; later their index.

    Args:
      path: the folder, or a metadata file in it.
      image_size: images are resized to this square.
      image_column: column of the images; "image" also finds one of another
        name.
      text_column: column of the words; "caption" also finds others.
      allow_absolute: let images lie outside the folder.
      **kwargs: as of `source.TableSource`: split, limit_share and so on.

    Raises:
      errors.DataError: there is no such dataset, it has several splits, or a
        file of it cannot be read; no row can be used, or too many cannot.
      errors.ConfigError: there is no such split.
    """
    folder = files.input_path(os.fspath(path).rstrip("/") or "/")
    options = {
      "image": image_column,
      "text": text_column,
      "allow_absolute": allow_absolute,
    }
    super().__init__(
      folder.name,
      list(_tables(folder, options)),
      image_size,
      **kwargs,
    )


def is_named(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is a folder of `datasets`, by the files in it."""
  folder = pathlib.Path(path)
  if folder.name == "metadata.csv":
    return True
  if files.is_remote(path) or not folder.is_dir():
    return False
  if any((folder / name).is_file() for name in (_STATE, _DICT, *_LISTINGS)):
    return True
  some = _first(folder)
  if any(entry.name.lower().endswith(".tar") for entry in some):
    return False
  below = [entry.path for entry in some if entry.is_dir()]
  if _has_images(some) or any(_has_images(_first(path)) for path in below):
    return True
  return bool(splits_of(folder)) and any(map(is_named, below))


def part_of(
  path: str | os.PathLike[str], split: str, train: str, held_out: str
) -> tuple[str, str]:
  """Returns (path of the folder, split of it) to train on or to hold out.

  A dataset with splits of its own has a folder for each.

  Args:
    path: of the dataset.
    split: "train" or "held_out".
    train: name of its split to train on.
    held_out: name of its split that is held out; where there is none of that
      name, a part of the other is.

  Raises:
    errors.DataError: it has splits, and none of the name `train`.
  """
  path = os.fspath(path)
  names = splits_of(path)
  if not names:
    return path, split
  if train not in names:
    raise errors.DataError(
      f"{path} has the splits {', '.join(names)}, and none is"
      f" config.data.train_split={train!r}. Name one of them."
    )
  apart = held_out in names and held_out != train
  name = held_out if apart and split == "held_out" else train
  return f"{path.rstrip('/')}/{name}", "all" if apart else split


def splits_of(path: str | os.PathLike[str]) -> list[str]:
  """Returns the names of the splits of a dataset in a folder.

  Empty for one that is a split itself.

  Raises:
    errors.DataError: its list of splits cannot be read.
  """
  folder = files.input_path(path)
  if not folder.is_dir():
    return []
  if (folder / _DICT).exists():
    names = _json(folder / _DICT).get("splits")
    if not isinstance(names, list) or not all(_is_plain(n) for n in names):
      raise tables_lib.damaged(folder / _DICT, "a list of splits", repr(names))
    return names
  if any((folder / name).exists() for name in (_STATE, *_LISTINGS)):
    return []
  names = [name for name in _folders(folder) if not name.startswith(".")]
  return names if names and set(names) <= _SPLITS else []


def _tables(folder, options) -> Iterator[tables_lib.File]:
  """Yields the tables of a dataset in a folder."""
  if folder.name in _LISTINGS and not folder.is_dir():
    yield _listing(folder, folder.name, options)
    return
  if not folder.is_dir():
    raise errors.DataError(
      f"There is no folder {folder}. Give one that `datasets` has saved, or one"
      " with images and a metadata.csv."
    )
  if names := splits_of(folder):
    raise errors.DataError(
      f"{folder} has the splits {', '.join(names)}. Give one of them, such as"
      f" {folder / names[0]}."
    )
  if (folder / _STATE).exists():
    yield from _saved(folder, options)
    return
  found = [name for name in _LISTINGS if (folder / name).exists()]
  if not found:
    below = _files(folder)
    found = [n for n in below if n.rpartition("/")[2] in _LISTINGS]
    if not found:
      yield _of_classes(folder, below, options)
      return
  kinds = {name.rpartition(".")[2] for name in found}
  if len(kinds) > 1:
    raise errors.DataError(
      f"{folder} has {' and '.join(found[:4])}: keep metadata of one kind."
    )
  for name in found:
    yield _listing(folder / name, name, options)


def _saved(folder, options) -> Iterator[tables_lib.File]:
  """Yields the Arrow files that `save_to_disk` wrote."""
  state = _json(folder / _STATE)
  listed = state.get("_data_files")
  names: list[Any] = [
    item.get("filename") if isinstance(item, dict) else None
    for item in (listed if isinstance(listed, list) else [])
  ]
  if not names or not all(_is_plain(name) for name in names):
    raise tables_lib.damaged(
      folder / _STATE, "a list of Arrow files", repr(listed)[:80]
    )
  if state.get("_indices_data_files"):
    raise errors.DataError(
      f"{folder} was saved with a choice of its rows beside it, by an old"
      " release of `datasets`. Save it again with a newer one, which writes"
      " the rows themselves."
    )
  features = None
  if (folder / _INFO).exists():
    features = _json(folder / _INFO).get("features")
  try:
    local = fetched.folder(folder, names)
  except FileNotFoundError as error:
    raise errors.DataError(
      f"{folder} lacks a file that its {_STATE} names ({error})."
    ) from error
  for name in names:
    yield tables_lib.File(
      kind="arrow",
      path=local / name,
      name=f"{folder.name}/{name}",
      folder=folder,
      features=features,
      **options,
    )


def _listing(path, name, options) -> tables_lib.File:
  """Returns a table that names the images beside it."""
  kind = "parquet" if path.suffix == ".parquet" else "text"
  return tables_lib.File(
    kind=kind,
    path=path,
    name=name,
    folder=path.parent,
    listing=True,
    **options,
  )


def _of_classes(folder, below, options) -> tables_lib.File:
  """Returns a table of images with texts beside them, or in folders of classes.

  It is written beside the indexes, and anew where it has changed.
  """
  images = [n for n in below if os.path.splitext(n)[1].lower() in _SUFFIXES]
  if not images:
    more = "."
    if any(name.endswith(".parquet") for name in below):
      more = ", but Parquet files: config.data.kind='parquet' reads these."
    raise errors.DataError(
      f"{folder} has neither a {_STATE}, as `datasets` saves it, nor a"
      f" metadata.csv, .jsonl or .parquet, nor images{more}"
    )
  texts = {name for name in below if name.endswith(".txt")}
  _warn_of_words(folder, images, below)
  digest = hashlib.sha256(os.fsencode(files.absolute(folder))).hexdigest()
  path = stored.folder() / digest[:32] / "classes.jsonl"
  unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("w") as stream:
      for row in _rows(folder, images, texts):
        stream.write(json.dumps(row) + "\n")
    if not path.exists() or not filecmp.cmp(path, unfinished, shallow=False):
      os.replace(unfinished, path)
  except OSError as error:
    raise errors.DataError(
      f"The list of the images in {folder} cannot be written to {path.parent}"
      f" ({error.strerror or error}). Set LAVIT_INDEXES to a folder that can be"
      " written."
    ) from error
  finally:
    unfinished.unlink(missing_ok=True)
  return tables_lib.File(
    kind="text",
    path=path,
    name=folder.name,
    folder=folder,
    **options,
  )


def _rows(folder, images, texts) -> Iterator[dict[str, str]]:
  """Yields the name and the caption of each image.

  Args:
    folder: of all.
    images: paths of the images, relative to it.
    texts: paths of the texts beside them. If any image has one, the names of
      folders are no captions.
  """
  beside = {name: _text_of(name) for name in images}
  if not texts.intersection(beside.values()):
    labels = [name.rpartition("/")[0].rpartition("/")[2] for name in images]
    several = len({label for label in labels if label}) > 1
    for name, label in zip(images, labels, strict=True):
      known = {"caption": label} if label and several else {}
      yield {"file_name": name} | known
    return
  for name in images:
    row = {"file_name": name}
    if beside[name] in texts:
      data = (folder / beside[name]).read_bytes()[:_MOST_TEXT]
      row["caption"] = data.decode("utf-8-sig", "surrogateescape").strip()
    yield row


def _text_of(image) -> str:
  """Returns the path of the text beside an image."""
  return f"{os.path.splitext(image)[0]}.txt"


def _warn_of_words(folder, images, below) -> None:
  """Warns of files that may hold words of the images, and are not read."""
  read = {_text_of(name) for name in images}
  others = [n for n in below if n.lower().endswith(_OF_WORDS) and n not in read]
  if others:
    more = f" and {len(others) - 1} more files" if len(others) > 1 else ""
    _LOG.warning(
      "%s: %s%s beside the images %s not read. If the words of the images are"
      " in a file of its own, give its path in place of the folder's.",
      folder,
      others[0],
      more,
      "are" if more else "is",
    )


def _files(folder) -> list[str]:
  """Returns the paths of all files below a folder, relative to it, sorted."""
  if files.is_remote(folder):
    system, name = files.system_of(folder)
    start = name.rstrip("/") + "/"
    return sorted(path.removeprefix(start) for path in system.find(name))
  found = []
  for parent, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith(".")]
    relative = os.path.relpath(parent, folder)
    start = "" if relative == "." else f"{relative}/"
    found += [f"{start}{name}" for name in names if not name.startswith(".")]
  return sorted(found)


def _folders(folder) -> list[str]:
  """Returns the names of the folders in a folder, sorted."""
  if files.is_remote(folder):
    return sorted(e.name for e in files.listing(folder) if e.is_dir())
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if entry.is_dir())


def _first(folder) -> list[os.DirEntry]:
  """Returns some entries of a folder on this disk."""
  with os.scandir(folder) as entries:
    return list(itertools.islice(entries, _LOOKED_AT))


def _has_images(entries) -> bool:
  """Whether an image, or a list of images, is among some entries."""
  return any(
    entry.name in _LISTINGS
    or os.path.splitext(entry.name)[1].lower() in _SUFFIXES
    for entry in entries
  )


def _is_plain(name: Any) -> bool:
  """Whether this is the name of a file, and not a path."""
  return isinstance(name, str) and "/" not in name and name not in ("", "..")


def _json(path) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Raises:
    errors.DataError: there is none.
  """
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise tables_lib.damaged(path, "JSON", str(error)) from error
  if not isinstance(value, dict):
    raise tables_lib.damaged(path, "JSON", f"{value!r:.40} is no object")
  return value
