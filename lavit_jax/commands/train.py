"""The commands that train: `lavit quickstart` and `lavit train`."""

import argparse
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epy

from lavit_jax.commands import common
from lavit_jax.core import compiled_programs, errors

with epy.lazy_imports():
  import jax
  import ml_collections
  from absl import flags
  from ml_collections import config_flags

  from lavit_jax import configs  # put there by setup.py
  from lavit_jax.jobs import quickstart
  from lavit_jax.train import loop
  from lavit_jax.train.resilience import distributed

# Read before the config goes to its stage, which asks for the others.
_FIELDS = ("batch_size", "mesh")
_LARGE = 30_000_000  # weights in the layers of a language model
_FEW_TOKENS = 1024  # of a step, see `is_bound_by_weights`

_TRAIN_HELP = """\
usage: lavit train --config FILE --workdir DIR [--config.FIELD=VALUE ...]

Train one stage as its config file says; continue what DIR has.

  --config FILE          a Python file with get_config(); tiny/pretrain.py
                         finds the one that is shipped here
  --workdir DIR          checkpoints, metrics.jsonl and TensorBoard events
  --config.FIELD=VALUE   override any field of the config (after --config)

examples:
  lavit train --config configs/tiny/encoder.py --workdir runs/encoder
  lavit train --config tiny/tokenizer.py --workdir runs/t --config.steps=100

Interrupt it anywhere and run it again: it resumes with the same batches.
Data, caches and frozen weights must be those the run began with. What differs
is named; --config.accept=NAME,NAME continues with it if that is intended.
After SIGTERM the run saves its current step and ends with exit status 75. When
one of several processes dies, all end, with status 69 or that of SIGABRT.

DIR may be gs://BUCKET/FOLDER, which needs pip install 'lavit_jax[gcs]'.
A run of several processes keeps its compiled programs in DIR/compiled.
"""


def add(subparsers: Any) -> None:
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
    it continues where it was. Results: DIR/report/index.html and metrics.json.
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
    help="fit all stages into so many minutes",
  )
  parser.add_argument(
    "--data",
    metavar="FILE",
    help="JSON lines with image and caption, or tar archives of WebDataset",
  )
  common.add_data_fields(parser)
  parser.add_argument(
    "--evaluate-only", action="store_true", help="train nothing"
  )
  parser.add_argument(
    "--model", metavar="PATH", help="with --evaluate-only: evaluate this one"
  )
  # For the list in `lavit --help`; `train` prints the help of the command.
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
  if args.data:
    common.require_data(args.data)
  fields = common.data_fields(args)
  common.keep_programs(args, least=None)
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
  """Trains one stage by a config file with its overrides.

  Args:
    argv: the words after `lavit train`.

  Returns:
    The exit status.

  Raises:
    errors.LavitError: what the user can mend; see `read_config`, `loop.train`.
  """
  if not argv or {"-h", "--help"} & set(argv):
    print(
      _TRAIN_HELP + compiled_programs.HELP,
      end="",
      file=sys.stdout if argv else sys.stderr,
    )
    return 0 if argv else 2
  config, workdir = read_config(argv)
  keep_compiled(workdir)
  distributed.initialize()
  if config.mesh.data == -1:
    use_cpu_cores(config.batch_size, together=is_bound_by_weights(config))
  loop.train(config, workdir)
  return 0


def keep_compiled(workdir: str) -> None:
  """Keeps compiled programs between runs, unless the environment says where.

  A run of several processes keeps them in its workdir: the first process
  writes, all read, and machines that replace preempted ones find them.
  """
  alone = os.environ.get("LAVIT_DISTRIBUTED") != "1" and (
    "LAVIT_COORDINATOR" not in os.environ
  )
  if alone:
    compiled_programs.keep(least=None)
  elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = f"{workdir.rstrip('/')}/compiled"
    jax.config.update("jax_compilation_cache_dir", folder)


def is_bound_by_weights(config: Mapping[str, Any]) -> bool:
  """Returns whether a large language model learns few tokens a step.

  Then devices would spend a fifth of a step and more on sending each other its
  weights and gradients, which is done once a step.

  Args:
    config: of a run, or what it has of `model`, `data` and `batch_size`.
  """
  llm = (config.get("model") or {}).get("llm") or {}
  length = (config.get("data") or {}).get("length", 0)
  tokens = config["batch_size"] * length
  names = ("depth", "width", "mlp_dim")
  depth, width, hidden = (llm.get(name, 0) for name in names)
  weights = depth * width * (4 * width + 3 * hidden)
  return weights >= _LARGE and 0 < tokens <= _FEW_TOKENS


def use_cpu_cores(batch_size: int, *, together: bool = False) -> None:
  """Makes one CPU device per core, at most 8, which share each batch.

  Two devices of one thread each are faster than one device of two threads,
  most of all with convolutions and small models. There is no effect on TPUs
  and GPUs, nor where XLA_FLAGS or JAX_NUM_CPU_DEVICES set the number of
  devices.

  Args:
    batch_size: of the run; the number of devices divides it.
    together: make one device of all cores, see `is_bound_by_weights`.
  """
  xla_flags = os.environ.get("XLA_FLAGS", "")
  if (
    "JAX_NUM_CPU_DEVICES" in os.environ
    or "xla_force_host_platform_device_count" in xla_flags
  ):
    return
  count, cores = 1, 1 if together else min(os.cpu_count() or 1, 8)
  while 2 * count <= cores and batch_size % (2 * count) == 0:
    count *= 2
  jax.config.update("jax_num_cpu_devices", count)


def read_config(
  argv: Sequence[str],
) -> tuple["ml_collections.ConfigDict", str]:
  """Reads the flags `--config`, `--config.FIELD` and `--workdir`.

  Returns:
    (the config with its overrides, locked; the workdir).

  Raises:
    errors.UsageError: a flag is missing or unknown, or a word is left over.
    errors.ConfigError: no such config file, field or value.
  """
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
  except Exception as error:  # the config file may raise anything
    raise errors.ConfigError(_config_message(error)) from error
  if config.value is not None:
    _check_config(config.value)
  problems = [f"cannot use {shlex.join(rest)}"] if rest else []
  problems += ["--config FILE is missing"] if config.value is None else []
  problems += [] if workdir.value else ["--workdir DIR is missing"]
  if problems:
    raise errors.UsageError(
      f"{'; '.join(problems)}. Expected: lavit train --config FILE --workdir"
      " DIR [--config.FIELD=VALUE ...]. See lavit train --help."
    )
  return config.value, str(workdir.value)


def _check_config(value: Any) -> None:
  """Raises ConfigError for what is no config of a run."""
  if not isinstance(value, ml_collections.ConfigDict):
    raise errors.ConfigError(
      f"get_config() of the config file returns {value!r}: expected an"
      " ml_collections.ConfigDict, as the shipped configs return it."
    )
  if missing := [name for name in _FIELDS if name not in value]:
    raise errors.ConfigError(
      f"the config has no {', '.join(missing)}: begin with get_config() of a"
      " shipped config, and change what you want otherwise."
    )


def _config_message(error: Exception) -> str:
  """Returns the message for what a config file, or an override, raised."""
  unknown = isinstance(error, (AttributeError, KeyError))
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]  # ml_collections wraps a KeyError
  text = str(error.args[0] if error.args else error).strip()
  last = text.rpartition("Traceback")[2].splitlines() or [""]
  if unknown:
    field = ". ".join(last).rstrip("?")
    return f"the config has no field {field}: see the config file."
  return (
    f"the config file does not load: {type(error).__name__}: {last[-1]}"
    " LAVIT_DEBUG=1 shows where."
  )


def _find_shipped(argv: Sequence[str]) -> list[str]:
  """Returns `argv` with the full path of a config that is shipped here."""
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
    path = f"{_shipped_config(file)}{colon}{rest}"
    argv[at] = f"--config={path}" if equals else path
  return argv


def _shipped_config(name: str) -> pathlib.Path:
  """Returns the file of `tiny/pretrain.py` or `configs/tiny/pretrain.py`."""
  root = pathlib.Path(configs.__file__).parent
  path = root / name.removeprefix("configs/")
  if path.is_file():
    return path
  shipped = sorted(
    str(file.relative_to(root))
    for file in root.glob("*/*.py")
    if file.name not in ("__init__.py", "common.py")  # which is none itself
  )
  raise errors.ConfigError(
    f"no config file {name}, neither in {os.getcwd()} nor among the shipped"
    f" configs: {', '.join(shipped)}."
  )
