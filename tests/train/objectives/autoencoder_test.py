"""The autoencoder that is trained from nothing."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models.pixels import vae
from lavit_jax.train import objectives


def _config(**updates):
  module = importlib.import_module("lavit_jax.configs.tiny.autoencoder")
  cfg = module.get_config()
  cfg.data.train_size = cfg.data.held_out_size = 8
  cfg.data.update(updates)
  return cfg


def test_sides_that_it_cannot_halve_are_refused():
  with pytest.raises(errors.ConfigError, match="multiple of 4"):
    objectives.build(_config(image_size=42))


def test_the_scaling_factor_gives_latents_unit_variance():
  """Of running moments: mean 1 and mean square 5 are a spread of 2."""
  objective = objectives.build(_config())
  state = {"mean": jnp.ones(()), "square": jnp.full((), 5.0)}
  ((params, meta),) = objective.export({"encoder": 0}, state).values()
  assert params == {"vae": {"encoder": 0}}
  config = vae.VaeConfig(**meta["vae"])
  np.testing.assert_allclose(config.scaling_factor, 0.5)
  assert objective.part == "lowres_pixels"
