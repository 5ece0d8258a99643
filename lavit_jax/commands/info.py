"""The command `lavit info`: what a model consists of and needs."""

import argparse
from typing import Any

from etils import epy

from lavit_jax import __version__
from lavit_jax.commands import common

with epy.lazy_imports():
  import jax

  from lavit_jax.infer import memory


def add(subparsers: Any) -> None:
  """Adds the command of this file to the parser of `lavit`."""
  parser = common.command(
    subparsers,
    "info",
    _info,
    "show what a model consists of, and what each task needs",
    """\
    examples:
      lavit info
      lavit info --model runs/quickstart/model --json
      lavit info --model runs/lavit_7b --quantize int8    memory of each task
    """,
  )
  common.add_model(parser)


def _info(args: argparse.Namespace) -> None:
  info = common.load(args).info()
  document = {
    "lavit_jax": __version__,
    "jax": jax.__version__,
    "devices": [str(device) for device in jax.devices()],
    "model": info,
  }
  memory_lines = memory.lines(info["memory"])
  model = {k: v for k, v in info.items() if k != "memory"}
  lines = _flat_lines(document | {"model": model})
  lines += [f"memory.{line}" for line in memory_lines]
  common.print_answer(args, document, lines)


def _flat_lines(document: dict[str, Any], prefix: str = "") -> list[str]:
  """Returns `a.b: value` lines of nested dictionaries."""
  lines = []
  for key, value in document.items():
    if isinstance(value, dict):
      lines += _flat_lines(value, f"{prefix}{key}.")
      continue
    text = ", ".join(map(str, value)) if isinstance(value, list) else value
    lines.append(f"{prefix}{key}: {text}")
  return lines
