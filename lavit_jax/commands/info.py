"""The command that tells what a model is: info."""

import argparse
from typing import Any

from lavit_jax.commands import common


def add(subparsers) -> None:
  """Adds the command of this file to the parser of `lavit`."""
  parser = common.command(
    subparsers,
    "info",
    _info,
    "tell what a model is, and what it would run on",
    """\
    examples:
      lavit info
      lavit info --model runs/quickstart/model --json
      lavit info --model runs/lavit_7b --quantize int8    memory of each task
    """,
  )
  common.add_model(parser)


def _info(args: argparse.Namespace) -> None:
  import jax

  from lavit_jax.infer import memory

  document = {
    "lavit_jax": common.version(),
    "jax": jax.__version__,
    "devices": [str(device) for device in jax.devices()],
    "model": common.load(args).info(),
  }
  needed = memory.lines(document["model"]["memory"])
  model = {k: v for k, v in document["model"].items() if k != "memory"}
  lines = _flat_lines(document | {"model": model})
  common.print_answer(
    args, document, [*lines, *(f"memory.{line}" for line in needed)]
  )


def _flat_lines(document: dict[str, Any], prefix: str = "") -> list[str]:
  """`a.b: value` lines of nested dictionaries."""
  lines = []
  for key, value in document.items():
    if isinstance(value, dict):
      lines += _flat_lines(value, f"{prefix}{key}.")
      continue
    text = ", ".join(map(str, value)) if isinstance(value, list) else value
    lines.append(f"{prefix}{key}: {text}")
  return lines
