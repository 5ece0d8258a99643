"""Stable Diffusion's safety checker, a folder of transformers, as a part.

  safety   safety_checker/, at the root or in one of the pixel decoders' folders

It may be missing. An export restores its other files (config.json, settings of
the feature extractor). A pickle's `position_ids`, a buffer that counts from 0,
is ignored, as newer versions of transformers do.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.models.pixels import safety
from lavit_jax.port.diffusers import weight_files
from lavit_jax.port.formats import (
  config_fields,
  official_layout,
  small_files,
  tensors,
)
from lavit_jax.port.reading import plan
from lavit_jax.port.tables import safety_names, sizes

NAME = "safety_checker"
FOLDERS = (  # in which it may be
  NAME,
  *(f"{f}/{NAME}" for f in official_layout.PIXEL_FOLDERS.values()),
)
_EXTRACTOR, _IMAGES = "feature_extractor", "preprocessor_config.json"
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_DEFAULTS = {  # of transformers' CLIPVisionConfig
  "image_size": 224,
  "patch_size": 32,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "layer_norm_eps": 1e-5,
}
_FIELDS = {  # transformers' names, and those of SafetyConfig
  "image_size": "image_size",
  "patch_size": "patch_size",
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
  "layer_norm_eps": "norm_eps",
}


def find(folder: pathlib.Path) -> str | None:
  """Returns which of FOLDERS a checkpoint has; None if it has none."""
  return next((name for name in FOLDERS if (folder / name).is_dir()), None)


def read(
  root: pathlib.Path,
  folder: str,
  problems: plan.Problems,
  allow: Collection[str] = (),
) -> tuple[plan.Part, dict[str, bytes]]:
  """Returns the part, and the small files of the folder by name.

  Args:
    root: of the checkpoint.
    folder: of the checker, as `find` returned it.
    problems: receives what does not fit.
    allow: official names that may be missing.

  Raises:
    errors.CheckpointError: a file is missing or damaged, or the config
      describes another network.
  """
  by_name, config = _open(root, folder)
  generation = safety_names.generation(by_name)
  images = jnp.zeros((1, config.image_size, config.image_size, 3))
  tree = sizes.abstract_variables(safety.SafetyChecker(config), images)
  arrays = plan.arrays_of(
    safety_names.table(generation),
    by_name,
    tree["params"],
    problems,
    label=folder,
    allow=allow,
  )
  file = min(tensor.file for tensor in by_name.values())
  meta = {
    "safety": dataclasses.asdict(config),
    "port": {
      "place": folder,
      "names": generation,
      "suffix": pathlib.PurePath(file).suffix,
    },
  }
  files = {
    name: data
    for name, data in small_files.read_all(root / folder).items()
    if not weight_files.is_index(name)
  }
  return plan.Part(official_layout.SAFETY_PART, tuple(arrays), meta), files


def _open(root, folder) -> tuple[tensors.Tensors, safety.SafetyConfig]:
  """Returns the tensors and the config, with the image settings checked."""
  label = f"{folder}/config.json"
  path = root / folder / "config.json"
  if not path.is_file():
    raise errors.CheckpointError(
      f"{label} is missing: expected the folder of Stable Diffusion's safety"
      " checker. Copy the complete folder, or remove it."
    )
  fields = small_files.read_json(path, label)
  by_name = tensors.open_shards(root / folder, folder)
  config = _config(fields, by_name, label)
  for parent in (folder, f"{folder.removesuffix(NAME)}{_EXTRACTOR}"):
    if (root / parent / _IMAGES).is_file():
      _check_images(root, f"{parent}/{_IMAGES}", config.image_size)
  return by_name, config


def _check_images(root, file, size):
  """Checks that images are prepared as `infer/pixels/safety.py` does.

  Raises:
    errors.CheckpointError: a setting of the file differs; it is named.
  """
  fields = small_files.read_json(root / file, file)
  expected = {
    "image_mean": [round(float(x), 8) for x in image_io.MEAN],
    "image_std": [round(float(x), 8) for x in image_io.STD],
    "resample": 3,  # bicubic
    "size": size,
    "crop_size": size,
    "rescale_factor": 1 / 255,
    **dict.fromkeys(_STEPS, True),
  }
  wrong = [
    f"{name} is {fields[name]!r}, expected {value!r}"
    for name, value in expected.items()
    if name in fields and not _same_setting(fields[name], value)
  ]
  if wrong:
    raise errors.CheckpointError(
      f"{file} prepares images in another way than lavit_jax:"
      f" {'; '.join(wrong)}. Expected the settings of CLIP, as in Stable"
      " Diffusion's safety checker."
    )


def _same_setting(value, expected) -> bool:
  """Compares a setting; a size may also be {"shortest_edge": 224}."""
  if isinstance(value, Mapping):
    return bool(value) and all(v == expected for v in value.values())
  if isinstance(expected, list | float):
    try:
      return np.allclose(np.asarray(value, float), expected, rtol=0, atol=1e-6)
    except (TypeError, ValueError, OverflowError):
      return False
  return value == expected


def _config(fields: Mapping[str, Any], by_name, label) -> safety.SafetyConfig:
  """Returns sizes from config.json, numbers of concepts from the tensors."""
  tower = {**_DEFAULTS, **(fields.get("vision_config") or {})}
  activation = tower.get("hidden_act", "quick_gelu")
  counts = [
    by_name[name].shape[0] if name in by_name else 1
    for name in ("concept_embeds", "special_care_embeds")
  ]
  dim = fields.get("projection_dim", 512)
  try:
    if activation != "quick_gelu":
      raise ValueError(f"hidden_act is {activation!r}, expected 'quick_gelu'")
    for name, value in {**tower, "projection_dim": dim}.items():
      valid = config_fields.is_positive_int(value)
      if name == "layer_norm_eps":
        valid = config_fields.is_number(value) and value > 0
      if name in (*_FIELDS, "projection_dim") and not valid:
        raise ValueError(f"{name} is {value!r}, expected a positive number")
    return safety.SafetyConfig(
      **{argument: tower[name] for name, argument in _FIELDS.items()},
      projection_dim=dim,
      concepts=counts[0],
      special=counts[1],
    )
  except (errors.ConfigError, TypeError, ValueError) as e:
    raise errors.CheckpointError(
      f"{label} describes a network that lavit_jax does not implement: {e}."
      " Expected Stable Diffusion's safety checker."
    ) from e
