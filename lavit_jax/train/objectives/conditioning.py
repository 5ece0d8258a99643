"""From images to what a pixel decoder is told, all of it frozen.

pixels -> features -> kept patches -> words -> reconstructed features.
"""

import jax
import jax.numpy as jnp

from lavit_jax.core import errors, image_io
from lavit_jax.models.tokenizer import selector, tokenizer

SELECTIONS = ("expected", "sampled")


def check(name: str, phase) -> None:
  """Raises ConfigError for a selection of a phase that there is not."""
  if phase["selection"] not in SELECTIONS:
    raise errors.ConfigError(
      f"phases.{name}.selection={phase['selection']!r}: expected one of"
      f" {SELECTIONS}."
    )


def words(model, frozen, image, gumbel=None):
  """The words of images.

  Args:
    model: a `tokenizer.DynamicVisualTokenizer`.
    frozen: {"encoder": params, "tokenizer": {"params", "codebook"}}.
    image: uint8[B, H, W, 3].
    gumbel: float[B, N, 2], noise of the selection, which is sampled as in the
      tokenizer's training; None: the patches of highest p(keep), as many as
      expected.

  Returns:
    (ids int32[B, N], valid bool[B, N]), kept patches first; every image
    keeps at least one.
  """
  variables, config = frozen["tokenizer"], model.config
  features = tokenizer.encode_images(
    config, frozen["encoder"], image_io.normalize(image)
  )
  log_probs = model.apply(variables, features, method="select")
  if gumbel is None:
    keep = selector.expected_count_mask(log_probs)
  else:
    keep = selector.mask_from_noise(log_probs, gumbel) > 0.5
    best = selector.budget_mask(log_probs, 1)
    keep = jnp.where(keep.any(1, keepdims=True), keep, best)
  _, ids, valid = model.apply(
    variables, features, keep.astype(bool), config.num_patches, method="encode"
  )
  return jax.lax.stop_gradient((ids, valid))


def reconstructed_features(model, frozen, image, gumbel=None):
  """What the tokenizer makes of images with a semantic decoder of its own.

  Returns:
    x_rec float[B, N, D]; arguments are those of `words`.
  """
  ids, valid = words(model, frozen, image, gumbel)
  x_rec = model.apply(frozen["tokenizer"], ids, valid, method="decode_codes")
  return jax.lax.stop_gradient(x_rec)


def to_unit(image: jax.Array) -> jax.Array:
  """uint8[B, H, W, 3] as float32 in [-1, 1]."""
  return image.astype(jnp.float32) / 127.5 - 1.0
