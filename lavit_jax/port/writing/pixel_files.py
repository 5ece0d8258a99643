"""The plan of a pixel decoder's export, a folder in diffusers' format.

This is the inverse of `pixel_folders.py`. What an import kept is restored:
small files byte for byte, the names and shards of the weights, the generation
of the autoencoder's names. A part that was trained here, or whose sizes or
schedule have changed since the import, gets new files.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import schedules
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.diffusers import scheduler_config, weight_files
from lavit_jax.port.formats import official_layout, small_files, tensors
from lavit_jax.port.reading import pixel_folders
from lavit_jax.port.tables import names, pixel_names, rows
from lavit_jax.port.writing import export

_SHARD = 10 * 10**9  # bytes, the size of diffusers' safetensors shards
_UNCOND_STEM = pathlib.PurePath(official_layout.UNCOND).stem


def official_folder(
  model: pathlib.Path, part: checkpoints.StoredPart
) -> export.ExportPlan:
  """Plans pixel_decoding/ or highres_pixel_decoding/.

  Args:
    model: the directory that the part belongs to.
    part: lowres_pixels or highres_pixels.

  Raises:
    errors.CheckpointError: an array is missing, or diffusers has no such
      network or schedule.
  """
  folder = official_layout.PIXEL_FOLDERS[part.meta["part"]]
  kept = _kept_folder(model, part)
  port = part.meta.get("port", {})
  states = []
  for kind in config_lib.KINDS:
    entries = _entries(part, kind, port.get("vae_names", "to_q"))
    file = port.get("weights", {}).get(kind, "")
    states += _restored(f"{folder}/{kind}", file, entries, kept / kind, kind)
  if "uncond" in part.arrays:
    entries = tuple(export.entries(names.UNCOND, part))
    stem = f"{folder}/{_UNCOND_STEM}"
    states.append(export.StateFile(stem, ".bin", entries, bare=True))
  files = _kept_files(kept) | _descriptions(part, kept)
  return export.ExportPlan(tuple(states), _under(folder, files))


def diffusers_folder(
  model: pathlib.Path, part: checkpoints.StoredPart
) -> export.ExportPlan:
  """Plans the same as safetensors with today's names, in a folder of the part.

  Arguments and errors are those of `official_folder`.
  """
  folder = part.meta["part"]
  states = [
    export.StateFile(
      f"{folder}/{kind}/{weight_files.STEM}",
      ".safetensors",
      _entries(part, kind, "to_q"),
      _SHARD,
    )
    for kind in config_lib.KINDS
  ]
  if "uncond" in part.arrays:
    table = (rows.Row(_UNCOND_STEM, "uncond"),)
    entries = tuple(export.entries(table, part))
    stem = f"{folder}/{_UNCOND_STEM}"
    states.append(export.StateFile(stem, ".safetensors", entries))
  files = _under(folder, _descriptions(part, _kept_folder(model, part)))
  return export.ExportPlan(tuple(states), files)


def _kept_folder(model, part) -> pathlib.Path:
  """Returns the folder of the small files that an import kept."""
  folder = official_layout.PIXEL_FOLDERS[part.meta["part"]]
  return model / official_layout.KEPT_FOLDER / folder


def _under(folder, files):
  return {f"{folder}/{path}": data for path, data in files.items()}


def _entries(part, kind, generation) -> tuple[export.Entry, ...]:
  """Returns the tensors of a network, under diffusers' names."""
  table = pixel_names.table_of(_config(part, kind), generation)
  return tuple(export.entries(table, part, root=f"{kind}/"))


def _config(part, kind):
  """Returns the sizes of a network of a part."""
  fields = part.meta.get(kind)
  if fields is None:
    raise errors.CheckpointError(
      f"The part {part.meta['part']} has no {kind}, but a pixel decoder needs"
      " both a U-Net and an autoencoder. Train it, or import it again."
    )
  return config_lib.KINDS[kind].config(**fields)


def _restored(
  folder: str,
  file: str,
  entries: tuple[export.Entry, ...],
  kept: pathlib.Path,
  kind: str,
) -> list[export.StateFile]:
  """Returns the files that the weights were in, or new ones if they differ.

  Args:
    folder: path of the network's folder in the export.
    file: name of the weights or of their index, "" for a part trained here.
    entries: the tensors.
    kept: folder of the small files that an import kept.
    kind: "unet" or "vae".
  """
  if weight_files.is_index(file):
    path = kept / file
    shards = tensors.read_index(path, file) if path.is_file() else {}
    if set(shards) == {entry.spec.name for entry in entries}:
      return _shards(folder, shards, entries)
  half = {entry.spec.dtype for entry in entries} == {np.dtype(np.float16)}
  is_variant = f".{weight_files.VARIANT}." in file
  if not file or weight_files.is_index(file) or (is_variant and not half):
    file = weight_files.candidates(kind)[0]
  # One file of any size: the diffusers of the official classes has no shards.
  name = pathlib.PurePath(file)
  return [export.StateFile(f"{folder}/{name.stem}", name.suffix, entries)]


def _shards(
  folder: str, shards: Mapping[str, str], entries: Sequence[export.Entry]
) -> list[export.StateFile]:
  """Returns one file for each that an index names."""
  groups: dict[str, list[export.Entry]] = {}
  for entry in entries:
    groups.setdefault(shards[entry.spec.name], []).append(entry)
  return [
    export.StateFile(
      f"{folder}/{pathlib.PurePath(file).stem}",
      pathlib.PurePath(file).suffix,
      tuple(group),
    )
    for file, group in sorted(groups.items())
  ]


def _kept_files(kept: pathlib.Path) -> dict[str, bytes]:
  """Returns all files that an import kept, by path in the folder."""
  return {
    path.relative_to(kept).as_posix(): path.read_bytes()
    for path in sorted(kept.rglob("*"))
    if path.is_file()
  }


def _descriptions(part, kept: pathlib.Path) -> dict[str, bytes]:
  """Returns the JSON files that diffusers needs, by path in the folder.

  A kept file is restored if it describes the part, otherwise replaced.
  """
  files = {}
  try:
    for kind in config_lib.KINDS:
      file = f"{kind}/{pixel_folders.CONFIG}"
      files[file] = _network_file(kept / file, kind, _config(part, kind))
    schedule = schedules.NoiseSchedule(**part.meta["schedule"])
    files[pixel_folders.SCHEDULER] = _kept_or_new(
      kept / pixel_folders.SCHEDULER,
      scheduler_config.parse,
      schedule,
      lambda: scheduler_config.unparse(schedule),
    )
  except (errors.ConfigError, errors.UsageError) as e:
    raise errors.CheckpointError(
      f"The part {part.meta['part']} cannot be written for diffusers. {e}"
    ) from e
  return files


def _network_file(path, kind, config) -> bytes:
  """Returns the config.json of a network."""
  functions = config_lib.KINDS[kind]
  return _kept_or_new(
    path,
    lambda fields: _inference_config(functions.read(fields)),
    _inference_config(config),
    lambda: functions.fields(config),
  )


def _kept_or_new(
  path: pathlib.Path,
  parse: Callable[[Any], Any],
  expected: Any,
  fields: Callable[[], dict[str, Any]],
) -> bytes:
  """Returns a kept JSON file if it still holds, else a new one.

  Args:
    path: of the kept file, which may be missing.
    parse: applied to its content.
    expected: the result for a file that still holds.
    fields: returns the content of a new file.
  """
  if path.is_file():
    data = path.read_bytes()
    if parse(json.loads(data)) == expected:
      return data
  return small_files.to_json(fields())


def _inference_config(config: unet.UNetConfig | vae.VaeConfig):
  """Returns a config without choices of computation, which no file states."""
  if isinstance(config, unet.UNetConfig):
    return dataclasses.replace(
      config, dtype="float32", remat="none", scan=False
    )
  return dataclasses.replace(config, dtype="float32")
