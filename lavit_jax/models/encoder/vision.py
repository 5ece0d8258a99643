"""EVA-CLIP's vision transformer, the frozen encoder of LaVIT.

Fang et al., arXiv 2211.07636; Sun et al., arXiv 2303.15389. LaVIT takes the
output of the last block, without the final norm and without the CLS token.
"""

import dataclasses
import functools
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import blocks, layers

_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """Sizes of an encoder.

  Attributes:
    image_size: height and width of the image, a multiple of patch_size.
    patch_size: P, height and width of a patch.
    width: D, of the features.
    depth: number of blocks.
    num_heads: H.
    mlp_dim: hidden width of the MLPs.
    head_dim_out: width of EVA's `head`, which LaVIT does not use; 0: none,
      and no final norm either.
    mask_token: whether there is a learned embedding for hidden patches.
    position_std: standard deviation of the initial position embedding. After
      a short training from scratch, features tell their positions only if it
      starts large, and merger and decoder know positions from features alone.
    dtype: of the computation; parameters and norms are float32.
    remat: name of a policy in `layers.REMAT`.
    unroll: blocks per scan step; more run faster and compile slower.
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  head_dim_out: int = 0
  mask_token: bool = False
  position_std: float = 0.02
  dtype: str = "float32"
  remat: str = "none"
  unroll: int = 1

  def __post_init__(self):
    if self.image_size % self.patch_size:
      raise errors.ConfigError(
        f"image_size={self.image_size} is not a multiple of"
        f" patch_size={self.patch_size}: patches must tile the image."
        " Change vit.image_size or vit.patch_size."
      )
    if self.width % self.num_heads:
      raise errors.ConfigError(
        f"vit.width={self.width} is not a multiple of"
        f" num_heads={self.num_heads}: heads must be equal in size."
        " Change vit.width or vit.num_heads."
      )

  @property
  def num_patches(self) -> int:
    """Returns N, the number of patches of an image."""
    return (self.image_size // self.patch_size) ** 2


EVA_VIT_G14 = ViTConfig(
  image_size=224,
  patch_size=14,
  width=1408,
  depth=40,
  num_heads=16,
  mlp_dim=6144,  # int(1408 * 4.3637)
  head_dim_out=1024,
  dtype="bfloat16",
  remat="full",
)
TINY = ViTConfig(
  image_size=48,
  patch_size=8,
  width=96,
  depth=3,
  num_heads=4,
  mlp_dim=384,
  mask_token=True,
)


class Block(nn.Module):
  """Pre-norm attention and MLP."""

  config: ViTConfig
  return_output: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, _: None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Maps float[B, L, D] to (float[B, L, D], the same or None)."""
    c = self.config
    norm = functools.partial(layers.LayerNorm, _NORM_EPS, c.dtype)
    attention = blocks.SelfAttention(
      c.num_heads, key_bias=False, dtype=c.dtype, name="attn"
    )
    x = x + attention(norm(name="norm1")(x))
    x = x + layers.Mlp(c.mlp_dim, c.dtype, name="mlp")(norm(name="norm2")(x))
    x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_embed"))
    return x, (x if self.return_output else None)


class EvaVit(nn.Module):
  """Maps pixels to features of patches."""

  config: ViTConfig

  @nn.compact
  def __call__(
    self,
    pixels: jax.Array,
    *,
    with_cls: bool = False,
    return_layers: bool = False,
    patch_mask: jax.Array | None = None,
    use_head: bool = False,
  ) -> Any:
    """Computes the features of the last block, without a norm.

    Args:
      pixels: float[B, H, W, 3], CLIP-normalised.
      with_cls: keep the CLS token, which comes first.
      return_layers: return the output of every block as well.
      patch_mask: bool[B, N]; True replaces the patch by the learned mask
        token (`config.mask_token`).
      use_head: return EVA's own output instead: norm and `head` on the CLS
        token (`config.head_dim_out`).

    Returns:
      float[B, N, D], or [B, 1 + N, D] with the CLS token, or float[B, head].
      With `return_layers`, the pair of that and float[depth, B, 1 + N, D].

    Raises:
      ValueError: pixels of another size, or a head or mask token that the
        encoder does not have.
    """
    c = self.config
    if use_head and not c.head_dim_out:
      raise ValueError(
        "use_head=True needs an encoder with EVA's norm and head, but this one"
        " has vit.head_dim_out=0. Use an encoder that was imported with its"
        " head."
      )
    x = self._embed(pixels, patch_mask)
    scan = layers.stack(self, Block, c.depth, c.remat, c.unroll)
    x, outputs = scan(c, return_layers, name="blocks")(x, None)
    if c.head_dim_out and (use_head or self.is_initializing()):
      normed = layers.LayerNorm(_NORM_EPS, c.dtype, name="norm")(x)
      axes = ("embed", "classes")
      head = layers.dense(c.head_dim_out, axes, dtype=c.dtype, name="head")
      logits = head(normed[:, 0])
    if use_head:
      return logits
    x = x if with_cls else x[:, 1:]
    return (x, outputs) if return_layers else x

  def _embed(self, pixels, patch_mask):
    """Maps pixels float[B, H, W, 3] to tokens float[B, 1 + N, D]."""
    c = self.config
    size = (c.image_size, c.image_size, 3)
    if pixels.shape[1:] != size:
      raise ValueError(
        f"pixels have shape {pixels.shape}, but the encoder takes [B, *{size}]:"
        " resize the image (lavit_jax.core.image_io.to_uint8 does); of a run"
        f" set config.data.image_size={c.image_size}."
      )
    boxed, small = layers.partitioned, nn.initializers.normal(0.02)
    axes = ("patch", "embed")
    embed = layers.dense(c.width, axes, dtype=c.dtype, name="patch_embed")
    x = embed(patchify(pixels, c.patch_size))  # [B, N, D]
    token = boxed(small, (None, "position", "embed"))
    if c.mask_token:
      hidden = self.param("mask_token", token, (1, 1, c.width))
      if patch_mask is not None:
        x = jnp.where(patch_mask[..., None], hidden.astype(x.dtype), x)
    elif patch_mask is not None:
      raise ValueError("patch_mask needs a model with vit.mask_token=True.")
    cls = self.param("cls_token", token, (1, 1, c.width)).astype(x.dtype)
    cls = jnp.broadcast_to(cls, (x.shape[0], 1, c.width))
    x = jnp.concatenate([cls, x], axis=1)
    positions = boxed(
      nn.initializers.normal(c.position_std), (None, "position", "embed")
    )
    shape = (1, 1 + c.num_patches, c.width)
    return x + self.param("pos_embed", positions, shape).astype(x.dtype)


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
  """Maps float[B, H, W, C] to patches float[B, N, P*P*C] in raster order."""
  patches = layers.space_to_depth(pixels, patch_size)
  return einops.rearrange(patches, "b h w c -> b (h w) c")
