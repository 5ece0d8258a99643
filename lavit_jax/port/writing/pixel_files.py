"""Pixel decoders as folders in diffusers' format: what an export writes.

The other way of `pixel_folders.py`. What an import kept comes back as it was:
small files byte for byte, the names and shards of the weights, the generation
of names of the autoencoder. A part that was trained here, or whose sizes or
schedule are no longer those of the kept files, gets files of its own.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import schedules
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.diffusers import scheduler_config
from lavit_jax.port.formats import llama_folder, tensors
from lavit_jax.port.reading import official, pixel_folders
from lavit_jax.port.tables import names
from lavit_jax.port.writing import export

_SHARD = 10 * 10**9  # bytes, as diffusers cuts files of safetensors
_CONFIGS = {"unet": unet.UNetConfig, "vae": vae.VaeConfig}
_READ = {
  "unet": config_lib.unet_config,
  "vae": config_lib.vae_config,
}
_FIELDS = {
  "unet": config_lib.unet_fields,
  "vae": config_lib.vae_fields,
}


def official_folder(
  model: pathlib.Path, part: checkpoints.StoredPart
) -> export.Export:
  """pixel_decoding/ or highres_pixel_decoding/ of a part.

  Args:
    model: the directory that the part is of.
    part: lowres_pixels or highres_pixels.

  Raises:
    errors.CheckpointError: an array is missing, or diffusers has no such
      network or schedule.
  """
  folder = pixel_folders.FOLDERS[part.meta["part"]]
  kept = model / official.OFFICIAL / folder
  port, states = part.meta.get("port", {}), []
  for kind in _CONFIGS:
    found = _entries(part, kind, port.get("vae_names", "to_q"))
    file = port.get("weights", {}).get(kind, "")
    states += _as_imported(f"{folder}/{kind}", file, found, kept / kind, kind)
  if "uncond" in part.arrays:
    stem = f"{folder}/{pixel_folders.UNCOND.removesuffix('.bin')}"
    found = tuple(export.entries(names.UNCOND, part))
    states.append(export.StateFile(stem, ".bin", found, bare=True))
  files = _others(kept) | _described(part, kept)
  return export.Export(tuple(states), _under(folder, files))


def diffusers_folder(
  model: pathlib.Path, part: checkpoints.StoredPart
) -> export.Export:
  """The same as safetensors under today's names, in a folder of the part.

  Arguments and errors are those of `official_folder`.
  """
  folder = part.meta["part"]
  kept = model / official.OFFICIAL / pixel_folders.FOLDERS[folder]
  states = [
    export.StateFile(
      f"{folder}/{kind}/{pixel_folders.STEM}",
      ".safetensors",
      _entries(part, kind, "to_q"),
      _SHARD,
    )
    for kind in _CONFIGS
  ]
  if "uncond" in part.arrays:
    stem = pixel_folders.UNCOND.removesuffix(".bin")
    found = tuple(export.entries((names.Row(stem, "uncond"),), part))
    states.append(export.StateFile(f"{folder}/{stem}", ".safetensors", found))
  files = _under(folder, _described(part, kept))
  return export.Export(tuple(states), files)


def _under(folder, files):
  return {f"{folder}/{path}": data for path, data in files.items()}


def _entries(part, kind, generation) -> tuple[export.Entry, ...]:
  """Tensors of a network, under the names of diffusers."""
  table = pixel_folders.table_of(_config(part, kind), generation)
  return tuple(export.entries(table, part, root=f"{kind}/"))


def _config(part, kind):
  """The sizes of a network of a part."""
  fields = part.meta.get(kind)
  if fields is None:
    raise errors.CheckpointError(
      f"The part {part.meta['part']} has no {kind}: a pixel decoder is a U-Net"
      " and its autoencoder together. Train it, or import it again."
    )
  return _CONFIGS[kind](**fields)


def _as_imported(place, file, found, kept, kind) -> list[export.StateFile]:
  """The files that the weights were in, if they still are the same weights.

  Args:
    place: path of the network's folder in the export.
    file: name of the weights or of their index, "" for a part made here.
    found: the tensors.
    kept: folder of the small files that an import kept.
    kind: "unet" or "vae".
  """
  if pixel_folders.is_index(file):
    path = kept / file
    shards = tensors.read_index(path, file) if path.is_file() else {}
    if set(shards) == {entry.spec.name for entry in found}:
      return _shards(place, shards, found)
  half = {entry.spec.dtype for entry in found} == {np.dtype(np.float16)}
  variant = f".{pixel_folders.VARIANT}." in file
  if not file or pixel_folders.is_index(file) or (variant and not half):
    file = pixel_folders.weight_files(kind)[0]
  # One file whatever its size: the official classes' diffusers has no shards.
  name = pathlib.PurePath(file)
  return [export.StateFile(f"{place}/{name.stem}", name.suffix, found)]


def _shards(place, shards, found) -> list[export.StateFile]:
  """A file for each that an index names."""
  groups: dict[str, list[export.Entry]] = {}
  for entry in found:
    groups.setdefault(shards[entry.spec.name], []).append(entry)
  return [
    export.StateFile(
      f"{place}/{pathlib.PurePath(file).stem}",
      pathlib.PurePath(file).suffix,
      tuple(group),
    )
    for file, group in sorted(groups.items())
  ]


def _others(kept: pathlib.Path) -> dict[str, bytes]:
  """All that an import kept, by path in the folder."""
  return {
    path.relative_to(kept).as_posix(): path.read_bytes()
    for path in sorted(kept.rglob("*"))
    if path.is_file()
  }


def _described(part, kept: pathlib.Path) -> dict[str, bytes]:
  """The three files that diffusers needs: those kept if true, else made."""
  label, files = part.meta["part"], {}
  try:
    for kind, read in _READ.items():
      path, config = f"{kind}/{pixel_folders.CONFIG}", _config(part, kind)
      same = lambda fields, read=read, config=config: (
        _for_diffusers(read(fields)) == _for_diffusers(config)
      )
      files[path] = _kept_if(kept / path, same) or llama_folder.to_json(
        _FIELDS[kind](config)
      )
    schedule = schedules.NoiseSchedule(**part.meta["schedule"])
    path = pixel_folders.SCHEDULER
    same = lambda fields: scheduler_config.parse(fields) == schedule
    files[path] = _kept_if(kept / path, same) or llama_folder.to_json(
      scheduler_config.unparse(schedule)
    )
  except (errors.ConfigError, errors.UsageError) as e:
    raise errors.CheckpointError(
      f"The part {label} cannot be written for diffusers. {e}"
    ) from e
  return files


def _kept_if(path: pathlib.Path, same: Callable[[Any], bool]) -> bytes:
  """A JSON file that was kept, b"" where there is none or it is outdated."""
  if not path.is_file():
    return b""
  data = path.read_bytes()
  return data if same(json.loads(data)) else b""


def _for_diffusers(config):
  """The config without what says how to compute, which no file there has."""
  usual = {"dtype": "float32"}
  if isinstance(config, unet.UNetConfig):
    usual |= {"remat": "none", "scan": False}
  return dataclasses.replace(config, **usual)
