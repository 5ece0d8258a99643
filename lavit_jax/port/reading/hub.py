"""Checkpoints on the Hugging Face hub."""

import pathlib
import re
from collections.abc import Sequence

from lavit_jax.core import errors
from lavit_jax.port.formats import tensors
from lavit_jax.port.reading import official, pixel_folders, safety_folder

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EVERY = ("*.json", "tokenizer.model")
_TIMEOUT = 10.0  # seconds until the hub must have answered
_REFUSED = (401, 403, 404)


def resolve(source, only: Sequence[str] | None = None) -> pathlib.Path:
  """The local place of a source: a path, or an id, which is downloaded.

  A download that was interrupted goes on where it stopped, and what is in the
  hub's cache already is not loaded again. HF_HOME and HF_TOKEN are read as
  ever.

  Args:
    source: a path, or "owner/name" where no such path exists.
    only: parts whose files are enough, of `official.ALL_PARTS`.

  Raises:
    errors.UsageError: neither a path nor an id.
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
  files, unreachable = _listed(hub, str(source))
  try:
    return pathlib.Path(
      hub.snapshot_download(
        str(source),
        allow_patterns=patterns(only),
        ignore_patterns=[
          file
          for folder, kind in _networks()
          for file in pixel_folders.other_weights(files, folder, kind)
        ],
        local_files_only=unreachable is not None,
      )
    )
  except Exception as e:  # the hub's errors, of requests and of files
    raise _failed(source, unreachable or e) from e


def _failed(source, error):
  return errors.CheckpointError(
    f"{source} is no local path and could not be downloaded from the Hugging"
    f" Face hub: {' '.join(str(error).split())[:300]}. Check the id and the"
    " network, then give the same command again: it goes on where it stopped."
  )


def _listed(hub, source) -> tuple[list[str], Exception | None]:
  """Files of a repository; or none, and why the hub cannot be asked.

  One request and no second try, unlike the download's own: without a network
  that waits and warns half a minute. What is in the cache is still found.

  Raises:
    errors.CheckpointError: the hub has answered that there is no such model,
      or not for this user.
  """
  try:
    info = hub.HfApi().model_info(source, timeout=_TIMEOUT)
    return [file.rfilename for file in info.siblings or ()], None
  except hub.errors.HfHubHTTPError as e:
    status = getattr(e.response, "status_code", None)
    if status in _REFUSED:
      raise _failed(source, e) from e
    return [], e
  except Exception as e:  # no name server, no route, no answer in time
    return [], e


def _networks() -> list[tuple[str, str]]:
  """(folder, kind) of U-Nets and autoencoders, of a plain pipeline's too."""
  places = ("", *(f"{name}/" for name in pixel_folders.FOLDERS.values()))
  return [(f"{p}{kind}", kind) for p in places for kind in ("unet", "vae")]


def patterns(only: Sequence[str] | None) -> list[str]:
  """What to download for these parts.

  All layouts are covered: the official one, a plain LLaMA folder, a pipeline
  of Stable Diffusion.
  """
  parts = set(only or official.ALL_PARTS)
  files = {
    official.FILES[file]
    for part in parts & set(official.PARTS)
    for file in official.NEEDS[part]
  }
  if "tokenizer" in parts:
    files |= {official.FILES["lowres"]}
  found = [*_EVERY, *sorted(files)]
  if "llm" in parts:
    found += [f"{official.LLM_FOLDER}/*", "model*.safetensors"]
    found += ["pytorch_model*.bin"]
  for part in sorted(parts & set(pixel_folders.FOLDERS)):
    folder = pixel_folders.FOLDERS[part]
    found += [f"{folder}/{kind}/*" for kind in ("unet", "vae")]
    found.append(f"{folder}/{pixel_folders.UNCOND}")
  if parts & set(pixel_folders.FOLDERS):
    found += ["unet/*", "vae/*"]
  if safety_folder.PART in parts:
    found += [f"{place}/*" for place in safety_folder.PLACES]
  return found
