"""One file a stage; `build` picks the one that config.stage names."""

import importlib

from lavit_jax.core import errors

STAGES = {
  "encoder": ("encoder", "EncoderObjective"),
  "tokenizer": ("tokenizer", "TokenizerObjective"),
  "pixels": ("pixels", "PixelsObjective"),
  "autoencoder": ("autoencoder", "AutoencoderObjective"),
  "latents": ("latents", "LatentsObjective"),
  "pretrain": ("pretrain", "PretrainObjective"),
}


def build(config, where=None):
  """The objective of config.stage.

  Args:
    config: see `configs/`.
    where: a `AbstractArtifacts` for an objective of shapes alone.

  Raises:
    errors.ConfigError: no such stage.
  """
  if config.stage not in STAGES:
    raise errors.ConfigError(
      f"config.stage={config.stage!r} is no stage; expected one of"
      f" {sorted(STAGES)}."
    )
  module, name = STAGES[config.stage]
  module = importlib.import_module(f"{__name__}.{module}")
  return getattr(module, name)(config, where)
