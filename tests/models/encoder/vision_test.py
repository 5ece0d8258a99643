import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models.encoder import vision
from tests.golden import load

CONFIG = vision.ViTConfig(
  image_size=8,
  patch_size=4,
  width=8,
  depth=2,
  num_heads=2,
  mlp_dim=16,
  mask_token=True,
)


def jitted(model):
  names = ("with_cls", "return_layers", "use_head")
  return jax.jit(model.apply, static_argnames=names)


@functools.cache
def build():
  """Apply, variables and pixels float[2, 8, 8, 3] of a small encoder."""
  model = vision.EvaVit(CONFIG)
  pixels = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), pixels))
  return jitted(model), variables, pixels


def test_encoder_matches_the_official_one():
  golden = load.arrays("encoder")
  apply = jitted(vision.EvaVit(load.model_config().vit))
  variables = {"params": load.variables("encoder")}
  pixels = load.pixels(golden["in_pixels"])
  features, outputs = apply(
    variables, pixels, with_cls=True, return_layers=True
  )
  assert load.error(features, golden["out_features"]) <= 1e-5
  assert load.error(outputs[0], golden["out_layer_0"]) <= 1e-5
  assert load.error(outputs[1], golden["out_layer_1"]) <= 1e-5
  head = apply(variables, pixels, use_head=True)
  assert load.error(head, golden["out_head"]) <= 1e-5


def test_features_are_the_patches_without_cls():
  apply, variables, pixels = build()
  both = apply(variables, pixels, with_cls=True)
  assert both.shape == (2, 5, 8)
  np.testing.assert_array_equal(apply(variables, pixels), both[:, 1:])


def test_a_hidden_patch_cannot_be_seen():
  apply, variables, pixels = build()
  hidden = jnp.zeros((2, 4), bool).at[:, 3].set(True)

  def see(pixels):
    return apply(variables, pixels, patch_mask=hidden).sum()

  gradient = jax.grad(see)(pixels)
  assert float(jnp.abs(gradient[:, 4:, 4:]).max()) == 0.0  # patch 3 of 2 x 2
  assert float(jnp.abs(gradient[:, :4, :4]).max()) > 0.0


def test_hiding_patches_needs_a_mask_token():
  _, variables, pixels = build()
  model = vision.EvaVit(dataclasses.replace(CONFIG, mask_token=False))
  with pytest.raises(ValueError, match="mask_token=True"):
    model.apply(variables, pixels, patch_mask=jnp.ones((2, 4), bool))


@pytest.mark.parametrize("change", [{"remat": "full"}, {"unroll": 2}])
def test_remat_and_unroll_change_no_number(change):
  apply, variables, pixels = build()
  other = vision.EvaVit(dataclasses.replace(CONFIG, **change))

  def gradient(apply):
    def loss(variables):
      return jnp.square(apply(variables, pixels)).mean()

    return jax.jit(jax.grad(loss))(variables)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    gradient(apply),
    gradient(other.apply),
  )


def test_images_of_another_size_are_refused():
  apply, variables, _ = build()
  with pytest.raises(ValueError, match=r"\(1, 9, 8, 3\).*resize"):
    apply(variables, jnp.zeros((1, 9, 8, 3)))


@pytest.mark.parametrize(
  ("change", "words"),
  [({"image_size": 9}, "patch_size"), ({"width": 9}, "num_heads")],
)
def test_sizes_that_do_not_divide_are_refused(change, words):
  with pytest.raises(errors.ConfigError, match=words):
    dataclasses.replace(CONFIG, **change)


def test_patches_are_in_raster_order():
  pixels = jnp.arange(16).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(
    vision.patchify(pixels, 2)[0],
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
  )


def test_the_head_of_an_encoder_without_one_is_refused():
  model, pixels = vision.EvaVit(CONFIG), jnp.zeros((1, 8, 8, 3))
  init = lambda key: model.init(key, pixels, use_head=True)
  with pytest.raises(ValueError, match=r"use_head=True.*head_dim_out=0"):
    jax.eval_shape(init, jax.random.key(0))
