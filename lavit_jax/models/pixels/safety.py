"""Stable Diffusion's safety checker: compares CLIP embeddings with concepts.

The vision tower is CLIP's (Radford et al., arXiv 2103.00020); names are those
of diffusers' `StableDiffusionSafetyChecker`. The concepts are published as
vectors only, without the words behind them.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import blocks, layers
from lavit_jax.models.encoder import vision

_ADJUSTMENT = 0.01  # added to later scores once a special concept is found
_ROUNDING = 1000.0  # scores are rounded to 3 digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyConfig:
  """Sizes of the vision tower, and the number of concepts.

  Attributes:
    image_size: S, height and width of the image.
    patch_size: height and width of a patch.
    width: D, of the vision tower.
    depth: number of blocks.
    num_heads: H.
    mlp_dim: hidden width of the MLPs.
    projection_dim: width in which images and concepts are compared.
    concepts: number of concepts for which an image is withheld.
    special: number of concepts that only make the others stricter.
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
        f"Safety checker: image_size={self.image_size} must be a multiple of"
        f" patch_size={self.patch_size}, and width={self.width} of"
        f" num_heads={self.num_heads}."
      )

  @property
  def num_patches(self) -> int:
    """Returns the number of patches of an image."""
    return (self.image_size // self.patch_size) ** 2


class Block(nn.Module):
  """Pre-norm attention and MLP with CLIP's quick GELU."""

  config: SafetyConfig

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Maps float[B, L, D] to (float[B, L, D], None)."""
    c = self.config
    norm = functools.partial(layers.LayerNorm, c.norm_eps)
    y = norm(name="layer_norm1")(x)
    x = x + blocks.CrossAttention(c.num_heads, name="self_attn")(y, y)
    y = norm(name="layer_norm2")(x)
    y = layers.dense(c.mlp_dim, ("embed", "mlp"), name="fc1")(y)
    y = y * nn.sigmoid(1.702 * y)
    return x + layers.dense(c.width, ("mlp", "embed"), name="fc2")(y), None


class SafetyChecker(nn.Module):
  """Maps images to scores of concepts."""

  config: SafetyConfig

  @nn.compact
  def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes cosines with all concepts, minus their thresholds.

    Args:
      pixels: float[B, S, S, 3], CLIP-normalised.

    Returns:
      (float32[B, concepts], float32[B, special]).
    """
    embedding = _unit(self._embed(pixels))
    return (
      self._scores(embedding, "concept_embeds", self.config.concepts),
      self._scores(embedding, "special_care_embeds", self.config.special),
    )

  def _scores(self, embedding, name, count):
    """Returns float32[B, count]."""
    shape = (count, self.config.projection_dim)
    vectors = self._param(name, (None, None), shape)
    thresholds = self._param(f"{name}_weights", (None,), shape[:1])
    return embedding @ _unit(vectors).T - thresholds

  def _param(self, name, axes, shape):
    init = layers.partitioned(nn.initializers.normal(0.02), axes)
    return self.param(name, init, shape)

  def _embed(self, pixels):
    """Maps pixels to CLIP's embedding, float32[B, projection_dim]."""
    c = self.config
    embed = layers.dense(
      c.width, ("patch", "embed"), use_bias=False, name="patch_embed"
    )
    x = embed(vision.patchify(pixels, c.patch_size))
    cls = self._param("class_embedding", ("embed",), (c.width,))
    cls = jnp.broadcast_to(cls, (len(x), 1, c.width))
    x = jnp.concatenate([cls, x], axis=1)
    shape = (1 + c.num_patches, c.width)
    x = x + self._param("pos_embed", ("position", "embed"), shape)
    x = layers.LayerNorm(c.norm_eps, name="pre_norm")(x)
    scan = layers.stack(self, Block, c.depth, "none")
    x, _ = scan(c, name="blocks")(x, None)
    x = layers.LayerNorm(c.norm_eps, name="post_norm")(x[:, 0])
    project = layers.dense(
      c.projection_dim, ("embed", None), use_bias=False, name="projection"
    )
    return project(x)


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def withheld(concepts: jax.Array, special: jax.Array) -> jax.Array:
  """Returns bool[B], True for images that must not be shown.

  Args:
    concepts: float32[B, C] of `SafetyChecker`.
    special: float32[B, S], likewise; one above 0 adds 0.01 to all scores
      after it.
  """
  adjustment = jnp.zeros(special.shape[0])
  for i in range(special.shape[1]):
    found = _is_positive(special[:, i] + adjustment)
    adjustment = jnp.where(found, _ADJUSTMENT, adjustment)
  return _is_positive(concepts + adjustment[:, None]).any(axis=1)


def _is_positive(score):
  """Returns whether a score, rounded to 3 digits, is above 0."""
  return jnp.round(score * _ROUNDING) > 0
