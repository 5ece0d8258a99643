"""Losses: arrays in, scalars out, everything summed in float32."""

import jax
import jax.numpy as jnp

from lavit_jax.models import layers

_NO_CLASS = -1e9  # the logit of a padding row: exp underflows to 0


def next_token(hidden, head, targets, weights, *, vocab_size: int = 0):
  """Cross-entropy with all logits at once; tests hold the blocked form to it.

  Arguments and results are those of `next_token_blocked`.
  """
  weights = weights.astype(jnp.float32)
  nll = _nll(hidden, head, targets, vocab_size or head.shape[0])
  nll = jnp.where(weights != 0, nll, 0.0)
  return (nll * weights).sum(), nll


def next_token_blocked(
  hidden, head, targets, weights, *, block: int = 128, vocab_size: int = 0
):
  """Cross-entropy of `hidden @ head.T` that never holds all the logits.

  The sequence is cut into blocks; the logits of a block live only while its
  own loss, or its gradient, is computed. At full size the whole would be
  L * V = 2048 * 48512 float32, 0.4 GB a row, and several copies of it.

  Args:
    hidden: float[B, L, D], after the last norm.
    head: float[V, D], one row an id.
    targets: int[B, L]; any id where the weight is 0.
    weights: float[B, L]; 0 at positions that teach nothing.
    block: positions of each row in a block; the last one is padded.
    vocab_size: rows of `head` in use, 0 for all; the rest are no class.

  Returns:
    (sum of weighted nll float32[], nll float32[B, L], 0 where the weight is
    0). For the mean divide by the sum of weights, at least 1.
  """
  batch, length = targets.shape
  block = min(block, length)
  count = -(-length // block)
  vocab_size = vocab_size or head.shape[0]

  def split(x):  # [B, L, ...] -> [count, B, block, ...]
    pad = [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad)
    return x.reshape(batch, count, block, *x.shape[2:]).swapaxes(0, 1)

  def step(total, xs):
    hidden, targets, weights = xs
    nll = _nll(hidden, head, targets, vocab_size)
    nll = jnp.where(weights != 0, nll, 0.0)
    return total + (nll * weights).sum(), nll

  xs = (split(hidden), split(targets), split(weights.astype(jnp.float32)))
  step = jax.checkpoint(step, prevent_cse=False)
  total, nll = jax.lax.scan(step, jnp.zeros((), jnp.float32), xs)
  return total, nll.swapaxes(0, 1).reshape(batch, -1)[:, :length]


def _nll(hidden, head, targets, vocab_size):
  """Nll float32[B, L] of float[B, L, D] against a head float[V, D]."""
  shape = targets.shape
  hidden = hidden.reshape(-1, hidden.shape[-1])  # [B * L, D]: see models/dots
  targets = targets.reshape(-1)
  logits = jnp.einsum(
    "nd,vd->nv",
    hidden,
    head.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  ids = jnp.arange(head.shape[0])
  if vocab_size < head.shape[0]:
    logits = jnp.where(ids < vocab_size, logits, _NO_CLASS)
  # A masked sum, not a gather: it fuses, and it shards over the vocabulary.
  chosen = jnp.where(ids == targets[..., None], logits, 0.0).sum(-1)
  nll = jax.nn.logsumexp(logits, axis=-1) - chosen
  return nll.reshape(shape)


def cosine(a, b):
  """Cosine similarity float32[...] of float[..., C]; 0 with a zero vector."""
  a = layers.l2_normalize(a.astype(jnp.float32))
  b = layers.l2_normalize(b.astype(jnp.float32))
  return (a * b).sum(-1)
