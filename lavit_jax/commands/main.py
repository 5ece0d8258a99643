"""The command `lavit`: dispatches to its commands and explains errors.

The commands stand in the other modules of this package. What they compute with
is imported lazily (`epy.lazy_imports`), when a command first uses it: help and
mistakes answer at once.
"""

import argparse
import atexit
import errno
import gc
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence

from lavit_jax import __version__
from lavit_jax.commands import (
  common,
  data,
  draw,
  info,
  latents,
  port,
  read,
  report,
  train,
)
from lavit_jax.commands import compile as compile_command
from lavit_jax.core import errors
from lavit_jax.data.workers import process

_DESCRIPTION = """\
LaVIT: a language model that reads and generates images as visual tokens.
"""

_EXAMPLES = """\
start here:
  lavit quickstart                         train every stage, see a report
  lavit caption photo.jpg                  use the small model shipped here
  lavit generate "a large red circle" --out circle.png
  lavit train --config configs/tiny/encoder.py --workdir runs/encoder

Every command explains itself: lavit COMMAND --help
LAVIT_DEBUG=1 in the environment shows the traceback of an error.
"""

# In the order of `lavit --help`.
_MODULES = (
  *(train, latents, compile_command, report, read, draw, data, port, info),
)
# These read `--config.FIELD=VALUE`, which argparse cannot, and their own help.
_CONFIG_COMMANDS = {
  "train": train.train,
  "latents": latents.latents,
  "compile": compile_command.run,
}
_RESUMABLE = {"quickstart", "train", "tokenize", "latents", "data"}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  An error that the user can mend is printed as one paragraph on stderr. Any
  other exception is a defect and keeps its traceback.

  Args:
    argv: the words after `lavit`; by default those of this process.

  Returns:
    The exit status: 0; 1 if a check failed; 2 for an error; 130 for Ctrl-C;
    75 where a training was asked to stop (SIGTERM) and has saved. A command
    may document others.
  """
  if argv is None:
    argv = sys.argv[1:]
    process.quiet_pillow()
    _collect_less_garbage(argv)
  argv = list(argv)
  status: int | None = None
  args = argparse.Namespace()
  _quiet_libtpu()
  try:
    if argv and argv[0] in _CONFIG_COMMANDS:
      return _CONFIG_COMMANDS[argv[0]](argv[1:])
    args = _parser().parse_args(argv)
    status = args.run(args)
    sys.stdout.flush()
  except KeyboardInterrupt:
    _print_error(_interrupted(argv))
    return 130
  except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except Exception as error:
    message = _explain(error)
    if message and isinstance(error, errors.UsageError):
      message = common.in_options(message, args)
    if message is None or os.environ.get("LAVIT_DEBUG"):
      _leave(1, traceback.format_exc())
      raise
    status = int(getattr(error, "exit_status", 2))
    _leave(status, f"lavit: {message}")
    _print_error(f"lavit: {message}")
  return status or 0


def _collect_less_garbage(argv: Sequence[str]) -> None:
  """Keeps the garbage collector from a fifth of a short command's CPU time.

  Imports and traces leave a million objects that live until the end. A short
  command looks through them less often, and none when the process ends.
  """
  if not _RESUMABLE & set(argv[:1]):
    gc.set_threshold(50_000, 20, 100)
  atexit.register(gc.freeze)


def _quiet_libtpu() -> None:
  """Keeps an installed libtpu from warning on a machine without a TPU.

  It would ask the metadata server of a TPU host for these values.
  """
  devices = [*pathlib.Path("/dev").glob("accel*")]
  devices += [*pathlib.Path("/dev").glob("vfio/[0-9]*")]
  if not devices:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")


def _leave(status: int, text: str) -> None:
  """Prints why, and ends this process at once, in a distributed run."""
  distributed = sys.modules.get("lavit_jax.train.resilience.distributed")
  if distributed is not None:
    distributed.leave(status, text)


def _print_error(text: str) -> None:
  print(text, file=sys.stderr)


def _interrupted(argv: Sequence[str]) -> str:
  if not argv or argv[0] not in _RESUMABLE:
    return "lavit: interrupted."
  return (
    "lavit: interrupted. Everything saved so far is kept. To continue, run the"
    f" same command again:\n  {shlex.join(['lavit', *argv])}"
  )


def _explain(error: Exception) -> str | None:
  """Returns one paragraph for an error of the user; None for a defect."""
  text = " ".join(str(error).split())
  disk_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
  if disk_full or "No space left on device" in text:
    return (
      f"the disk is full ({text}). Free some space and run the same command"
      " again; everything saved before is kept."
    )
  if isinstance(error, FileNotFoundError) and error.filename:
    return (
      f"no such file or directory: {error.filename}. Check the spelling;"
      f" relative paths start at {os.getcwd()}."
    )
  if isinstance(error, OSError) and error.filename:
    return f"cannot use {error.filename}: {error.strerror}."
  if "ScopedVmemOom" in text:
    return (
      "a kernel needs more of the TPU's vector memory than it is allowed"
      f" ({text[:200]}). Raise xla_tpu_scoped_vmem_limit_kib in the config's"
      " compiler_options, or leave it out."
    )
  if "RESOURCE_EXHAUSTED" in text:
    return (
      f"the device is out of memory ({text[:200]}). Use a smaller batch, or"
      " another mesh or remat policy in the config."
    )
  explained = isinstance(error, ValueError) and _raised_here(error)
  if explained or isinstance(error, errors.LavitError):
    return text
  return None


def _raised_here(error: Exception) -> bool:
  """Whether a `raise` in this package threw it: its message is then ours."""
  frame = traceback.extract_tb(error.__traceback__)[-1]
  package = pathlib.Path(__file__).parents[1]
  inside = pathlib.Path(frame.filename).is_relative_to(package)
  return inside and (frame.line or "").startswith("raise ")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="lavit",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    formatter_class=common.FORMATTER,
  )
  parser.add_argument(
    "-V",
    "--version",
    action="version",
    version=f"lavit {__version__}",
  )
  subparsers = parser.add_subparsers(
    title="commands", metavar="COMMAND", required=True
  )
  for module in _MODULES:
    module.add(subparsers)
  return parser
