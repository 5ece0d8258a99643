"""The token selector: which patches of an image become words.

LaVIT, arXiv 2309.04669, section 3.1: a small network gives pi in R^{N x 2}
(index 0: keep), Gumbel-Softmax makes a mask of it that gradient passes
through. The other ways to a mask below need no training.
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
  """Width D of the features, a multiple of 4, and the compute dtype."""

  width: int
  dtype: str = "float32"

  def __post_init__(self):
    if self.width % 4:
      raise errors.ConfigError(
        f"selector.width={self.width} is not a multiple of 4: its layers are"
        " D, D/2 and D/4 wide. Change the encoder's width."
      )


class TokenSelector(nn.Module):
  """Local and global features of each patch to log p(keep), log p(drop)."""

  config: SelectorConfig

  @nn.compact
  def __call__(self, features: jax.Array, policy: jax.Array | None = None):
    """Log probabilities of each patch.

    Args:
      features: float[B, N, D].
      policy: float[B, N], weights of the patches in the global average; all
        ones by default.

    Returns:
      float32[B, N, 2], log-softmax, index 0 is keep.
    """
    c = self.config
    linear = functools.partial(layers.dense, dtype=c.dtype)
    x = layers.LayerNorm(1e-5, c.dtype, name="norm")(features)
    x = activations.gelu(linear(c.width, ("embed", "mlp"), name="in_proj")(x))
    local, globe = jnp.split(x, 2, axis=-1)  # [B, N, D/2] each
    if policy is None:
      globe = globe.mean(1, keepdims=True)
    else:
      weights = policy[..., None].astype(x.dtype)
      globe = (globe * weights).sum(1, keepdims=True)
      globe = globe / jnp.maximum(weights.sum(1, keepdims=True), 1e-6)
    x = jnp.concatenate([local, jnp.broadcast_to(globe, local.shape)], -1)
    x = activations.gelu(linear(c.width // 2, ("embed", "mlp"), name="fc1")(x))
    x = activations.gelu(linear(c.width // 4, ("mlp", None), name="fc2")(x))
    logits = linear(2, (None, "classes"), name="fc3")(x)
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def gumbel(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Noise float32[B, N, 2] of `mask_from_noise`, for a shape (B, N)."""
  return jax.random.gumbel(rng, (*shape, 2))


def mask_from_noise(
  log_probs: jax.Array, gumbel: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """The mask that given noise makes (hard Gumbel-Softmax, straight-through).

  Args:
    log_probs: float[B, N, 2].
    gumbel: float[B, N, 2], -log(Exp(1)) noise.
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
  """int32[B]: clip(round(sum p(keep)), 1, N), the tokens an image is worth."""
  total = jnp.exp(log_probs[..., KEEP]).sum(-1)
  count = jnp.round(total).astype(jnp.int32)
  return jnp.clip(count, 1, log_probs.shape[1])


def expected_count_mask(log_probs: jax.Array) -> jax.Array:
  """bool[B, N]: the `expected_count` patches of highest p(keep)."""
  return budget_mask(log_probs, expected_count(log_probs))


def budget_mask(log_probs: jax.Array, k: jax.Array | int) -> jax.Array:
  """bool[B, N]: the k patches of highest p(keep), k int[B] or one int.

  Of equal patches the earlier in raster order is kept.
  """
  # Logits, not probabilities: these tie where p rounds to 1.
  score = log_probs[..., KEEP] - log_probs[..., 1 - KEEP]
  return _highest(score, k)


def random_mask(
  rng: jax.Array, shape: tuple[int, int], keep_share: jax.Array | float
) -> jax.Array:
  """bool[B, N]: round(keep_share * N) random patches of each, at least one.

  Args:
    rng: a key.
    shape: (B, N).
    keep_share: float[B] or one float, in 0 ... 1.
  """
  count = jnp.round(jnp.asarray(keep_share) * shape[1]).astype(jnp.int32)
  count = jnp.clip(count, 1, shape[1])
  return _highest(jax.random.uniform(rng, shape), count)


def _highest(score, k):
  """bool[B, N]: the k[B] highest of each row; stable in raster order."""
  order = jnp.argsort(-score, axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)  # the place of each patch in the order
  return rank < jnp.broadcast_to(jnp.asarray(k), score.shape[:1])[:, None]
