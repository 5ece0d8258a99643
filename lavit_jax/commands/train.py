"""Commands that train: quickstart, with options, and train, with a config."""

import argparse
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from lavit_jax.commands import common
from lavit_jax.core import compiled_programs, errors

_TRAIN_HELP = """\
usage: lavit train --config FILE --workdir DIR [--config.FIELD=VALUE ...]

Train one stage as its config file says; go on where DIR was left.

  --config FILE          a Python file with get_config(); tiny/pretrain.py
                         finds the one that is shipped here
  --workdir DIR          checkpoints, metrics.jsonl and TensorBoard events
  --config.FIELD=VALUE   override any field of the config (after --config)

examples:
  lavit train --config configs/tiny/pretrain.py --workdir runs/pretrain
  lavit train --config tiny/tokenizer.py --workdir runs/t --config.steps=100

Interrupt it anywhere and run it again: it resumes with the same batches.
Data, caches and frozen weights must be those it began with: what differs is
named, and --config.accept=NAME,NAME goes on with it if that is meant.
SIGTERM saves the step it comes in and ends with exit status 75. When another
process of a run of several dies, all end, with status 69 or that of SIGABRT.

DIR may be gs://BUCKET/FOLDER; pip install 'lavit_jax[gcs]' for it.
With several processes compiled programs are kept in DIR/compiled.
"""


def add(subparsers) -> None:
  """Adds the commands of this file to the parser of `lavit`."""
  parser = common.command(
    subparsers,
    "quickstart",
    _quickstart,
    "train every stage from scratch, evaluate, write a report",
    """\
    examples:
      lavit quickstart                      drawn shapes, nothing to download
      lavit quickstart --data my.jsonl      your own images and captions
      lavit quickstart --evaluate-only --model tiny

    my.jsonl holds one JSON object a line: {"image": "a.jpg", "caption": "..."},
    paths relative to the file. Interrupt the run anywhere and start it again:
    it goes on where it was. Results: DIR/report/index.html and metrics.json.
    """,
    compiles=True,
  )
  parser.add_argument(
    "--workdir",
    default="runs/quickstart",
    metavar="DIR",
    help="checkpoints, metrics and report (runs/quickstart)",
  )
  parser.add_argument(
    "--minutes",
    type=common.number,
    metavar="M",
    help="fit all stages to this budget",
  )
  parser.add_argument(
    "--data", metavar="FILE", help="JSON lines with image and caption"
  )
  common.add_data_fields(parser)
  parser.add_argument(
    "--evaluate-only", action="store_true", help="train nothing"
  )
  parser.add_argument(
    "--model", metavar="PATH", help="with --evaluate-only: evaluate this one"
  )
  # For the list in `lavit --help`; its own words are absl's: see `train`.
  subparsers.add_parser("train", help="train one stage from a config file")


def _quickstart(args: argparse.Namespace) -> None:
  if args.model and not args.evaluate_only:
    raise errors.UsageError(
      f"--model {args.model} goes with --evaluate-only: quickstart trains a"
      " model of its own. Add --evaluate-only, or leave --model out."
    )
  if args.minutes is not None and not args.minutes > 0:
    raise errors.UsageError(
      f"--minutes {args.minutes:g}: the budget must be more than 0 minutes."
    )
  common.require_files([args.data] if args.data else [])
  fields = common.data_fields(args)
  from lavit_jax.jobs import quickstart

  compiled_programs.keep(least=None)
  if not args.evaluate_only:
    use_cpu_cores(quickstart.common_batch())
  metrics = quickstart.run(
    args.workdir,
    minutes=args.minutes,
    data=args.data,
    fields=fields,
    evaluate_only=args.evaluate_only,
    model=args.model,
  )
  if args.json:
    print(json.dumps(metrics, indent=2))


def train(argv: Sequence[str]) -> int:
  """Reads a config file and its overrides, trains that stage; exit status."""
  if not argv or {"-h", "--help"} & set(argv):
    print(
      _TRAIN_HELP + compiled_programs.HELP,
      end="",
      file=sys.stdout if argv else sys.stderr,
    )
    return 0 if argv else 2
  config, workdir = read_config(argv)
  from lavit_jax.train import loop
  from lavit_jax.train.resilience import distributed

  keep_compiled(workdir)
  distributed.initialize()
  if config.mesh.data == -1:
    use_cpu_cores(config.batch_size)
  loop.train(config, workdir)
  return 0


def keep_compiled(workdir: str) -> None:
  """Keeps compiled programs between runs, unless JAX was told where or not.

  With several processes in the workdir: the first writes, and all read. They
  are still there when preempted machines have been replaced by others.
  """
  import jax

  alone = os.environ.get("LAVIT_DISTRIBUTED") != "1" and (
    "LAVIT_COORDINATOR" not in os.environ
  )
  if alone:
    compiled_programs.keep(least=None)
  elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = f"{workdir.rstrip('/')}/compiled"
    jax.config.update("jax_compilation_cache_dir", folder)


def use_cpu_cores(batch_size: int) -> None:
  """Without an accelerator: a CPU device a core, at most 8, sharing a batch.

  Two devices of one thread are faster than one device of two threads, most
  of all where there are convolutions. No effect on TPUs and GPUs, nor where
  XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many.
  """
  import jax

  flags = os.environ.get("XLA_FLAGS", "")
  told = "JAX_NUM_CPU_DEVICES" in os.environ
  if told or "xla_force_host_platform_device_count" in flags:
    return
  count, cores = 1, min(os.cpu_count() or 1, 8)
  while 2 * count <= cores and batch_size % (2 * count) == 0:
    count *= 2
  jax.config.update("jax_num_cpu_devices", count)


def read_config(argv: Sequence[str]):
  """The locked ConfigDict of `--config` with its overrides, and `--workdir`.

  Raises:
    errors.UsageError: a flag is missing or unknown, or a word too many.
    errors.ConfigError: no such config file, field or value.
  """
  from absl import flags
  from ml_collections import config_flags

  argv = ["lavit train", *_find_shipped(argv)]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", None, "", flag_values=values, sys_argv=argv
  )
  workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
  try:
    rest = values(argv)[1:]
  except flags.Error as error:
    raise errors.UsageError(f"{error}. See lavit train --help.") from error
  except Exception as error:  # whatever the config file itself raises
    raise errors.ConfigError(_config_message(error)) from error
  wrong = [f"cannot use {shlex.join(rest)}"] if rest else []
  wrong += ["--config FILE is missing"] if config.value is None else []
  wrong += [] if workdir.value else ["--workdir DIR is missing"]
  if wrong:
    raise errors.UsageError(
      f"{'; '.join(wrong)}. Expected: lavit train --config FILE --workdir DIR"
      " [--config.FIELD=VALUE ...]. See lavit train --help."
    )
  return config.value, workdir.value


def _config_message(error: Exception) -> str:
  unknown = isinstance(error, (AttributeError, KeyError))
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]  # ml_collections wraps a KeyError
  text = str(error.args[0] if error.args else error).strip()
  last = text.rpartition("Traceback")[2].splitlines() or [""]
  if unknown:
    named = ". ".join(last).rstrip("?")
    return f"the config has no field {named}: see the config file."
  return (
    f"the config file does not load: {type(error).__name__}: {last[-1]}"
    " LAVIT_DEBUG=1 shows where."
  )


def _find_shipped(argv: Sequence[str]) -> list[str]:
  """`argv` with a config path that exists only in the package made whole."""
  argv = list(argv)
  for i, word in enumerate(argv):
    name, equals, path = word.lstrip("-").partition("=")
    if not word.startswith("-") or name != "config":
      continue
    at = i if equals else i + 1
    path = path if equals else "".join(argv[at : at + 1])
    file, colon, rest = path.partition(":")
    if not file or pathlib.Path(file).is_file():
      continue
    found = f"{_shipped_config(file)}{colon}{rest}"
    argv[at] = f"--config={found}" if equals else found
  return argv


def _shipped_config(name: str) -> pathlib.Path:
  """The file of `tiny/pretrain.py` or `configs/tiny/pretrain.py`."""
  from lavit_jax import configs

  root = pathlib.Path(configs.__file__).parent
  path = root / name.removeprefix("configs/")
  if path.is_file():
    return path
  shipped = sorted(
    str(file.relative_to(root))
    for file in root.glob("*/*.py")
    if file.name != "__init__.py"
  )
  raise errors.ConfigError(
    f"no config file {name}, neither in {os.getcwd()} nor among the shipped"
    f" ones: {', '.join(shipped)}."
  )
