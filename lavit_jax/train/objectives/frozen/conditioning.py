"""From images to the conditions of a pixel decoder, by frozen networks alone.

pixels -> features -> kept patches -> code ids -> reconstructed features.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lavit_jax.core import errors, image_io
from lavit_jax.models.tokenizer import selector, tokenizer

SELECTIONS = ("expected", "sampled")


def check(name: str, selection: str) -> None:
  """Checks a phase's setting `selection`.

  Args:
    name: of the phase.
    selection: its setting.

  Raises:
    errors.ConfigError: it is not one of `SELECTIONS`.
  """
  if selection not in SELECTIONS:
    raise errors.ConfigError(
      f"phases.{name}.selection={selection!r}: expected one of {SELECTIONS}."
    )


def visual_tokens(
  model: tokenizer.DynamicVisualTokenizer,
  frozen: Mapping[str, Any],
  image: jax.Array,
  gumbel: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Tokenizes images; no gradient passes.

  Args:
    model: the tokenizer.
    frozen: {"encoder": params, "tokenizer": {"params", "codebook"}}.
    image: uint8[B, H, W, 3].
    gumbel: float[B, N, 2], noise with which the selection is sampled, as in the
      tokenizer's training; None keeps the patches of highest p(keep), as many
      as expected.

  Returns:
    (ids int32[B, N], valid bool[B, N]), kept patches first. Every image keeps
    at least one.
  """
  variables, config = frozen["tokenizer"], model.config
  apply: Any = model.apply  # Linen types its result as a union
  features = tokenizer.encode_images(
    config, frozen["encoder"], image_io.normalize(image)
  )
  log_probs = apply(variables, features, method="select")
  if gumbel is None:
    keep = selector.expected_count_mask(log_probs)
  else:
    keep = selector.mask_from_noise(log_probs, gumbel) > 0.5
    best = selector.budget_mask(log_probs, 1)
    keep = jnp.where(keep.any(1, keepdims=True), keep, best)
  _, ids, valid = apply(
    variables, features, keep.astype(bool), config.num_patches, method="encode"
  )
  return jax.lax.stop_gradient((ids, valid))


def reconstructed_features(
  model: tokenizer.DynamicVisualTokenizer,
  frozen: Mapping[str, Any],
  image: jax.Array,
  gumbel: jax.Array | None = None,
) -> jax.Array:
  """Reconstructs features x_rec float[B, N, D] of images from their codes.

  The tokenizer must have a semantic decoder. Arguments are those of
  `visual_tokens`; no gradient passes.
  """
  ids, valid = visual_tokens(model, frozen, image, gumbel)
  x_rec: Any = model.apply(
    frozen["tokenizer"], ids, valid, method="decode_codes"
  )
  return jax.lax.stop_gradient(x_rec)


def to_unit(image: jax.Array) -> jax.Array:
  """Maps uint8[B, H, W, 3] to float32 in [-1, 1]."""
  return image.astype(jnp.float32) / 127.5 - 1.0
