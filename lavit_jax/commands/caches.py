"""What the commands that write caches share: tokenize --data, and latents."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lavit_jax.core import errors
from lavit_jax.core.storage import files

SPLITS = ("train", "held_out")


def check_out(out: str, split: str | None) -> None:
  """Raises UsageError where --out is a cache, but is to hold two of them.

  And where it is in an object store: caches are written to a disk.
  """
  files.require_local(out, "a cache")
  begun = [pathlib.Path(out) / "meta.json", pathlib.Path(f"{out}.partial")]
  if split is None and any(path.exists() for path in begun):
    raise errors.UsageError(
      f"--out {out} is a cache itself, finished or begun; without --split it"
      " is the folder of two, train and held_out. Add --split train (or"
      " held_out) to go on with it, or give another --out."
    )


def show(
  summary: Mapping[str, Any],
  split: str | None,
  as_json: bool,
  fields: Sequence[str],
  more: Mapping[str, str | None] | None = None,
) -> None:
  """Prints what was written, and how a run is told of it.

  Args:
    summary: of one cache; or of two, by SPLITS.
    split: what was asked for; None: both.
    as_json: print one JSON document alone.
    fields: of config.data, that name the caches of SPLITS.
    more: other fields of config.data that the run needs, where they have a
      value.
  """
  if as_json:
    print(json.dumps(summary, indent=2))
    return
  written = {split: summary} if split else summary
  for name, made in written.items():
    if split is None:
      print(f"{name}:")
    for key, value in made.items():
      print(f"{'' if split else '  '}{key}: {value}")
  flags = [
    f"--config.data.{field}={written[name]['out']}"
    for name, field in zip(SPLITS, fields, strict=True)
    if name in written
  ]
  flags += [f"--config.data.{k}={v}" for k, v in (more or {}).items() if v]
  print(f"Train with {' '.join(flags)}")
  for name in SPLITS:
    if name not in written:
      print(
        f"This is the part {split!r} alone; for the other give the same"
        f" command with --split {name} and another --out."
      )
