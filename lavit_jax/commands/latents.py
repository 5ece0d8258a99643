"""The command `lavit latents`: caches latents of a dataset for training."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from etils import epy

from lavit_jax.commands import caches, train
from lavit_jax.core import compiled_programs, errors

with epy.lazy_imports():
  from lavit_jax.jobs import latents as latents_job

_HELP = """\
usage: lavit latents --config FILE --out DIR [--split NAME] [--part I/N]
                     [--json] [--config.FIELD=VALUE ...]

Write the latents of every image that a config of stage latents trains on,
and of its held-out ones.

  --config FILE          the config of the training to come, or a shipped one
  --out DIR              caches go to DIR/train and DIR/held_out; then train
                         with --config.data.latents_dir=DIR/train and
                         --config.data.held_out_latents_dir=DIR/held_out
  --split NAME           train or held_out: that split alone, to DIR itself
  --batch N              images that a device encodes at once (8)
  --part I/N             write every Nth shard, from the Ith on (1/N to N/N);
                         the processes share --out, and 1/N completes it.
                         Processes that their environment joins, as on a pod,
                         share the work without it
  --json                 print one JSON document
  --config.FIELD=VALUE   override any field of the config (after --config)

example:
  lavit latents --config tiny/latents.py --out latents

Interrupt it anywhere and run it again: it continues where it stopped.
"""


def add(subparsers: Any) -> None:
  """Lists the command in `lavit --help`; its own help text is above."""
  subparsers.add_parser("latents", help="cache latents of a dataset, to train")


def latents(argv: Sequence[str]) -> int:
  """Writes the caches of a config file with its overrides.

  Args:
    argv: the words after `lavit latents`.

  Returns:
    The exit status.

  Raises:
    errors.UsageError: a flag is missing, unknown or out of range.
    errors.ConfigError: no such config, or one of another stage.
  """
  if not argv or {"-h", "--help"} & set(argv):
    text = f"{_HELP}\n{compiled_programs.HELP}"
    print(text, end="", file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2
  args, config = _parse(argv)
  caches.check_out(args.out, args.split)
  compiled_programs.keep(least=None)
  shared = caches.shared_by(args.part)

  def write(split, out):
    return latents_job.write_cache(
      config.vae_from or config.start_from or config.model_dir,
      config.model.kind,
      config.data.to_dict(),
      out,
      split=split,
      batch=args.batch,
      **shared,
    )

  if args.split:
    summary = write(args.split, args.out)
  else:
    folder = pathlib.Path(args.out)
    summary = {name: write(name, str(folder / name)) for name in caches.SPLITS}
  fields = ("latents_dir", "held_out_latents_dir")
  caches.show(summary, args.split, args.json, fields)
  return 0


def _parse(argv: Sequence[str]):
  """Returns the options of the command, and the config of stage latents."""
  # No abbreviations: --config.data.x is not --config.
  parser = argparse.ArgumentParser(
    prog="lavit latents", add_help=False, allow_abbrev=False
  )
  parser.add_argument("--out")
  parser.add_argument("--split", choices=caches.SPLITS)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--part", type=caches.part)
  parser.add_argument("--json", action="store_true")
  args, rest = parser.parse_known_args(argv)
  if not args.out:
    raise errors.UsageError("--out DIR is missing. See lavit latents --help.")
  if args.batch < 1:
    raise errors.UsageError(f"--batch {args.batch}: expected 1 or more.")
  config, _ = train.read_config([*rest, "--workdir", args.out])
  if config.stage != "latents":
    raise errors.ConfigError(
      f"This config is of stage {config.stage!r}, which does not train on"
      " latents. Give a config of stage latents, such as tiny/latents.py."
    )
  return args, config
