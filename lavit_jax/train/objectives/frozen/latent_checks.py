"""Checks the config of stage latents before anything is read or compiled."""

import logging
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from lavit_jax.core import agreement, errors
from lavit_jax.core.storage import checkpoints, files
from lavit_jax.diffusion import schedules
from lavit_jax.models.pixels import unet
from lavit_jax.train.objectives.frozen import latent_parts

KINDS = ("lowres", "highres")
_LOG = logging.getLogger(__name__)
# Fields of a noise schedule that sampling alone uses.
_SAMPLING = ("spacing", "steps_offset", "alpha_to_one", "clip")


def check_unet(
  kind: str, config: unet.UNetConfig, sizes: Mapping[str, Any]
) -> None:
  """Checks that a U-Net takes the conditions that the semantic decoder makes.

  Args:
    kind: "lowres" or "highres".
    config: of the U-Net.
    sizes: model.condition; see `latent_parts.read_conditioner`.

  Raises:
    errors.ConfigError: they do not fit.
  """
  details, pooled = config.details, sizes["pooled"]
  added = 0
  if pooled:
    added = pooled + latent_parts.SIZE_NUMBERS * details.added_time_dim
  is_highres, width = kind == "highres", sum(sizes["dims"])
  checks = {
    f"model.kind={kind!r} is none of {KINDS}": kind in KINDS,
    f"lowres has one width, highres two; model.condition.dims is"
    f" {tuple(sizes['dims'])}": len(sizes["dims"]) == 1 + is_highres,
    f"model.condition.pooled={pooled}: only highres has a pooled vector": (
      bool(pooled) == is_highres
    ),
    f"model.unet.cross_dim={config.cross_dim}, but the condition is {width}"
    " wide": config.cross_dim == width,
    f"model.unet.details.added_dim={details.added_dim}, but pooled vector and"
    f" sizes are {added} wide": details.added_dim == added,
  }
  for problem, passes in checks.items():
    if not passes:
      raise errors.ConfigError(f"{problem}. Change config.model to agree.")


def check_start(
  config: ml_collections.ConfigDict,
  net: unet.UNetConfig,
  schedule: schedules.NoiseSchedule,
) -> None:
  """Checks that config.start_from has this run's U-Net.

  Args:
    config: of the run; its `accept` names differences that are intended, such
      as a change to velocities with no signal at the last step (arXiv
      2305.08891).
    net: config of the run's U-Net.
    schedule: of the run. The prediction and the noise levels must be those that
      the stored U-Net was trained with; how it is sampled may differ.

  Raises:
    errors.ConfigError: start_from is not set, or its U-Net is missing or
      another.
  """
  folder, part = config.start_from, f"{config.model.kind}_pixels"
  if folder is None:
    raise errors.ConfigError(
      "start_from is not set. This run starts from Stable Diffusion's weights:"
      f" import them (lavit port import), and give the model directory with"
      f" the part {part} as --config.start_from=DIR. An empty"
      " --config.start_from= trains from nothing."
    )
  if not folder:
    return
  if part not in checkpoints.parts_in(folder):
    raise errors.ConfigError(
      f"start_from={folder} has no part {part}; it has"
      f" {', '.join(checkpoints.parts_in(folder)) or 'none'}. Give the model"
      " directory that Stable Diffusion's U-Net was imported into."
    )
  meta = checkpoints.read_meta(folder, part)
  if meta.get("unet") is None:
    raise errors.ConfigError(
      f"The part {part} of start_from={folder} has an autoencoder, but no"
      " U-Net to start from. Give another, or leave start_from empty and set"
      f" vae_from={folder}."
    )
  what = f"The U-Net of start_from={folder}"
  stored = unet.UNetConfig(**meta["unet"])
  differences = agreement.fields(stored, net, "model.unet.")
  if meta.get("schedule") is not None:
    stored_schedule = schedules.NoiseSchedule(**meta["schedule"])
    differences += _schedule_differences(stored_schedule, schedule)
  else:
    _LOG.warning("%s does not say its noise schedule", what)
  agreement.settle(differences, agreement.accepted(config), what=what)


def _schedule_differences(stored, schedule) -> list[agreement.Difference]:
  """Returns the differences of two schedules that a trained U-Net notices."""
  differences = agreement.fields(stored, schedule, "model.schedule.", _SAMPLING)
  before, now = (schedules.alphas_cumprod(s) for s in (stored, schedule))
  if len(before) == len(now) and np.allclose(before, now, rtol=1e-5):
    # Other fields, but the same noise levels.
    of_prediction = "model.schedule.prediction"
    differences = [d for d in differences if d.name == of_prediction]
  return differences


def check_directories(
  config: ml_collections.ConfigDict, *, has_start: bool
) -> None:
  """Checks that model_dir is not start_from, and that a LoRA has a start.

  Args:
    config: of the run.
    has_start: whether there is a U-Net to start from.

  Raises:
    errors.ConfigError: model_dir is start_from, or a LoRA has no U-Net to
      change or no alpha.
  """
  if files.same(config.start_from, config.model_dir):
    raise errors.ConfigError(
      f"start_from and model_dir are both {config.model_dir}: the result would"
      " overwrite the weights it starts from. Give another model_dir with"
      " encoder, tokenizer and semantic decoder."
    )
  low = config.model.lora
  if low.rank and (low.alpha <= 0 or not has_start):
    raise errors.ConfigError(
      f"model.lora={low.to_dict()} changes a trained U-Net: it needs an"
      " alpha above 0, and start_from, that U-Net's model directory. Set"
      " model.lora.rank=0 to train all weights."
    )
