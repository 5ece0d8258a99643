"""Stable Diffusion's safety checker: CLIP, and concepts it must not be near.

The vision tower is CLIP's (Radford et al., arXiv 2103.00020); names are those
of diffusers' `StableDiffusionSafetyChecker`. The concepts are vectors only:
what they stand for was never published.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import blocks, layers
from lavit_jax.models.encoder import vision

_EXTRA = 0.01  # by which one special concept tightens all that follow
_STEP = 1000.0  # scores are rounded to 3 digits before they count


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyConfig:
  """Sizes of the vision tower, and the number of concepts.

  Attributes:
    projection_dim: width in which images and concepts are compared.
    concepts: concepts that withhold an image.
    special: concepts that only make the others stricter.
    norm_eps: of every LayerNorm.
  """

  image_size: int = 224
  patch_size: int = 14
  width: int = 1024
  depth: int = 24
  num_heads: int = 16
  mlp_dim: int = 4096
  projection_dim: int = 768
  concepts: int = 17
  special: int = 3
  norm_eps: float = 1e-5

  def __post_init__(self):
    if self.image_size % self.patch_size or self.width % self.num_heads:
      raise errors.ConfigError(
        f"safety checker: image_size={self.image_size} must be a multiple of"
        f" patch_size={self.patch_size}, and width={self.width} of"
        f" num_heads={self.num_heads}."
      )

  @property
  def num_patches(self) -> int:
    """Patches of an image."""
    return (self.image_size // self.patch_size) ** 2


class Block(nn.Module):
  """Pre-norm attention and MLP with CLIP's quick GELU."""

  config: SafetyConfig

  @nn.compact
  def __call__(self, x, _):
    """float[B, L, D] -> (float[B, L, D], None)."""
    c = self.config
    norm = functools.partial(layers.LayerNorm, c.norm_eps)
    y = norm(name="layer_norm1")(x)
    x = x + blocks.CrossAttention(c.num_heads, name="self_attn")(y, y)
    y = norm(name="layer_norm2")(x)
    y = layers.dense(c.mlp_dim, ("embed", "mlp"), name="fc1")(y)
    y = y * nn.sigmoid(1.702 * y)
    return x + layers.dense(c.width, ("mlp", "embed"), name="fc2")(y), None


class SafetyChecker(nn.Module):
  """Images to scores of concepts."""

  config: SafetyConfig

  @nn.compact
  def __call__(self, pixels: jax.Array):
    """Cosines with all concepts, less their thresholds.

    Args:
      pixels: float[B, S, S, 3], CLIP-normalised.

    Returns:
      (float32[B, concepts], float32[B, special]).
    """
    c = self.config
    embedding = self._embed(pixels)
    embedding = _unit(embedding)
    scores = []
    for name, count in (
      ("concept_embeds", c.concepts),
      ("special_care_embeds", c.special),
    ):
      shape = (count, c.projection_dim)
      vectors = self._param(name, (None, None), shape)
      limits = self._param(f"{name}_weights", (None,), shape[:1])
      scores.append(embedding @ _unit(vectors).T - limits)
    return tuple(scores)

  def _param(self, name, axes, shape):
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
    return self.param(name, init, shape)

  def _embed(self, pixels):
    """float32[B, projection_dim]."""
    c = self.config
    axes = ("patch", "embed")
    x = layers.dense(c.width, axes, use_bias=False, name="patch_embed")(
      vision.patchify(pixels, c.patch_size)
    )
    cls = self._param("class_embedding", ("embed",), (c.width,))
    cls = jnp.broadcast_to(cls, (len(x), 1, c.width))
    x = jnp.concatenate([cls, x], axis=1)
    shape = (1 + c.num_patches, c.width)
    x = x + self._param("pos_embed", ("position", "embed"), shape)
    x = layers.LayerNorm(c.norm_eps, name="pre_norm")(x)
    scan = layers.stack(Block, c.depth, "none")
    x, _ = scan(c, name="blocks")(x, None)
    x = layers.LayerNorm(c.norm_eps, name="post_norm")(x[:, 0])
    axes = ("embed", None)
    return layers.dense(
      c.projection_dim, axes, use_bias=False, name="projection"
    )(x)


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def withheld(concepts: jax.Array, special: jax.Array) -> jax.Array:
  """Which images are not to be shown, bool[B].

  Args:
    concepts: float32[B, C] of `SafetyChecker`.
    special: float32[B, S], likewise; one above 0 adds 0.01 to all scores
      after it.
  """
  extra = jnp.zeros(special.shape[0])
  for i in range(special.shape[1]):
    extra = jnp.where(_counts(special[:, i] + extra), _EXTRA, extra)
  return _counts(concepts + extra[:, None]).any(axis=1)


def _counts(score):
  """Whether a score, rounded to 3 digits, is above 0."""
  return jnp.round(score * _STEP) > 0
