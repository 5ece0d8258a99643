"""Conditional U-Net for eps-prediction, and the pixel decoder around it.

The blocks, their order and their names are those of diffusers'
`UNet2DConditionModel` (Rombach et al., arXiv 2112.10752; Podell et al., arXiv
2307.01952): `down_blocks_i/resnets_j`, `attentions_j`, `downsamplers_0`,
`mid_block`, `up_blocks_i`. Pictures are NHWC here; a 1 x 1 convolution is a
Dense. The spaces of `PixelDecoder` are pixels: LaVIT's decoder (arXiv
2309.04669, section 3.2) with space-to-depth in place of a VAE.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lavit_jax import errors
from lavit_jax.models import activations, unet_blocks

_TINY_INIT = nn.initializers.variance_scaling(1e-4, "fan_in", "normal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
  """Sizes of the U-Net, one tuple entry a level from fine to coarse.

  Attributes:
    in_channels: channels of the input, extra condition channels included.
    out_channels: channels of the prediction.
    channels: width of each level.
    layers_per_block: residual blocks a level on the way down (up: one more).
    attention: whether a level has transformer blocks; the middle follows the
      coarsest level when `mid_attention` is True.
    transformer_layers: transformer layers in each attention of a level.
    num_heads: attention heads of a level (diffusers' `attention_head_dim`).
    cross_dim: width of the condition tokens.
    mid_attention: transformer between the two middle residual blocks.
    groups: groups of every GroupNorm.
    ff_mult: hidden width of the GEGLU layers over their model width.
    dtype: of the computation; parameters and norms are float32.
  """

  in_channels: int
  out_channels: int
  channels: tuple[int, ...]
  layers_per_block: int
  attention: tuple[bool, ...]
  transformer_layers: tuple[int, ...]
  num_heads: tuple[int, ...]
  cross_dim: int
  mid_attention: bool = True
  groups: int = 32
  ff_mult: int = 4
  dtype: str = "float32"

  def __post_init__(self):
    for name in ("channels", "attention", "transformer_layers", "num_heads"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
      if len(getattr(self, name)) != len(self.channels):
        raise errors.ConfigError(
          f"{name}={getattr(self, name)} must have one entry for each of the"
          f" {len(self.channels)} levels of channels={self.channels}."
          f" Change unet.{name}."
        )
    for width, heads in zip(self.channels, self.num_heads, strict=True):
      if width % self.groups or width % heads:
        raise errors.ConfigError(
          f"A level of {width} channels is not a multiple of"
          f" groups={self.groups} and num_heads={heads}: both must divide it."
          " Change unet.channels, unet.groups or unet.num_heads."
        )


SD15 = UNetConfig(
  in_channels=4,
  out_channels=4,
  channels=(320, 640, 1280, 1280),
  layers_per_block=2,
  attention=(True, True, True, False),
  transformer_layers=(1, 1, 1, 1),
  num_heads=(8, 8, 8, 8),
  cross_dim=768,
)


class Block(nn.Module):
  """One level: residual blocks, each with its transformer, then a sampler.

  `level` picks the sizes from the config. `sampler` is "down", "up" or None.
  """

  config: UNetConfig
  level: int
  depth: int
  sampler: str | None = None

  @nn.compact
  def __call__(self, x, time, condition, mask=None, skips=()):
    """One level, down when `skips` is empty, else up.

    Args:
      x: float[B, h, w, C].
      time: float[B, T].
      condition: float[B, N, Dc].
      mask: bool[B, N], False where a condition token is not to be seen.
      skips: maps of the way down, last one consumed first.

    Returns:
      The output and the list of maps after each layer (and the sampler).
    """
    config, level = self.config, self.level
    width, skips, maps = config.channels[level], list(skips), []
    for j in range(self.depth):
      x = jnp.concatenate([x, skips.pop()], axis=-1) if skips else x
      x = resnet(config, width, f"resnets_{j}")(x, time)
      if config.attention[level]:
        x = transformer(config, level, f"attentions_{j}")(x, condition, mask)
      maps.append(x)
    if self.sampler is not None:
      kind = {"down": unet_blocks.Downsample, "up": unet_blocks.Upsample}[
        self.sampler
      ]
      x = kind(width, config.dtype, name=f"{self.sampler}samplers_0")(x)
      maps.append(x)
    return x, maps


def resnet(config, width, name):
  """The residual block of a config."""
  return unet_blocks.ResnetBlock(width, config.groups, config.dtype, name=name)


def transformer(
  config: UNetConfig, level: int, name: str
) -> unet_blocks.Transformer2D:
  """The transformer of a level of a config."""
  return unet_blocks.Transformer2D(
    config.transformer_layers[level],
    config.num_heads[level],
    config.groups,
    config.ff_mult,
    config.dtype,
    name=name,
  )


class MidBlock(nn.Module):
  """Residual block, transformer, residual block at the coarsest level."""

  config: UNetConfig

  @nn.compact
  def __call__(self, x, time, condition, mask=None):
    """Maps float[B, h, w, C] to float[B, h, w, C]."""
    config, level = self.config, len(self.config.channels) - 1
    x = resnet(config, x.shape[-1], "resnets_0")(x, time)
    if config.mid_attention:
      x = transformer(config, level, "attentions_0")(x, condition, mask)
    return resnet(config, x.shape[-1], "resnets_1")(x, time)


class UNet(nn.Module):
  """The conditional U-Net."""

  config: UNetConfig

  @nn.compact
  def __call__(self, x, t, condition, condition_mask=None):
    """Predicts the noise (or what the schedule's `prediction` names).

    Args:
      x: float[B, h, w, in_channels]; h and w multiples of 2**(levels - 1).
      t: int[B] or float[B], the step of the diffusion.
      condition: float[B, N, cross_dim].
      condition_mask: bool[B, N]; tokens where it is False are not seen.

    Returns:
      float32[B, h, w, out_channels].
    """
    config, dtype = self.config, self.config.dtype
    levels, base = len(config.channels), config.channels[0]
    embed = unet_blocks.TimestepEmbedding(
      4 * base, dtype, name="time_embedding"
    )
    time = embed(unet_blocks.timestep_features(t, base))
    x = unet_blocks.conv(base, "conv_in", dtype=dtype)(x)
    skips = [x]
    for i in range(levels):
      sampler = "down" if i < levels - 1 else None
      depth = config.layers_per_block
      block = Block(config, i, depth, sampler, name=f"down_blocks_{i}")
      x, maps = block(x, time, condition, condition_mask)
      skips += maps
    mid = MidBlock(config, name="mid_block")
    x = mid(x, time, condition, condition_mask)
    depth = config.layers_per_block + 1
    for i, level in enumerate(reversed(range(levels))):
      sampler = "up" if level > 0 else None
      block = Block(config, level, depth, sampler, name=f"up_blocks_{i}")
      x, _ = block(x, time, condition, condition_mask, skips[-depth:])
      del skips[-depth:]
    x = activations.silu(
      unet_blocks.group_norm(config.groups, 1e-5, "conv_norm_out")(x)
    )
    out = unet_blocks.conv(
      config.out_channels, "conv_out", dtype=dtype, init=_TINY_INIT
    )
    return out(x).astype(jnp.float32)
