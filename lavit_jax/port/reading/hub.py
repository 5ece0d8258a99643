"""Checkpoints on the Hugging Face hub."""

import os
import pathlib
import re
from collections.abc import Sequence

from lavit_jax.core import errors
from lavit_jax.port.diffusers import weight_files
from lavit_jax.port.formats import official_layout, tensors
from lavit_jax.port.reading import safety_folder

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ALWAYS = ("*.json", "tokenizer.model")
_TIMEOUT = 10.0  # seconds until the hub must have answered
_REFUSED = (401, 403, 404)


def resolve(
  source: str | os.PathLike, only: Sequence[str] | None = None
) -> pathlib.Path:
  """Returns the local path of a source, which is downloaded if it is an id.

  An interrupted download continues where it stopped, and files in the hub's
  cache are not downloaded again. HF_HOME and HF_TOKEN have their usual effect.

  Args:
    source: a path, or "owner/name" where no such path exists.
    only: parts of `official_layout.ALL_PARTS` whose files are needed; None
      for all.

  Raises:
    errors.UsageError: the source is neither a path nor an id.
    errors.CheckpointError: the hub cannot be reached, or has no such model.
  """
  path = pathlib.Path(source)
  if path.exists():
    return path
  if not _ID.fullmatch(str(source)):
    raise errors.UsageError(
      f"{source}: no such file or directory, and no id of the Hugging Face hub"
      " (owner/name). Check the spelling."
    )
  hub = tensors.require("huggingface_hub", f"Downloading {source}")
  files, unreachable = _list_files(hub, str(source))
  try:
    return pathlib.Path(
      hub.snapshot_download(
        str(source),
        allow_patterns=patterns(only),
        ignore_patterns=[
          file
          for folder, kind in _networks()
          for file in weight_files.not_read(files, folder, kind)
        ],
        local_files_only=unreachable is not None,
      )
    )
  except Exception as e:  # the hub's errors, of requests and of files
    raise _failure(source, unreachable or e) from e


def _failure(source, error):
  return errors.CheckpointError(
    f"{source} is no local path and could not be downloaded from the Hugging"
    f" Face hub: {' '.join(str(error).split())[:300]}. Check the id and the"
    " network, then run the same command again: the download continues where"
    " it stopped."
  )


def _list_files(hub, source) -> tuple[list[str], Exception | None]:
  """Returns the files of a repository; or none, and why the hub is unreachable.

  This is one request without a retry. Without a network, the retries of the
  download itself would wait and warn for half a minute. Files in the cache are
  found even then.

  Raises:
    errors.CheckpointError: the hub answers that there is no such model, or
      not for this user.
  """
  try:
    info = hub.HfApi().model_info(source, timeout=_TIMEOUT)
    return [file.rfilename for file in info.siblings or ()], None
  except hub.errors.HfHubHTTPError as e:
    status = getattr(e.response, "status_code", None)
    if status in _REFUSED:
      raise _failure(source, e) from e
    return [], e
  except Exception as e:  # no name server, no route, no answer in time
    return [], e


def _networks() -> list[tuple[str, str]]:
  """Returns (folder, kind) of every U-Net and autoencoder."""
  folders = official_layout.PIXEL_FOLDERS.values()
  roots = ("", *(f"{name}/" for name in folders))  # "": a plain pipeline
  return [(f"{r}{kind}", kind) for r in roots for kind in ("unet", "vae")]


def patterns(only: Sequence[str] | None) -> list[str]:
  """Returns patterns of the files to download for these parts.

  They cover every layout: the official one, a plain LLaMA folder, a pipeline of
  Stable Diffusion.

  Args:
    only: as in `resolve`.
  """
  parts = set(only or official_layout.ALL_PARTS)
  files = {
    official_layout.FILES[file]
    for part in parts & set(official_layout.PARTS)
    for file in official_layout.FILES_OF_PART[part]
  }
  if "tokenizer" in parts:
    files |= {official_layout.FILES["lowres"]}
  allowed = [*_ALWAYS, *sorted(files)]
  if "llm" in parts:
    allowed += [f"{official_layout.LLM_FOLDER}/*", "model*.safetensors"]
    allowed += ["pytorch_model*.bin"]
  pixel_parts = parts & set(official_layout.PIXEL_FOLDERS)
  for part in sorted(pixel_parts):
    folder = official_layout.PIXEL_FOLDERS[part]
    allowed += [f"{folder}/{kind}/*" for kind in ("unet", "vae")]
    allowed.append(f"{folder}/{official_layout.UNCOND}")
  if pixel_parts:
    allowed += ["unet/*", "vae/*"]
  if official_layout.SAFETY_PART in parts:
    allowed += [f"{folder}/*" for folder in safety_folder.FOLDERS]
  return allowed
