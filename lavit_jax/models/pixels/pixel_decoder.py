"""The pixel-space decoder: a U-Net conditioned on reconstructed features.

LaVIT (arXiv 2309.04669, section 3.2) conditions Stable Diffusion's U-Net on the
N reconstructed features. Here the U-Net denoises a small image, not latents:
`patch` x `patch` pixels become the channels of one position.
"""

import dataclasses
import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import activations, layers
from lavit_jax.models.pixels import unet


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig:
  """Sizes of the pixel decoder.

  Attributes:
    image_size: height and width of the image, in pixels.
    patch: height and width, in pixels, of a position of the U-Net.
    num_patches: N, a square number: the features form a square grid.
    feature_dim: D, the width of the reconstructed features.
    grid_channels: input channels for the features, upsampled from their grid;
      0: features enter by cross-attention only.
    unet: the U-Net; its in_channels and out_channels follow from the others.
  """

  image_size: int
  patch: int
  num_patches: int
  feature_dim: int
  grid_channels: int
  unet: unet.UNetConfig

  def __post_init__(self):
    if not isinstance(self.unet, unet.UNetConfig):
      object.__setattr__(self, "unet", unet.UNetConfig(**self.unet))
    side, levels = math.isqrt(self.num_patches), len(self.unet.channels)
    if side * side != self.num_patches:
      raise errors.ConfigError(
        f"num_patches={self.num_patches} is not a square: the features must"
        " form a square grid. Change model.num_patches."
      )
    unit = self.patch * 2 ** (levels - 1)
    if self.image_size % unit or (self.image_size // self.patch) % side:
      raise errors.ConfigError(
        f"image_size={self.image_size} must be a multiple of patch *"
        f" 2**(levels - 1) = {unit}, and image_size / patch a multiple of"
        f" {side}, the features per side. Change model.image_size or"
        " model.patch."
      )
    pixels = 3 * self.patch**2
    channels = (self.unet.in_channels, self.unet.out_channels)
    expected = (pixels + self.grid_channels, pixels)
    if channels != expected:
      raise errors.ConfigError(
        f"unet.in_channels and unet.out_channels are {channels}, but patch="
        f"{self.patch} and grid_channels={self.grid_channels} need {expected}."
      )


TINY = PixelDecoderConfig(
  image_size=48,
  patch=4,
  num_patches=36,
  feature_dim=96,
  grid_channels=48,
  unet=unet.UNetConfig(
    in_channels=96,
    out_channels=48,
    channels=(64, 80),
    layers_per_block=1,
    attention=(False, True),
    transformer_layers=(1, 1),
    num_heads=(4, 4),
    cross_dim=64,
    groups=8,
    ff_mult=2,
  ),
)


class PixelDecoder(nn.Module):
  """U-Net in pixel space, conditioned on N reconstructed features."""

  config: PixelDecoderConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    x_rec: jax.Array,
    condition_mask: jax.Array | None = None,
    drop: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts the noise, or what the schedule's `prediction` names.

    Args:
      x: float[B, H, W, 3], noisy images; clean ones are in [-1, 1].
      t: int[B], steps of the diffusion.
      x_rec: float[B, N, D], reconstructed features.
      condition_mask: bool[B, N]; features where it is False are masked.
      drop: bool[B]; True replaces the condition by the learned unconditional
        one (classifier-free guidance).

    Returns:
      float32[B, H, W, 3].
    """
    config = self.config
    tokens = self._condition(x_rec, drop)
    if condition_mask is not None:
      tokens = jnp.where(condition_mask[..., None], tokens, 0.0)
    h = layers.space_to_depth(x, config.patch)
    if config.grid_channels:
      h = jnp.concatenate([h, self._grid(tokens, h.shape[1])], axis=-1)
    net = unet.UNet(config.unet, name="unet")
    h = net(h, t, tokens, condition_mask)
    return layers.depth_to_space(h, config.patch)

  def _condition(self, x_rec, drop):
    """Returns the N condition tokens of the U-Net, float[B, N, Dc]."""
    config, width = self.config, self.config.unet.cross_dim
    init = layers.partitioned(
      nn.initializers.normal(0.02), ("position", "embed")
    )
    shape = (config.num_patches, width)
    uncond = self.param("uncond_embeddings", init, shape)
    position = self.param("pos_embed", init, shape)
    x_rec = layers.LayerNorm(name="condition_norm")(x_rec)
    project = layers.dense(
      width, ("embed", "mlp"), name="unet_proj", dtype=config.unet.dtype
    )
    tokens = project(x_rec)
    if drop is not None:
      tokens = jnp.where(drop[:, None, None], uncond, tokens)
    return tokens + position

  def _grid(self, tokens, size):
    """Upsamples tokens from their grid to float[B, size, size, C].

    Each position within a token's patch has a projection of its own:
    convolutions alone could not tell which part of the patch they are in.
    """
    config, dtype = self.config, self.config.unet.dtype
    side = math.isqrt(config.num_patches)
    factor = size // side
    hidden = layers.dense(
      2 * tokens.shape[-1], ("embed", "mlp"), name="grid_fc", dtype=dtype
    )
    project = layers.dense(
      factor**2 * config.grid_channels,
      ("mlp", "conv_out"),
      name="grid_proj",
      dtype=dtype,
    )
    grid = project(activations.gelu(hidden(tokens)))
    grid = einops.rearrange(grid, "b (h w) c -> b h w c", h=side)
    return layers.depth_to_space(grid, factor)
