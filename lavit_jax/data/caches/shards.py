"""Writes caches in shards, so that an interrupted one can be resumed.

DIR.partial     the cache while it is being written; the next call resumes it
DIR/meta.json   fingerprints of the data and model it was made from; written
                last, so that a folder that has it is complete

The code cache (`codes.py`) and the latent cache (`latents.py`) share this
module, and add the contents of a shard.
"""

import abc
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import files

_LOG = logging.getLogger(__name__)
_VERSION = 1  # of the files; `Meta.format`
_PARTIAL = ".partial"  # at the end of an unfinished folder's name
_PAUSE = 1.0  # seconds between two looks for shards of others
_SAY_AFTER = 60.0  # seconds
_IMAGES = "pictures"  # field of Meta: fingerprint of the images' bytes
# A pathlib.Path, or an epath.Path in an object store.
Folder = Any


class Meta(Protocol):
  """Fields that the meta.json of every cache has; a frozen dataclass.

  A fingerprint that a cache of an earlier version lacks is "".
  """

  __dataclass_fields__: ClassVar[dict[str, Any]]

  @property
  def source(self) -> str:
    """Fingerprint of the dataset: names and order of its images."""

  @property
  def pictures(self) -> str:
    """Fingerprint of the images' bytes."""


M = TypeVar("M", bound=Meta)
Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(Generic[M]):
  """One kind of cache: reads, writes and compares its meta.json.

  Attributes:
    name: of this kind in messages, such as "code cache".
    command: that writes such a cache, such as "lavit tokenize".
    meta: the dataclass of the fields of meta.json.
    descriptions: fingerprint field -> field that describes the same thing in
      words, for messages.
    not_compared: fields in which two metas of the same cache may differ.
  """

  name: str
  command: str
  meta: type[M]
  descriptions: Mapping[str, str]
  not_compared: tuple[str, ...]

  def read_meta(self, folder: Folder) -> M | None:
    """Returns the meta of a complete cache, None if there is no meta.json.

    Raises:
      errors.DataError: meta.json is damaged, or of another version.
    """
    path = folder / "meta.json"
    if not path.exists():
      return None
    try:
      fields = json.loads(path.read_text())
      if fields.get("format") != _VERSION:
        raise ValueError(f"format {fields.get('format')}, expected {_VERSION}")
      return self.meta(**fields)
    except (OSError, ValueError, TypeError, AttributeError) as error:
      raise self.damaged(folder, error) from error

  def load_meta(self, folder: Folder) -> M:
    """Returns the meta of a complete cache.

    Raises:
      errors.DataError: there is no cache, or it is unfinished or damaged.
    """
    meta = self.read_meta(folder)
    if meta is not None:
      return meta
    unfinished = partial_of(folder).exists()
    if folder.name.endswith(_PARTIAL):
      unfinished, folder = (
        True,
        folder.with_name(folder.name.removesuffix(_PARTIAL)),
      )
    inside = [p.parent.name for p in sorted(folder.glob("*/meta.json"))]
    raise errors.DataError(
      f"{folder} holds {'an unfinished' if unfinished else 'no'} {self.name};"
      f" run `{self.command} … --out {folder}`, which resumes where it stopped."
      + (f" It contains caches: {', '.join(inside)}." if inside else "")
    )

  def write_meta(self, folder: pathlib.Path, meta: M) -> None:
    """Writes meta.json; everything else must be in the folder already."""
    replace_text(folder / "meta.json", json.dumps(dataclasses.asdict(meta)))

  def check(
    self, folder: Folder, stored: M, expected: Mapping[str, Any]
  ) -> None:
    """Checks that a cache was made from the data and model of its user.

    Args:
      folder: of the cache, for the message.
      stored: its meta.
      expected: field of the meta -> value; None matches any. Fingerprints of
        the images' bytes are compared only where both sides have one.

    Raises:
      errors.DataError: a field differs.
    """
    for field, value in expected.items():
      found = getattr(stored, field)
      if value is None or found == value or field in self.not_compared:
        continue
      if field == _IMAGES and not (found and value):
        continue
      name = self.descriptions.get(field, "")
      label = "set of images" if field == _IMAGES else field
      raise errors.DataError(
        f"The {self.name} {folder} was made with another {label}"
        f" ({described(found, getattr(stored, name, ''))}, here"
        f" {described(value, expected.get(name, ''))}), so its contents mean"
        f" something else. Run `{self.command}` with another --out, or delete"
        " it first."
      )

  def fingerprint(self, meta: M, index: np.ndarray) -> str:
    """Returns a hex digest of what a cache was made from, and of its index.

    Args:
      meta: of the cache.
      index: one number an image.
    """
    fields = dataclasses.asdict(meta)
    left_out = self.not_compared
    if not meta.pictures:  # keeps the digest of caches of earlier versions
      left_out = (*left_out, _IMAGES)
    compared = {k: v for k, v in fields.items() if k not in left_out}
    digest = hashlib.sha256(json.dumps(compared, sort_keys=True).encode())
    digest.update(index.tobytes())
    return digest.hexdigest()[:32]

  def damaged(self, folder: Folder, reason: object) -> errors.DataError:
    """Returns the error for a cache that cannot be read."""
    return errors.DataError(
      f"The {self.name} {folder} is damaged ({reason}); delete it and run"
      f" `{self.command}` again."
    )


class Writer(abc.ABC, Generic[M, Record]):
  """Writes one cache, or resumes one that was interrupted.

  A subclass writes a shard and seals it: after a kill, what follows the last
  seal is written again. Its `journal` files hold the seals until the cache is
  complete.
  """

  shard_size: int  # images between two seals
  first_files: Sequence[str]  # that `begin` writes, in this order

  def __init__(
    self, kind: Format[M], directory: str | os.PathLike[str], meta: M
  ) -> None:
    """Opens nothing yet.

    Args:
      kind: the kind of cache.
      directory: the complete cache will be here, all of it or nothing.
      meta: what it is made from.

    Raises:
      errors.UsageError: the directory is in an object store.
    """
    files.require_local(directory, f"a {kind.name}")
    self.kind, self.meta = kind, meta
    self.directory = pathlib.Path(directory)
    self.partial = partial_of(self.directory)

  @abc.abstractmethod
  def begin(self) -> None:
    """Writes the first files of an empty `self.partial`."""

  @abc.abstractmethod
  def begun_meta(self) -> M | None:
    """Returns the meta that `begin` stored, None before `begin`."""

  @abc.abstractmethod
  def is_sealed(self, shard: int) -> bool:
    """Returns whether a shard of `self.partial` is complete."""

  @abc.abstractmethod
  def count_all(self, folder: pathlib.Path) -> int:
    """Returns how many images the cache has once it is complete."""

  @abc.abstractmethod
  def write_shard(self, first: int, records: list[Record]) -> None:
    """Writes the records of images first, first + 1, …, and seals them."""

  def finish(self) -> None:
    """Writes the files that need all shards, just before meta.json."""

  @abc.abstractmethod
  def journal(self) -> list[pathlib.Path]:
    """Returns the files that only resuming needs."""

  def resume_point(self, part: tuple[int, int] = (0, 1)) -> int:
    """Returns how many images of a part `write` will not ask for.

    Args:
      part: see `write`.

    Raises:
      errors.DataError: the directory holds another cache.
    """
    number, parts = part
    folder = self._complete()
    if folder is None and not self._check_begun():
      return 0
    sizes = self._sizes(self.count_all(folder or self.partial))
    mine = list(enumerate(sizes))[number::parts]
    return sum(n for shard, n in mine if folder or self.is_sealed(shard))

  def _sizes(self, total: int) -> list[int]:
    """Returns the number of images in each shard of so many."""
    return sizes_of(total, self.shard_size)

  def write(
    self,
    records: Callable[[int, int], Iterable[Record]],
    part: tuple[int, int] = (0, 1),
    *,
    quiet: bool = True,
    together: bool = False,
  ) -> None:
    """Writes every shard of a part that is missing; by default of all.

    The first part waits for the shards of the others, and completes the cache.
    While it waits, it says once a minute how many are missing.

    Args:
      records: function of (first, stop) that gives the records of these images,
        in order.
      part: (number of the part, number of parts): shards number, number +
        parts, … are written here. All parts share the folder.
      quiet: say nothing while shards of other parts are missing.
      together: whether other parts, too, wait until the cache is complete, as
        processes must that JAX has joined: the end of one is the end of all.

    Raises:
      errors.DataError: the directory holds something else, records are missing
        or do not fit, or the disk is full; sealed shards stay for the next
        call.
    """
    number, _ = part
    complete = self._complete()
    if complete == self.directory or (complete and number):
      return
    if self.directory.exists():
      raise errors.DataError(
        f"{self.directory} exists and is no {self.kind.name}; give another"
        " --out."
      )
    try:
      if complete is None:
        self._fill(records, part)
        if number:
          while together and self._complete() != self.directory:
            time.sleep(_PAUSE)
          return
        if not self._await_others(quiet):
          return
        self.finish()
        self.kind.write_meta(self.partial, self.meta)
      for path in (*self.journal(), *self.partial.glob("*.tmp")):
        path.unlink(missing_ok=True)
      os.replace(self.partial, self.directory)
    except OSError as error:
      if self._complete() == self.directory:
        return  # another process wrote the same part, and was first
      raise errors.DataError(
        f"The {self.kind.name} could not be written ({error}). Finished shards"
        f" are kept in {self.partial}; make room and run the same command"
        " again, which resumes there."
      ) from error

  def _await_others(self, quiet) -> bool:
    """Waits until the shards of all parts are sealed.

    Returns:
      False if another process that writes this part has completed the cache.
    """
    shards = range(len(self._sizes(self.count_all(self.partial))))
    next_say = time.monotonic()
    while missing := sum(not self.is_sealed(shard) for shard in shards):
      if not quiet and time.monotonic() >= next_say:
        next_say = time.monotonic() + _SAY_AFTER
        _LOG.warning(
          "%s: %d shards of other processes are missing; they go on",
          self.directory,
          missing,
        )
      time.sleep(_PAUSE)
      if self._complete() == self.directory:
        return False
    return True

  def _fill(self, records, part):
    """Writes the shards of a part that are missing."""
    is_begun(self.partial, self.first_files)
    self.partial.mkdir(parents=True, exist_ok=True)
    if not self._check_begun():
      self.begin()
    sizes, (number, parts) = self._sizes(self.count_all(self.partial)), part
    for shard in range(number, len(sizes), parts):
      if self.is_sealed(shard):
        continue
      first = shard * self.shard_size
      found = list(records(first, first + sizes[shard]))
      if len(found) != sizes[shard]:
        raise errors.DataError(
          f"{len(found)} images came for {self.partial} from number {first} on:"
          f" expected {sizes[shard]} of {sum(sizes)}, in order."
        )
      self.write_shard(first, found)

  def _complete(self) -> pathlib.Path | None:
    """Returns the folder with a complete cache of this meta, if there is one.

    A kill between meta.json and the last rename leaves `self.partial` so.
    """
    for folder in (self.directory, self.partial):
      if (stored := self.kind.read_meta(folder)) is not None:
        self.kind.check(folder, stored, vars(self.meta))
        return folder
    return None

  def _check_begun(self) -> bool:
    """Whether `self.partial` was begun; DataError if with another meta."""
    begun = self.begun_meta()
    if begun is not None:
      self.kind.check(self.partial, begun, vars(self.meta))
    return begun is not None


def sizes_of(total: int, shard_size: int) -> list[int]:
  """Returns the images in each shard, of which a part has every Nth."""
  firsts = range(0, total, shard_size)
  return [min(shard_size, total - first) for first in firsts]


def label(verb: str, split: str, part: tuple[int, int]) -> str:
  """Returns what a progress bar says of the writing of a part of a cache."""
  number, parts = part
  return f"{verb} {split}" + (f" {number + 1}/{parts}" if parts > 1 else "")


def described(fingerprint: Any, description: str) -> Any:
  """Returns a fingerprint as messages show it: after its description, if any.

  described("0123456789abcdef", "my.jsonl") is "my.jsonl (0123456789ab)"; a
  value without a description stays as it is.
  """
  if not description:
    return fingerprint
  return f"{description} ({fingerprint[:12]})"


def partial_of(folder: Folder) -> Folder:
  """Returns the folder in which a cache is written."""
  return folder.with_name(folder.name + _PARTIAL)


def is_begun(partial: pathlib.Path, first_files: Sequence[str]) -> bool:
  """Returns whether an unfinished folder was begun; False if it is not there.

  Args:
    partial: the folder.
    first_files: names of the files with which it begins, in the order in which
      they are written; the last one says that it was begun.

  Raises:
    errors.DataError: it holds something else.
  """
  if partial.exists() and not partial.is_dir():
    raise errors.DataError(
      f"{partial} is a file; move it or give another name."
    )
  if (partial / first_files[-1]).exists():
    return True
  found = {p.name for p in partial.glob("*") if not is_temporary(p)}
  if strange := sorted(found - set(first_files)):
    raise errors.DataError(
      f"{partial} would be written to, and holds something else"
      f" ({', '.join(strange[:3])}). Move it, or give another name."
    )
  return False


def replace(source: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a file once its bytes are on the disk."""
  with source.open("rb") as file:
    os.fsync(file.fileno())
  os.replace(source, target)


def replace_text(path: pathlib.Path, text: str) -> None:
  """Writes a small file, all of it or nothing, whoever else writes it."""
  replace_bytes(path, text.encode())


def replace_bytes(path: pathlib.Path, data: bytes) -> None:
  """Does the same with bytes."""
  temporary = temporary_of(path)
  temporary.write_bytes(data)
  replace(temporary, path)


def temporary_of(path: pathlib.Path) -> pathlib.Path:
  """Returns a name beside a file that no other process has."""
  return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def is_temporary(path: pathlib.Path) -> bool:
  """Returns whether a file is one of `temporary_of`."""
  return bool(re.search(r"\.[0-9a-f]{16}\.tmp$", path.name))
