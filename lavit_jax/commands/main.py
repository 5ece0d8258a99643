"""The command `lavit`: one function a command, one paragraph an error.

Nothing heavy is imported before a command is known to be well formed, so that
help and mistakes answer at once. What each command does stands in `commands/`.
"""

import argparse
import errno
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence

from lavit_jax.commands import (
  common,
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

_DESCRIPTION = """\
LaVIT: a language model that reads and draws images as tokens of its own.
"""

_EXAMPLES = """\
start here:
  lavit quickstart                         train every stage, see a report
  lavit caption photo.jpg                  use the small model shipped here
  lavit generate "a large red circle" --out circle.png
  lavit train --config configs/tiny/pretrain.py --workdir runs/pretrain

Every command explains itself: lavit COMMAND --help
LAVIT_DEBUG=1 in the environment shows the traceback of an error.
"""

_RESUMABLE = {"quickstart", "train", "tokenize", "latents"}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; the exit status: 0, 2 for an error, 130 for Ctrl-C,
  75 where a training was asked to stop (SIGTERM) and has saved.

  A command may return another status: 1 says that a check failed.

  Errors that are the user's to mend are one paragraph on stderr; any other
  exception is a defect and keeps its traceback.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  status = None
  _quiet_libtpu()
  try:
    if argv[:1] == ["train"]:
      return train.train(argv[1:])
    if argv[:1] == ["latents"]:
      return latents.latents(argv[1:])
    if argv[:1] == ["compile"]:
      return compile_command.run(argv[1:])
    args = _parser().parse_args(argv)
    status = args.run(args)
    sys.stdout.flush()
  except KeyboardInterrupt:
    _say(_interrupted(argv))
    return 130
  except BrokenPipeError:  # the reader, `head` say, has gone
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except Exception as error:
    message = _explain(error)
    if message is None or os.environ.get("LAVIT_DEBUG"):
      _leave(1, traceback.format_exc())
      raise
    status = getattr(error, "exit_status", 2)
    _leave(status, f"lavit: {message}")
    _say(f"lavit: {message}")
  return status or 0


def _quiet_libtpu() -> None:
  """Where there is no TPU, keeps an installed libtpu from complaining of it.

  It asks the metadata server of a TPU's host for these.
  """
  there = [*pathlib.Path("/dev").glob("accel*")]
  there += [*pathlib.Path("/dev").glob("vfio/[0-9]*")]
  if not there:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")


def _leave(status: int, text: str) -> None:
  """Says why and ends at once where a run of several processes has failed."""
  distributed = sys.modules.get("lavit_jax.train.resilience.distributed")
  if distributed is not None:
    distributed.leave(status, text)


def _say(text: str) -> None:
  print(text, file=sys.stderr)


def _interrupted(argv: Sequence[str]) -> str:
  if not argv or argv[0] not in _RESUMABLE:
    return "lavit: interrupted."
  return (
    "lavit: interrupted. What was saved is kept; to go on from there, run the"
    f" same command again:\n  {shlex.join(['lavit', *argv])}"
  )


def _explain(error: Exception) -> str | None:
  """One paragraph for an error that the user can mend; None for a defect."""
  text = " ".join(str(error).split())
  full = isinstance(error, OSError) and error.errno == errno.ENOSPC
  if full or "No space left on device" in text:
    return (
      f"the disk is full ({text}). Free some space and run the same command"
      " again; what was saved before is kept."
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
      "a kernel needs more of a TPU's vector memory than it may take"
      f" ({text[:200]}). Raise xla_tpu_scoped_vmem_limit_kib in the config's"
      " compiler_options, or leave it out."
    )
  if "RESOURCE_EXHAUSTED" in text:
    return (
      f"the device is out of memory ({text[:200]}). Use a smaller batch, or"
      " another mesh or remat policy in the config."
    )
  ours = isinstance(error, ValueError) and _raised_here(error)
  return text if ours or isinstance(error, errors.LavitError) else None


def _raised_here(error: Exception) -> bool:
  """Whether a `raise` of our own threw it: then it says what to do."""
  last = traceback.extract_tb(error.__traceback__)[-1]
  ours = pathlib.Path(last.filename).is_relative_to(
    pathlib.Path(__file__).parents[1]
  )
  return ours and (last.line or "").startswith("raise ")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="lavit",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    formatter_class=common.FORMATTER,
  )
  parser.add_argument(
    "-V", "--version", action="version", version=f"lavit {common.version()}"
  )
  subparsers = parser.add_subparsers(
    title="commands", metavar="COMMAND", required=True
  )
  made = (train, latents, compile_command, report, read, draw, port, info)
  for commands in made:
    commands.add(subparsers)
  return parser
