"""The pixel decoder around the U-Net."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.diffusion import sampling, schedules, solvers
from lavit_jax.models.pixels import pixel_decoder, unet

CONFIG = pixel_decoder.PixelDecoderConfig(
  image_size=8,
  patch=2,
  num_patches=4,
  feature_dim=6,
  grid_channels=4,
  unet=unet.UNetConfig(
    in_channels=16,
    out_channels=12,
    channels=(8, 16),
    layers_per_block=1,
    attention=(False, True),
    transformer_layers=(1, 1),
    num_heads=(2, 2),
    cross_dim=8,
    groups=4,
    ff_mult=1,
  ),
)
_X = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
_T = jnp.array([5, 50, 500])
_FEATURES = jax.random.normal(jax.random.key(2), (3, 4, 6))
# Quick to compile; these programs are too small for optimizing to pay.
_QUICK = {"xla_backend_optimization_level": 0}
_STEPS = sampling.planned(solvers.Ddim(), schedules.PIXELS, 3)


@pytest.fixture(scope="module")
def model():
  """(decoder, compiled apply, variables) with an output that is not tiny."""
  decoder = pixel_decoder.PixelDecoder(CONFIG)
  init = jax.jit(decoder.init, compiler_options=_QUICK)
  variables = nn.meta.unbox(init(jax.random.key(0), _X, _T, _FEATURES))
  last = variables["params"]["unet"]["conv_out"]
  last["kernel"] = 30.0 * last["kernel"]
  return decoder, jax.jit(decoder.apply, compiler_options=_QUICK), variables


def test_features_change_the_image_where_not_dropped(model):
  _, apply, variables = model
  drop = jnp.array([False, True, False])
  out = apply(variables, _X, _T, _FEATURES, None, drop)
  other = apply(variables, _X, _T, _FEATURES.at[:, 0, 0].add(1.0), None, drop)
  change = jnp.abs(out - other).max((1, 2, 3))
  assert out.shape == (3, 8, 8, 3)
  assert change[1] == 0
  assert change[0] > 1e-3
  assert change[2] > 1e-3


def test_masked_features_change_nothing(model):
  _, apply, variables = model
  mask = jnp.array([[True, True, False, True]] * 3)
  keep = jnp.zeros(3, bool)
  out = apply(variables, _X, _T, _FEATURES, mask, keep)
  hidden = _FEATURES.at[:, 2, 1].add(3.0)
  other = apply(variables, _X, _T, hidden, mask, keep)
  np.testing.assert_allclose(out, other, atol=1e-6)
  seen = _FEATURES.at[:, 1, 1].add(3.0)
  other = apply(variables, _X, _T, seen, mask, keep)
  assert np.abs(out - other).max() > 1e-3


def test_the_grid_lays_features_out_in_raster_order(model):
  """Feature 1 of a 2 x 2 grid enters at the top right quarter alone.

  Looked at behind conv_in, which spreads it by one place to each side.
  """
  decoder, _, variables = model

  def first_map(features):
    _, seen = decoder.apply(
      variables,
      _X,
      _T,
      features,
      capture_intermediates=lambda module, _: module.name == "conv_in",
    )
    return seen["intermediates"]["unet"]["conv_in"]["__call__"][0]

  first_map = jax.jit(first_map, compiler_options=_QUICK)
  other = first_map(_FEATURES.at[:, 1, 0].add(5.0))
  change = jnp.abs(first_map(_FEATURES) - other).max((0, 3))  # [4, 4]
  reached = np.zeros((4, 4), bool)
  reached[:3, 1:] = True
  np.testing.assert_array_equal(np.asarray(change) > 0, reached)


def test_a_sampled_image_depends_on_its_seed_not_on_its_batch(model):
  decoder, _, variables = model
  draw = lambda features, seeds: sampling.draw(
    decoder, schedules.PIXELS, variables, features, seeds, steps=_STEPS
  )
  together = draw(_FEATURES, jnp.array([7, 8, 7]))
  alone = draw(_FEATURES[1:2], jnp.array([8]))
  np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
  assert together.shape == (3, 8, 8, 3)
  assert together.min() >= 0
  assert together.max() <= 1


def test_guidance_of_factor_one_equals_no_guidance(model):
  decoder, _, variables = model
  seeds = jnp.array([7, 8, 7])

  def draw(**kwargs):
    return sampling.draw(
      decoder,
      schedules.PIXELS,
      variables,
      _FEATURES,
      seeds,
      steps=_STEPS,
      **kwargs,
    )

  plain = draw()
  np.testing.assert_allclose(draw(guide=True, guidance=1.0), plain, atol=1e-5)
  assert np.abs(draw(guide=True, guidance=4.0) - plain).max() > 1e-3


def test_a_config_survives_json():
  text = json.dumps(dataclasses.asdict(CONFIG))
  assert pixel_decoder.PixelDecoderConfig(**json.loads(text)) == CONFIG


def test_tiny_stays_within_two_million_parameters():
  decoder = pixel_decoder.PixelDecoder(pixel_decoder.TINY)
  shapes = jax.eval_shape(
    decoder.init,
    jax.random.key(0),
    jnp.zeros((1, 48, 48, 3)),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 36, 96)),
  )
  leaves = jax.tree.leaves(nn.meta.unbox(shapes))
  assert sum(leaf.size for leaf in leaves) <= 2_000_000


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("num_patches", 5, "not a square"),
    ("image_size", 10, "multiple of"),
    ("grid_channels", 2, "unet.in_channels"),
  ],
)
def test_sizes_that_do_not_fit_are_named(field, value, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(CONFIG, **{field: value})
