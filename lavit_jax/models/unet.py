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
import jax
import jax.numpy as jnp

from lavit_jax import errors
from lavit_jax.models import layers

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


def conv(features, name, *, strides=1, dtype="float32", init=None):
  """3 x 3 with one pixel of zeros on each side, as torch pads."""
  kernel_init = init or nn.initializers.lecun_normal()
  axes = ("conv", None, "conv_in", "conv_out")
  return nn.Conv(
    features,
    (3, 3),
    strides=strides,
    padding=((1, 1), (1, 1)),
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(kernel_init, axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[3:]),
    name=name,
  )


def group_norm(groups, epsilon, name):
  return nn.GroupNorm(
    num_groups=groups,
    epsilon=epsilon,
    use_fast_variance=False,
    dtype=jnp.float32,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
    name=name,
  )


def timestep_features(t: jax.Array, width: int) -> jax.Array:
  """Sinusoids of int[B] or float[B] as float32[B, width]: cosines first."""
  half = width // 2
  rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
  angles = t.astype(jnp.float32)[:, None] * rates
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
  """Linear, SiLU, Linear on the sinusoids of t."""

  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps float[B, C] to float[B, width]."""
    axes = ("embed", "mlp")
    h = layers.dense(self.width, axes, name="linear_1", dtype=self.dtype)(
      features
    )
    axes = ("mlp", "embed")
    return layers.dense(self.width, axes, name="linear_2", dtype=self.dtype)(
      nn.silu(h)
    )


class ResnetBlock(nn.Module):
  """Two convolutions with GroupNorm and SiLU; the time enters between."""

  channels: int
  groups: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] and float[B, T] to float[B, h, w, channels]."""
    h = nn.silu(group_norm(self.groups, 1e-5, "norm1")(x))
    h = conv(self.channels, "conv1", dtype=self.dtype)(h)
    axes = ("time", "conv_out")
    shift = layers.dense(
      self.channels, axes, name="time_emb_proj", dtype=self.dtype
    )
    h = h + shift(nn.silu(time))[:, None, None]
    h = nn.silu(group_norm(self.groups, 1e-5, "norm2")(h))
    h = conv(self.channels, "conv2", dtype=self.dtype)(h)
    if x.shape[-1] != self.channels:
      axes = ("conv_in", "conv_out")
      x = layers.dense(
        self.channels, axes, name="conv_shortcut", dtype=self.dtype
      )(x)
    return x + h


class Attention(nn.Module):
  """Multi-head attention of float[B, L, D] to itself or to a condition."""

  num_heads: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, context=None, mask=None):
    """Maps float[B, L, D] (and float[B, N, Dc], bool[B, N]) to the first's."""
    width = x.shape[-1]
    context = x if context is None else context
    split = (self.num_heads, width // self.num_heads)

    def project(y, name):
      axes = ("embed", "heads")
      y = layers.dense(
        width, axes, name=name, use_bias=False, dtype=self.dtype
      )(y)
      return y.reshape(*y.shape[:2], *split)  # [B, L, H, Dh]

    out = layers.attention(
      project(x, "to_q"),
      project(context, "to_k"),
      project(context, "to_v"),
      mask=None if mask is None else mask[:, None, None],  # [B, 1, 1, N]
    ).reshape(*x.shape[:2], width)
    return layers.dense(
      width, ("heads", "embed"), name="to_out_0", dtype=self.dtype
    )(out)


class FeedForward(nn.Module):
  """GEGLU block with the exact GELU."""

  mult: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, L, D] to float[B, L, D]."""
    width = x.shape[-1]
    hidden = self.mult * width
    axes = ("embed", "mlp")
    h = layers.dense(2 * hidden, axes, name="net_0_proj", dtype=self.dtype)(x)
    h, gate = jnp.split(h, 2, axis=-1)  # [B, L, F] each
    h = h * nn.gelu(gate, approximate=False)
    return layers.dense(
      width, ("mlp", "embed"), name="net_2", dtype=self.dtype
    )(h)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention to the condition, feed-forward."""

  num_heads: int
  ff_mult: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, condition, mask=None):
    """Maps float[B, L, D], float[B, N, Dc] and bool[B, N] to float[B, L, D]."""
    attn1 = Attention(self.num_heads, self.dtype, name="attn1")
    attn2 = Attention(self.num_heads, self.dtype, name="attn2")
    x = x + attn1(layers.LayerNorm(name="norm1")(x))
    x = x + attn2(layers.LayerNorm(name="norm2")(x), condition, mask)
    ff = FeedForward(self.ff_mult, self.dtype, name="ff")
    return x + ff(layers.LayerNorm(name="norm3")(x))


class Transformer2D(nn.Module):
  """Transformer layers over the h * w places of a feature map."""

  num_layers: int
  num_heads: int
  groups: int
  ff_mult: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, condition, mask=None):
    """Maps float[B, h, w, C] and the condition to float[B, h, w, C]."""
    batch, height, width, channels = x.shape
    h = group_norm(self.groups, 1e-6, "norm")(x)
    h = h.reshape(batch, height * width, channels)
    axes = ("conv_in", "conv_out")
    h = layers.dense(channels, axes, name="proj_in", dtype=self.dtype)(h)
    for i in range(self.num_layers):
      block = TransformerBlock(
        self.num_heads, self.ff_mult, self.dtype, name=f"transformer_blocks_{i}"
      )
      h = block(h, condition, mask)
    h = layers.dense(channels, axes, name="proj_out", dtype=self.dtype)(h)
    return x + h.reshape(x.shape)


class Downsample(nn.Module):
  """Convolution of stride two."""

  channels: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, h / 2, w / 2, channels]."""
    return conv(self.channels, "conv", strides=2, dtype=self.dtype)(x)


class Upsample(nn.Module):
  """Nearest neighbour, twice the size, then a convolution."""

  channels: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, 2 h, 2 w, channels]."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return conv(self.channels, "conv", dtype=self.dtype)(x)


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
      kind = {"down": Downsample, "up": Upsample}[self.sampler]
      x = kind(width, config.dtype, name=f"{self.sampler}samplers_0")(x)
      maps.append(x)
    return x, maps


def resnet(config, width, name):
  """The residual block of a config."""
  return ResnetBlock(width, config.groups, config.dtype, name=name)


def transformer(config: UNetConfig, level: int, name: str) -> Transformer2D:
  """The transformer of a level of a config."""
  return Transformer2D(
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
    embed = TimestepEmbedding(4 * base, dtype, name="time_embedding")
    time = embed(timestep_features(t, base))
    x = conv(base, "conv_in", dtype=dtype)(x)
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
    x = nn.silu(group_norm(config.groups, 1e-5, "conv_norm_out")(x))
    out = conv(config.out_channels, "conv_out", dtype=dtype, init=_TINY_INIT)
    return out(x).astype(jnp.float32)
