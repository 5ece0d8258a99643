"""Turns any source into shards of ArrayRecord (`lavit data prepare`).

OUT.partial holds what is done so far; the same command goes on there. OUT
appears when all is written.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.core.storage import files
from lavit_jax.data import contents, faults
from lavit_jax.data.caches import shards as cache_shards
from lavit_jax.data.images import image_bytes
from lavit_jax.data.sources import filtered, kinds, mixed, prepared
from lavit_jax.data.workers import pool
from lavit_jax.jobs.prepare import looks, shards
from lavit_jax.jobs.prepare import plan as plan_lib

_BEGUN, _LOOKS, _PLAN, _LOCK = "begun.json", "looks", "plan.npz", "lock"
_BAD = "bad.jsonl"  # every image that cannot be used, and why
_NAMED = 3  # bad images in a message
_NAMES = {"image_text": "captions"}  # of tasks
_VERSIONS = ("lavit_jax", "pillow", "array_record")


def prepare(
  data: Mapping[str, Any] | str,
  out: str | os.PathLike[str],
  *,
  settings: plan_lib.Settings | None = None,
  fields: Mapping[str, Any] | None = None,
  workers: int = 0,
  quiet: bool = False,
) -> dict[str, Any]:
  """Writes all images and examples of a source to OUT.

  If it is interrupted, the next call resumes; nothing is looked at or written
  twice. The bytes written do not depend on the number of processes.

  Args:
    data: config.data, of which the split "train" is prepared; or a path, of
      which all is.
    out: the folder.
    settings: how; by default all images as they are.
    fields: override those of config.data.
    workers: processes; 0: as many as there are cores.
    quiet: no progress bars.

  Returns:
    The manifest.

  Raises:
    errors.UsageError: OUT is in an object store, or a setting is out of range.
    errors.DataError: the data cannot be read, too much of them is bad, OUT
      holds something else, or it cannot be written.
  """
  settings = settings or plan_lib.Settings()
  _check(settings)
  files.require_local(out, "prepared data")
  folder = pathlib.Path(os.path.abspath(out))
  config, split = config_of(data, fields)
  source = kinds.build(config, split)
  if isinstance(source, mixed.MixedSource):
    raise errors.UsageError(
      "A mixture of sources cannot be prepared as one: prepare each of them,"
      " and mix the prepared ones, whose weights can then still be changed."
    )
  begun = _begun(source, config, settings)
  if (found := _complete(folder, begun)) is not None:
    return found
  partial = cache_shards.partial_of(folder)
  job = _Job(source, config, split, partial, settings, workers, quiet)
  try:
    with _begin(partial, begun):
      manifest = _finished(partial, begun)
      if manifest is None:
        manifest = job.run()
        manifest |= {"from": begun["data"], "settings": begun["settings"]}
        cache_shards.replace_text(
          partial / prepared.MANIFEST, json.dumps(manifest, indent=1)
        )
      _clean(partial)
      os.replace(partial, folder)
  except OSError as error:
    raise errors.DataError(
      f"{partial} could not be written ({error}). What is finished stays there:"
      " make room and give the same command again."
    ) from error
  return manifest


def config_of(
  data: Mapping[str, Any] | str, fields: Mapping[str, Any] | None
) -> tuple[dict[str, Any], str]:
  """Returns (config.data, split) of all that a path or a config names."""
  if isinstance(data, Mapping):
    return {**data, **(fields or {})}, "train"
  config = {
    **dict.fromkeys(("name", "data_dir", "held_out_path"), ""),
    "kind": kinds.kind_of(data),
    "path": str(data),
    "image_size": 224,  # of squares, which are not prepared
    "seed": 0,
    "filters": {},
    **(fields or {}),
  }
  # The path beside itself: none of it is held out.
  return config | {"held_out_path": config["path"]}, "train"


def _check(settings) -> None:
  for name, least, most in (
    ("side", 0, 1 << 16),
    ("quality", 1, 100),
    ("distance", 0, 3),
    ("images_per_shard", 1, 1 << 24),
    ("examples_per_shard", 1, 1 << 24),
  ):
    value = getattr(settings, name)
    if type(value) is not int or not least <= value <= most:
      raise errors.UsageError(f"{name}={value!r}: expected {least} to {most}.")
  if settings.duplicates not in plan_lib.DUPLICATES:
    raise errors.UsageError(
      f"duplicates={settings.duplicates!r}: expected one of"
      f" {', '.join(plan_lib.DUPLICATES)}."
    )


def _begun(source, config, settings) -> dict[str, Any]:
  """Returns what an unfinished folder must have been begun with."""
  return {
    "format": prepared.FORMAT,
    "data": {
      "kind": config["kind"],
      "name": source.name,
      "images": source.num_images,
      "contents": contents.of(source),
      "pictures": image_bytes.of(source),
    },
    "settings": dataclasses.asdict(settings)
    | ({"filters": plain(config["filters"])} if config.get("filters") else {}),
  }


def _complete(folder, begun) -> dict[str, Any] | None:
  """Returns the manifest of a folder that is complete, None without one.

  Raises:
    errors.DataError: it was made otherwise, or is something else.
  """
  if not folder.exists():
    return None
  if not (folder / prepared.MANIFEST).exists():
    raise errors.DataError(
      f"{folder} exists, and is no prepared data. Give another folder."
    )
  manifest = prepared.read_manifest(folder)
  made = {"data": manifest.get("from"), "settings": manifest.get("settings")}
  _check_same(folder, made, begun)
  if wrong := _wrong_files(folder, manifest["files"]):
    raise errors.DataError(
      f"{folder} was complete, and is not: {'; '.join(wrong[:3])}. Delete it"
      " and give the same command again."
    )
  return manifest


def _finished(partial, begun) -> dict[str, Any] | None:
  """Returns the manifest of what only has to be renamed, None without one.

  As an end between the last file and the renaming leaves it.
  """
  if not (partial / prepared.MANIFEST).exists():
    return None
  return _complete(partial, begun)


def _wrong_files(folder, listed) -> list[str]:
  """Returns which listed files are missing or of another length."""
  wrong = []
  for name, (_, size) in listed.items():
    path = folder / name
    if not path.exists():
      wrong.append(f"{name} is missing")
    elif path.stat().st_size != size:
      wrong.append(f"{name} has {path.stat().st_size} bytes, expected {size}")
  return wrong


def _check_same(folder, made, begun) -> None:
  # Filters are a part of what is read, too: what is said of them comes first.
  for name in ("settings", "data"):
    here, there = begun[name], made.get(name)
    there = there if isinstance(there, dict) else {}
    differ = [
      f"{k}={there.get(k)!r}, here {here.get(k)!r}"
      for k in sorted({*here, *there})
      if here.get(k) != there.get(k)
    ]
    if differ:
      raise errors.DataError(
        f"{folder} was made with other {name}: {', '.join(differ)}. Give"
        " another folder, or delete it first."
      )


@contextlib.contextmanager
def _begin(partial, begun) -> Iterator[None]:
  """Makes the folder, or checks that it was begun alike; nobody else may.

  Raises:
    errors.DataError: it is something else, or another process writes it.
  """
  finished = (partial / prepared.MANIFEST).exists()
  ours = finished or cache_shards.is_begun(partial, (_LOCK, _BEGUN))
  partial.mkdir(parents=True, exist_ok=True)
  with (partial / _LOCK).open("a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise errors.DataError(
        f"{partial} is being written by another process. Wait for its end, or"
        " give another folder."
      ) from error
    for path in filter(cache_shards.is_temporary, partial.rglob("*.tmp")):
      path.unlink(missing_ok=True)  # of a process that was killed
    if not ours:
      cache_shards.replace_text(partial / _BEGUN, json.dumps(begun))
    elif not finished:
      _check_begun(partial, begun)
    (partial / _LOOKS).mkdir(exist_ok=True)
    yield


def _check_begun(partial, begun) -> None:
  """Checks that a folder was begun with the same data and settings."""
  path = partial / _BEGUN
  try:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
      raise ValueError("no object")
  except (OSError, ValueError) as error:
    raise errors.DataError(
      f"{path} is damaged ({error}). Delete {partial} and begin again."
    ) from error
  _check_same(partial, found, begun)


def _clean(partial) -> None:
  """Deletes what only resuming needs; the manifest is there."""
  shutil.rmtree(partial / _LOOKS, ignore_errors=True)
  for pattern in (_PLAN, "*.done.json", _BEGUN, "*.tmp", _LOCK):
    for path in partial.glob(pattern):
      path.unlink(missing_ok=True)


class _Job:
  """Looks at a source, plans, and writes its shards."""

  def __init__(self, source, config, split, folder, settings, workers, quiet):
    self._source, self._folder, self._settings = source, folder, settings
    self._workers = workers
    self._limit, self._quiet = faults.share_of(config), quiet
    self._setup = {"config": plain(config), "split": split}

  def run(self) -> dict[str, Any]:
    """Does what is not yet done; returns the manifest."""
    self._look()
    plan, bad = self._plan()
    done = self._write(plan)
    left_out = collections.Counter(plan.left_out) + _left_out(self._source)
    bad = [*_faults(self._source).reasons.items(), *bad]
    tasks: collections.Counter[str] = collections.Counter()
    listed: dict[str, Any] = {}
    shards_: dict[str, list[int]] = {}
    for kind, parts in done.items():
      shards_[kind] = [part["count"] for part in parts]
      for part in parts:
        listed |= part["files"]
        left_out.update(part.get("left_out", {}))
        tasks.update(part.get("tasks", {}))
    if not len(plan.old) and not tasks:
      shutil.rmtree(self._folder)
      raise errors.DataError(
        f"{self._source.name}: nothing is left to be prepared"
        f" ({_counted(left_out)} are left out)."
      )
    if bad:
      lines = [json.dumps({"name": name, "reason": why}) for name, why in bad]
      text = "".join(f"{line}\n" for line in lines)
      cache_shards.replace_text(self._folder / _BAD, text)
    return {
      "format": prepared.FORMAT,
      "images": len(plan.old),
      "captions": sum(part["captions"] for part in done["images"]),
      "examples": dict(tasks),
      "left_out": dict(left_out),
      "license": self._settings.license,
      "bytes": sum(size for _, size in listed.values()),
      "versions": {n: importlib.metadata.version(n) for n in _VERSIONS},
      "shards": shards_,
      "files": listed,
    }

  def _look(self) -> None:
    """Looks at what was not looked at; stops early if too much is bad."""
    folder = self._folder / _LOOKS
    found = list(looks.chunks(self._source))
    log = faults.FaultLog(f"images of {self._source.name}", self._limit)

    def note(answer):
      for name, reason in answer["bad"]:
        log.fault(name, reason)
      log.good(answer["images"] - len(answer["bad"]))

    self._each(
      f"look at {self._source.num_images} images",
      "lavit_jax.jobs.prepare.looks:maker",
      folder,
      [item for item in found if not looks.is_done(folder, *item)],
      len(found),
      note,
    )

  def _plan(self) -> tuple[plan_lib.Plan, list[tuple[str, str]]]:
    source, folder = self._source, self._folder / _LOOKS
    found, bad = looks.read(folder, "images", source.num_images)
    texts, _ = looks.read(folder, "texts", source.num_examples("text"))
    usable = looks.needed(source)
    log = faults.FaultLog(f"images of {source.name}", self._limit)
    log.good(int(usable.sum()) - len(bad))
    if bad:  # also those that an earlier call looked at
      log.fault_all(dict(bad[:_NAMED]), len(bad))
      log.check()
    plan = plan_lib.of(found, usable, texts, self._settings)
    plan.write(self._folder / _PLAN)
    return plan, bad

  def _write(self, plan) -> dict[str, list[dict[str, Any]]]:
    totals = shards.total(self._source, plan, self._settings)
    items = [[kind, k] for kind, total in totals.items() for k in range(total)]
    there = lambda item: _is_written(self._folder, *item)
    self._setup["settings"] = dataclasses.asdict(self._settings)
    self._each(
      f"write {len(items)} shards",
      "lavit_jax.jobs.prepare.shards:maker",
      self._folder,
      [item for item in items if not there(item)],
      len(items),
      lambda answer: None,
    )
    return {
      kind: [
        json.loads(shards.done_file(self._folder, kind, k).read_text())
        for k in range(total)
      ]
      for kind, total in totals.items()
    }

  def _each(
    self,
    label: str,
    make: str,
    folder: pathlib.Path,
    items: list[Any],
    total: int,
    note: Callable[[Any], None],
  ) -> None:
    """Runs a function on items in other processes, with a bar of all."""
    answers = pool.shown(
      label,
      make,
      self._setup | {"folder": str(folder)},
      items,
      count=self._workers,
      done=total - len(items),
      quiet=self._quiet,
    )
    for answer in answers:
      note(answer)


def _is_written(folder, kind, number) -> bool:
  """Returns whether a shard is written, and its files are there."""
  try:
    listed = json.loads(shards.done_file(folder, kind, number).read_text())
    return not _wrong_files(folder, listed["files"])
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return False  # it is written again


def _faults(source) -> faults.FaultLog:
  """Returns what a source has left out of its lines, rows or samples."""
  return getattr(filtered.whole(source), "faults", None) or faults.FaultLog()


def _left_out(source) -> collections.Counter[str]:
  """Returns how much the source and its filters have left out already."""
  found = collections.Counter(
    {"bad lines, rows or samples of the source": _faults(source).bad}
  )
  if isinstance(source, filtered.FilteredSource):
    for task in source.source.tasks():
      if task != "text_image":  # the captions again
        count = source.source.num_examples(task) - source.num_examples(task)
        found[f"filters: {_NAMES.get(task, task)}"] = count
  return +found


def _counted(left_out) -> str:
  return ", ".join(f"{n:,} {why}" for why, n in left_out.items()) or "none"


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns config.data as JSON holds it."""
  return json.loads(json.dumps(dict(config), default=lambda v: v.to_dict()))


def verify(folder: str | os.PathLike[str]) -> list[str]:
  """Returns what is wrong with the files of prepared data; [] if all is well.

  Reads every byte.

  Raises:
    errors.DataError: there is no manifest, or it is damaged.
  """
  path = files.input_path(folder)
  found = []
  for name, (digest, size) in prepared.read_manifest(path)["files"].items():
    if not (path / name).exists():
      found.append(f"{name} is missing")
      continue
    with files.open_bytes(path / name) as file:
      hashed = hashlib.file_digest(file, "sha256").hexdigest()
    if hashed != digest:
      found.append(f"{name} has changed (expected {size} bytes)")
  return found
