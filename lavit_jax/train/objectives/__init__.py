"""The stages of training; `build` picks the one that config.stage names."""

import importlib

import ml_collections

from lavit_jax.core import errors
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import artifacts as artifacts_lib

STAGES = {  # stage: (module, class)
  "encoder": ("encoder", "EncoderObjective"),
  "tokenizer": ("tokenizer", "TokenizerObjective"),
  "pixels": ("pixels", "PixelsObjective"),
  "autoencoder": ("autoencoder", "AutoencoderObjective"),
  "latents": ("latents", "LatentsObjective"),
  "pretrain": ("pretrain", "PretrainObjective"),
}


def build(
  config: ml_collections.ConfigDict,
  artifacts: artifacts_lib.Artifacts | None = None,
) -> base.Objective:
  """Builds the objective of config.stage.

  Args:
    config: see `configs/`.
    artifacts: an `AbstractArtifacts` for an objective of shapes alone; None
      reads data and weights from disk.

  Raises:
    errors.ConfigError: config.stage is unknown.
  """
  if config.stage not in STAGES:
    raise errors.ConfigError(
      f"config.stage={config.stage!r} is unknown; expected one of"
      f" {sorted(STAGES)}."
    )
  module, name = STAGES[config.stage]
  stage = importlib.import_module(f"{__name__}.{module}")
  return getattr(stage, name)(config, artifacts)
