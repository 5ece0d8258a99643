"""Losses with all logits at once, which others are held to."""

import jax
import jax.numpy as jnp

from lavit_jax.train import cross_entropy


def next_token(hidden, head, targets, weights, *, vocab_size: int = 0):
  """Cross-entropy of all positions.

  Arguments and results are those of `losses.next_token_blocked`.
  """
  weights = weights.astype(jnp.float32)
  logits = jnp.einsum(
    "bld,vd->blv",
    hidden,
    head.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  used = jnp.arange(head.shape[0]) < (vocab_size or head.shape[0])
  scores = jax.nn.log_softmax(jnp.where(used, logits, cross_entropy.NO_CLASS))
  nll = -jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
  nll = jnp.where(weights != 0, nll, 0.0)
  return (nll * weights).sum(), nll
