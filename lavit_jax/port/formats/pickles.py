"""Pickles of PyTorch, loaded without running any code."""

import pathlib
import pickle
import re
import warnings
import zipfile
from typing import Any

from lavit_jax.core import errors

_LAST_PROTOCOL = 3  # that torch.load reads without running code


def load(torch, path: pathlib.Path, label: str) -> Any:
  """The unpickled content, its storages mapped from the file.

  Args:
    torch: the module.
    path: of the file.
    label: how messages name it.

  Raises:
    errors.CheckpointError: it would run code, or is damaged.
  """
  mapped = _starts(path, b"PK\x03\x04")
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "Detected pickle protocol")
      # Files from before torch 1.6 are no zip archives and cannot be mapped.
      return torch.load(
        path, map_location="cpu", weights_only=True, mmap=mapped
      )
  except pickle.UnpicklingError as e:
    if (protocol := _protocol(path, mapped)) > _LAST_PROTOCOL:
      raise errors.CheckpointError(
        f"{label} was pickled by protocol {protocol}, which torch.load reads"
        " only where it may run code; that of torch.save itself, 2, is"
        " expected. Load it where you trust it and save it again:"
        f" torch.save(torch.load({path.name!r}, weights_only=False),"
        f" {path.name!r})."
      ) from e
    named = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(e))
    if not mapped and not named:
      raise errors.CheckpointError(
        f"{label} is no file of PyTorch tensors: {what_it_is(path)}"
      ) from e
    reason = line(str(e).partition("WeightsUnpickler error:")[2] or e)
    what = f"cannot be read without running code ({reason})"
    if named:
      what = f"names code to run ({named[1] or named[2]})"
    raise errors.CheckpointError(
      f"{label} is a pickle that is not only tensors: it {what}, and was"
      " refused. Load it where you trust it and save the model's state_dict()"
      " alone."
    ) from e
  except (RuntimeError, EOFError, ValueError, KeyError, OSError) as e:
    raise errors.CheckpointError(
      f"{label} cannot be read ({line(e)}): {what_it_is(path)}"
    ) from e


def _protocol(path, mapped) -> int:
  """The number that a pickle names as its protocol; 0 where there is none."""
  try:
    if mapped:
      with zipfile.ZipFile(path) as archive:
        inside = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        with archive.open(inside[0]) as file:
          begin = file.read(2)
    else:
      with path.open("rb") as file:
        begin = file.read(2)
  except (OSError, IndexError, RuntimeError, zipfile.BadZipFile):
    return 0  # damaged: another message is due
  return begin[1] if begin[:1] == pickle.PROTO and len(begin) == 2 else 0


def _starts(path, magic: bytes) -> bool:
  with path.open("rb") as file:
    return file.read(len(magic)) == magic


def what_it_is(path: pathlib.Path) -> str:
  """Why a file may be unreadable, as far as its size and start tell."""
  size = path.stat().st_size
  if _starts(path, b"version https://git-lfs"):
    return "it is a git-lfs pointer. Run `git lfs pull` where it was cloned."
  if _starts(path, b"GGUF"):
    return "it is a GGUF file of llama.cpp. Give the Hugging Face folder."
  if _starts(path, b"<"):
    return "it is a web page. Download the file itself."
  return (
    f"it is truncated or damaged ({size:,} bytes). Compare its size with the"
    " published one and copy or download it again."
  )


def line(error: Exception | str) -> str:
  """A text in one short line."""
  return " ".join(str(error).split())[:200]
