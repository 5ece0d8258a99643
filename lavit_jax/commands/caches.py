"""Shared by the commands that write caches: `tokenize --data` and `latents`."""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epy

from lavit_jax.commands import common
from lavit_jax.core import errors
from lavit_jax.core.storage import files

with epy.lazy_imports():
  import jax

  from lavit_jax.train.resilience import distributed

SPLITS = ("train", "held_out")


def check_out(out: str, split: str | None) -> None:
  """Checks that `--out` can hold what is to be written.

  Args:
    out: the folder of one cache (with `split`), or of two.
    split: one of SPLITS, or None for both.

  Raises:
    errors.UsageError: `out` is in an object store or a file, or is a cache
      itself and two caches are to be written into it.
  """
  files.require_local(out, "a cache")
  common.require_output_folder(out, "--out")
  signs = [pathlib.Path(out) / "meta.json", pathlib.Path(f"{out}.partial")]
  if split is None and any(path.exists() for path in signs):
    raise errors.UsageError(
      f"--out {out} is a cache itself, finished or begun. Without --split the"
      " folder holds two caches, train and held_out. Add --split train (or"
      " held_out) to continue this cache, or give another --out."
    )


def part(text: str) -> tuple[int, int]:
  """Parses the value of `--part`: 2/4 is (1, 4)."""
  number, _, count = text.partition("/")
  if not (number.isdigit() and count.isdigit()):
    raise argparse.ArgumentTypeError(f"{text}: expected I/N, such as 1/4")
  if not 1 <= int(number) <= int(count):
    raise argparse.ArgumentTypeError(f"{text}: expected 1/{count} to {count}")
  return int(number) - 1, int(count)


def shared_by(given: tuple[int, int] | None) -> dict[str, tuple[int, int]]:
  """Returns `part` of the function that writes a cache, if there are several.

  Args:
    given: the value of `--part`; without it, each of the processes that the
      environment joins writes a part.
  """
  if given is not None:
    return {"part": given}
  distributed.initialize()
  if not jax.distributed.is_initialized():
    return {}
  return {"part": (jax.process_index(), jax.process_count())}


def show(
  summary: Mapping[str, Any],
  split: str | None,
  as_json: bool,
  fields: Sequence[str],
  more: Mapping[str, str | None] | None = None,
) -> None:
  """Prints a summary of the caches and the flags of a run that uses them.

  Args:
    summary: of one cache; of two caches, a summary for each of SPLITS.
    split: the value of `--split`; None: both were written.
    as_json: print the summary alone, as one JSON document.
    fields: the fields of config.data that name the caches of SPLITS.
    more: other fields of config.data that the run needs; those without a
      value are left out.
  """
  if as_json:
    print(json.dumps(summary, indent=2))
    return
  by_split = {split: summary} if split else summary
  for name, values in by_split.items():
    if split is None:
      print(f"{name}:")
    for key, value in values.items():
      print(f"{'' if split else '  '}{key}: {value}")
  flags = [
    f"--config.data.{field}={by_split[name]['out']}"
    for name, field in zip(SPLITS, fields, strict=True)
    if name in by_split
  ]
  flags += [f"--config.data.{k}={v}" for k, v in (more or {}).items() if v]
  waiting = [v["out"] for v in by_split.values() if "part" in v]
  if waiting:
    print(f"Part 1 completes {' and '.join(waiting)}, when all parts are done.")
    return
  print(f"Train with {' '.join(flags)}")
  for name in SPLITS:
    if name not in by_split:
      print(
        f"This is the split {split!r} alone. For the other one repeat the"
        f" command with --split {name} and another --out."
      )
