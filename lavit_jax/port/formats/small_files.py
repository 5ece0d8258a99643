"""Small files of a checkpoint, such as JSON, in the folders of its weights."""

import json
import os
import pathlib
from typing import Any

from lavit_jax.core import errors

# Endings of weights and of their indices; every other file is small.
_WEIGHTS = (".bin", ".safetensors", ".index.json", ".pt", ".pth", ".gguf")
_MAX_BYTES = 1 << 25


def read_json(path: str | os.PathLike, label: str) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    path: of the file.
    label: how messages name it.

  Raises:
    errors.CheckpointError: there is no file, or no JSON object in it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.CheckpointError(
      f"{label} is missing: expected a file at {path}."
    )
  try:
    content = json.loads(path.read_text())
  except ValueError as e:
    raise errors.CheckpointError(f"{label} is not valid JSON: {e}.") from e
  if not isinstance(content, dict):
    raise errors.CheckpointError(f"{label} is not a JSON object.")
  return content


def to_json(content: Any) -> bytes:
  """Returns JSON as Hugging Face writes it, indented by two spaces."""
  return (json.dumps(content, indent=2) + "\n").encode()


def read_all(folder: str | os.PathLike) -> dict[str, bytes]:
  """Returns every small file of a folder by name, without weights."""
  return {
    path.name: path.read_bytes()
    for path in sorted(pathlib.Path(folder).iterdir())
    if path.is_file()
    and not path.name.endswith(_WEIGHTS)
    and not path.name.startswith(".")
    and path.stat().st_size < _MAX_BYTES
  }
