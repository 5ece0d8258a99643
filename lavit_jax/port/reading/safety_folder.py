"""Stable Diffusion's safety checker, a folder of transformers, as a part.

  safety   safety_checker/, at the root or in one of the pixel decoders' folders

It may be missing. What is kept besides (config.json, the feature extractor's
settings) is given back by an export. A pickle's `position_ids`, a buffer that
counts from 0, is passed over, as newer versions of transformers do.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.models.pixels import safety
from lavit_jax.port.formats import config_fields, llama_folder, tensors
from lavit_jax.port.reading import pixel_folders, plan
from lavit_jax.port.tables import safety_names

PART = "safety"
NAME = "safety_checker"
_EXTRACTOR, _IMAGES = "feature_extractor", "preprocessor_config.json"
_DONE = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
PLACES = (NAME, *(f"{f}/{NAME}" for f in pixel_folders.FOLDERS.values()))
_DEFAULTS = {  # of transformers' CLIPVisionConfig
  "image_size": 224,
  "patch_size": 32,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "layer_norm_eps": 1e-5,
}
_FIELDS = {  # names here
  "image_size": "image_size",
  "patch_size": "patch_size",
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
  "layer_norm_eps": "norm_eps",
}


def find(folder: pathlib.Path) -> str | None:
  """Where in a checkpoint the checker is, or None."""
  found = [place for place in PLACES if (folder / place).is_dir()]
  return found[0] if found else None


def read(
  folder: pathlib.Path,
  place: str,
  problems: plan.Problems,
  allow: Collection[str] = (),
) -> tuple[plan.Part, dict[str, bytes]]:
  """The part, and the small files of the folder.

  Args:
    folder: of the checkpoint.
    place: of PLACES, what `find` gave.
    problems: takes what does not fit.
    allow: official names that may be missing.

  Raises:
    errors.CheckpointError: a file is missing or damaged, or the config is of
      another network.
  """
  path = folder / place / "config.json"
  if not path.is_file():
    raise errors.CheckpointError(
      f"{place}/config.json is missing: expected the folder of Stable"
      " Diffusion's safety checker. Copy it whole, or remove the folder."
    )
  fields = llama_folder.read_json(path, f"{place}/config.json")
  found = tensors.open_shards(folder / place, place)
  config = _config(fields, found, f"{place}/config.json")
  for beside in (place, f"{place.removesuffix(NAME)}{_EXTRACTOR}"):
    if (folder / beside / _IMAGES).is_file():
      _check_images(folder, f"{beside}/{_IMAGES}", config.image_size)
  net = safety.SafetyChecker(config)
  side = config.image_size
  made = jax.eval_shape(
    net.init, jax.random.key(0), jnp.zeros((1, side, side, 3))
  )
  generation = safety_names.generation(found)
  arrays = plan.arrays_of(
    safety_names.table(generation),
    found,
    nn.meta.unbox(made["params"]),
    problems,
    label=place,
    allow=allow,
  )
  file = sorted({tensor.file for tensor in found.values()})
  meta = {
    "safety": dataclasses.asdict(config),
    "port": {
      "place": place,
      "names": generation,
      "suffix": pathlib.PurePath(file[0]).suffix,
    },
  }
  small = llama_folder.small_files(folder / place)
  small = {n: d for n, d in small.items() if not pixel_folders.is_index(n)}
  return plan.Part(PART, tuple(arrays), meta), small


def _check_images(folder, file, size):
  """Whether the checker is shown images as `infer/safety.py` does it.

  Raises:
    errors.CheckpointError: a setting of the file is another; it is named.
  """
  fields = llama_folder.read_json(folder / file, file)
  wanted = {
    "image_mean": [round(float(x), 8) for x in image_io.MEAN],
    "image_std": [round(float(x), 8) for x in image_io.STD],
    "resample": 3,  # bicubic
    "size": size,
    "crop_size": size,
    "rescale_factor": 1 / 255,
    **dict.fromkeys(_DONE, True),
  }
  wrong = [
    f"{name} is {fields[name]!r}, expected {value!r}"
    for name, value in wanted.items()
    if name in fields and not _is_setting(fields[name], value)
  ]
  if wrong:
    raise errors.CheckpointError(
      f"{file} prepares images otherwise than is done here:"
      f" {'; '.join(wrong)}. Expected the settings of CLIP, as Stable"
      " Diffusion's safety checker has them."
    )


def _is_setting(given, wanted) -> bool:
  """Whether a setting is one; sizes also as {"shortest_edge": 224}."""
  if isinstance(given, Mapping):
    return bool(given) and all(v == wanted for v in given.values())
  if isinstance(wanted, list | float):
    try:
      return np.allclose(np.asarray(given, float), wanted, rtol=0, atol=1e-6)
    except (TypeError, ValueError, OverflowError):
      return False
  return given == wanted


def _config(fields: Mapping[str, Any], found, label) -> safety.SafetyConfig:
  """Sizes from config.json, the numbers of concepts from the tensors."""
  tower = {**_DEFAULTS, **(fields.get("vision_config") or {})}
  activation = tower.get("hidden_act", "quick_gelu")
  counts = [
    found[name].shape[0] if name in found else 1
    for name in ("concept_embeds", "special_care_embeds")
  ]
  dim = fields.get("projection_dim", 512)
  try:
    if activation != "quick_gelu":
      raise ValueError(f"hidden_act is {activation!r}, expected 'quick_gelu'")
    for name, value in {**tower, "projection_dim": dim}.items():
      whole = config_fields.is_whole(value)
      number = config_fields.is_number(value) and value > 0
      number = number and name == "layer_norm_eps"
      if name in (*_FIELDS, "projection_dim") and not (whole or number):
        raise ValueError(f"{name} is {value!r}, expected a positive number")
    sizes = {ours: tower[theirs] for theirs, ours in _FIELDS.items()}
    return safety.SafetyConfig(
      **sizes,
      projection_dim=dim,
      concepts=counts[0],
      special=counts[1],
    )
  except (errors.ConfigError, TypeError, ValueError) as e:
    raise errors.CheckpointError(
      f"{label} describes a network that cannot be made here: {e}. Expected"
      " Stable Diffusion's safety checker."
    ) from e
