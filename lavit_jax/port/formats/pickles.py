"""PyTorch's pickles, loaded without running any of their code."""

import pathlib
import pickle
import re
import warnings
import zipfile
from typing import Any

from lavit_jax.core import errors

_MAX_PROTOCOL = 3  # of pickles that torch.load reads with weights_only=True


def load(torch: Any, path: pathlib.Path, label: str) -> Any:
  """Returns the unpickled content, its storages mapped from the file.

  Args:
    torch: the module.
    path: of the file.
    label: how messages name it.

  Raises:
    errors.CheckpointError: it would run code, or is damaged.
  """
  is_zip = starts_with(path, b"PK\x03\x04")
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "Detected pickle protocol")
      # Files from before torch 1.6 are no zip archives and cannot be mapped.
      return torch.load(
        path, map_location="cpu", weights_only=True, mmap=is_zip
      )
  except pickle.UnpicklingError as e:
    raise _refused(path, label, is_zip, e) from e
  except (RuntimeError, EOFError, ValueError, KeyError, OSError) as e:
    raise errors.CheckpointError(
      f"{label} cannot be read ({one_line(e)}): {diagnose(path)}"
    ) from e


def _refused(path, label, is_zip, error):
  """Returns the error for a pickle that weights_only=True does not read."""
  if (protocol := _protocol(path, is_zip)) > _MAX_PROTOCOL:
    return errors.CheckpointError(
      f"{label} was pickled by protocol {protocol}, which torch.load reads"
      " only if the file may run code; expected protocol 2, the default of"
      " torch.save. If you trust the file, load it and save it again:"
      f" torch.save(torch.load({path.name!r}, weights_only=False),"
      f" {path.name!r})."
    )
  code = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
  if not is_zip and not code:
    return errors.CheckpointError(
      f"{label} is no file of PyTorch tensors: {diagnose(path)}"
    )
  reason = one_line(str(error).partition("WeightsUnpickler error:")[2] or error)
  problem = f"cannot be read without running code ({reason})"
  if code:
    problem = f"names code to run ({code[1] or code[2]})"
  return errors.CheckpointError(
    f"{label} is a pickle that is not only tensors: it {problem}, and was"
    " refused. If you trust the file, load it and save the model's"
    " state_dict() alone."
  )


def _protocol(path, is_zip) -> int:
  """Returns the pickle protocol that a file declares; 0 if it declares none."""
  try:
    if is_zip:
      with zipfile.ZipFile(path) as archive:
        members = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        with archive.open(members[0]) as file:
          head = file.read(2)
    else:
      with path.open("rb") as file:
        head = file.read(2)
  except (OSError, IndexError, RuntimeError, zipfile.BadZipFile):
    return 0  # a damaged file, which has a message of its own
  return head[1] if head[:1] == pickle.PROTO and len(head) == 2 else 0


def starts_with(path: pathlib.Path, magic: bytes) -> bool:
  """Returns whether a file begins with these bytes."""
  with path.open("rb") as file:
    return file.read(len(magic)) == magic


def diagnose(path: pathlib.Path) -> str:
  """Returns why a file may be unreadable, judged by its size and first bytes.

  Returns:
    One or two sentences: the likely cause, and the remedy.
  """
  size = path.stat().st_size
  if starts_with(path, b"version https://git-lfs"):
    return "it is a git-lfs pointer. Run `git lfs pull` where it was cloned."
  if starts_with(path, b"GGUF"):
    return "it is a GGUF file of llama.cpp. Give the Hugging Face folder."
  if starts_with(path, b"<"):
    return "it is a web page. Download the file itself."
  return (
    f"it is truncated or damaged ({size:,} bytes). Compare its size with the"
    " published one and copy or download it again."
  )


def one_line(error: Exception | str) -> str:
  """Returns a text on one line, cut to 200 characters."""
  return " ".join(str(error).split())[:200]
