"""The token selector: which patches of an image become visual tokens.

LaVIT, arXiv 2309.04669, section 3.1: a small network predicts pi in R^{N x 2}
(index 0: keep), and Gumbel-Softmax turns it into a differentiable mask. The
other masks below are not differentiable.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import activations, layers

KEEP = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectorConfig:
  """Sizes of the selector.

  Attributes:
    width: D, of the features; a multiple of 4.
    dtype: of the computation; parameters and norms are float32.
  """

  width: int
  dtype: str = "float32"

  def __post_init__(self):
    if self.width % 4:
      raise errors.ConfigError(
        f"selector.width={self.width} is not a multiple of 4: the selector's"
        " layers are D, D/2 and D/4 wide. Change the encoder's width."
      )


class TokenSelector(nn.Module):
  """Predicts log p(keep), log p(drop) from local and global features."""

  config: SelectorConfig

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps float[B, N, D] to log probabilities float32[B, N, 2]: keep, drop."""
    c = self.config
    linear = functools.partial(layers.dense, dtype=c.dtype)
    x = layers.LayerNorm(1e-5, c.dtype, name="norm")(features)
    x = activations.gelu(linear(c.width, ("embed", "mlp"), name="in_proj")(x))
    local, pooled = jnp.split(x, 2, axis=-1)  # [B, N, D/2] each
    pooled = pooled.mean(1, keepdims=True)
    x = jnp.concatenate([local, jnp.broadcast_to(pooled, local.shape)], -1)
    x = activations.gelu(linear(c.width // 2, ("embed", "mlp"), name="fc1")(x))
    x = activations.gelu(linear(c.width // 4, ("mlp", None), name="fc2")(x))
    logits = linear(2, (None, "classes"), name="fc3")(x)
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def gumbel(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws the noise float32[B, N, 2] of `mask_from_noise`; shape is (B, N)."""
  return jax.random.gumbel(rng, (*shape, 2))


def mask_from_noise(
  log_probs: jax.Array, gumbel: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """Samples a mask by Gumbel-Softmax, hard with straight-through gradients.

  Args:
    log_probs: float[B, N, 2].
    gumbel: float[B, N, 2], Gumbel noise, -log of Exp(1).
    temperature: of the softmax whose gradient is used.

  Returns:
    float[B, N], exactly 0 or 1.
  """
  margin = log_probs + gumbel
  margin = margin[..., KEEP] - margin[..., 1 - KEEP]
  soft = jax.nn.sigmoid(margin / temperature)  # a softmax over two
  hard = (margin >= 0).astype(soft.dtype)
  # (hard - soft) + soft may round to 1 - 2^-24; this order never does.
  return hard + (soft - jax.lax.stop_gradient(soft))


def expected_count(log_probs: jax.Array) -> jax.Array:
  """Returns int32[B], the expected number of kept patches.

  It is clip(round(sum p(keep)), 1, N) for log probabilities [B, N, 2].
  """
  total = jnp.exp(log_probs[..., KEEP]).sum(-1)
  count = jnp.round(total).astype(jnp.int32)
  return jnp.clip(count, 1, log_probs.shape[1])


def expected_count_mask(log_probs: jax.Array) -> jax.Array:
  """Returns bool[B, N], the `expected_count` patches of highest p(keep)."""
  return budget_mask(log_probs, expected_count(log_probs))


def budget_mask(log_probs: jax.Array, k: jax.Array | int) -> jax.Array:
  """Returns bool[B, N], the k patches of highest p(keep).

  Of equal patches the earlier in raster order is kept.

  Args:
    log_probs: float[B, N, 2].
    k: int[B] or one int.
  """
  # Logits, not probabilities, which are equal where p rounds to 1.
  score = log_probs[..., KEEP] - log_probs[..., 1 - KEEP]
  return _highest(score, k)


def random_mask(
  rng: jax.Array, shape: tuple[int, int], keep_share: jax.Array | float
) -> jax.Array:
  """Returns bool[B, N]: round(keep_share * N) random patches, at least one.

  Args:
    rng: a key.
    shape: (B, N).
    keep_share: float[B] or one float, in 0 ... 1.
  """
  count = jnp.round(jnp.asarray(keep_share) * shape[1]).astype(jnp.int32)
  count = jnp.clip(count, 1, shape[1])
  return _highest(jax.random.uniform(rng, shape), count)


def _highest(score, k):
  """Returns bool[B, N], the k[B] highest per row; stable in raster order."""
  order = jnp.argsort(-score, axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return rank < jnp.broadcast_to(jnp.asarray(k), score.shape[:1])[:, None]
