"""Checkpoints on the Hugging Face hub."""

import pathlib
import re
from collections.abc import Sequence

from lavit_jax import errors
from lavit_jax.port import official, pixel_folders, safety_folder, tensors

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EVERY = ("*.json", "tokenizer.model")


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
  try:
    files = _listed(hub, str(source))
    return pathlib.Path(
      hub.snapshot_download(
        str(source),
        allow_patterns=patterns(only),
        ignore_patterns=[
          file
          for folder, kind in _networks()
          for file in pixel_folders.other_weights(files, folder, kind)
        ],
      )
    )
  except Exception as e:  # the hub's errors, of requests and of files
    raise errors.CheckpointError(
      f"{source} is no local path and could not be downloaded from the Hugging"
      f" Face hub: {' '.join(str(e).split())[:300]} Check the id and the"
      " network, then give the same command again: it goes on where it stopped."
    ) from e


def _listed(hub, source) -> list[str]:
  """Files of a repository; none where the hub cannot be asked.

  What is in the cache is found without it, and the download says what is
  wrong if nothing is.
  """
  try:
    return hub.HfApi().list_repo_files(source)
  except Exception:  # the hub's errors, of requests and of files
    return []


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
