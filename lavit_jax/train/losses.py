"""Losses: arrays in, scalars out, everything summed in float32."""

import jax
import jax.numpy as jnp

from lavit_jax.models import layers
from lavit_jax.train import cross_entropy


def next_token_blocked(
  hidden, head, targets, weights, *, block: int = 512, vocab_size: int = 0
):
  """Cross-entropy of `hidden @ head.T` that never holds all the logits.

  The sequence is cut into blocks; the logits of a block live only while its
  own loss and gradient are computed. At full size the whole would be
  L * V = 2048 * 48512 float32, 0.4 GB a row, and several copies of it. Over a
  mesh the vocabulary is split over `tensor`, and each device gathers its rows
  of the head once, not once a block.

  Args:
    hidden: float[B, L, D], after the last norm.
    head: float[V, D], one row an id.
    targets: int[B, L]; any id where the weight is 0.
    weights: float[B, L]; 0 at positions that teach nothing. No gradient.
    block: positions of each row in a block; the last one is padded.
    vocab_size: rows of `head` in use, 0 for all; the rest are no class.

  Returns:
    (sum of weighted nll float32[], nll float32[B, L], 0 where the weight is
    0, without a gradient). For the mean divide by the sum of weights, at
    least 1.
  """
  block = min(block, targets.shape[1])
  used = vocab_size or head.shape[0]
  weights = weights.astype(jnp.float32)
  total, nll = cross_entropy.weighted_nll(
    block, used, hidden, head, targets, weights
  )
  return total, jax.lax.stop_gradient(nll)


def cosine(a, b):
  """Cosine similarity float32[...] of float[..., C]; 0 with a zero vector."""
  a = layers.l2_normalize(a.astype(jnp.float32))
  b = layers.l2_normalize(b.astype(jnp.float32))
  return (a * b).sum(-1)
