"""The conditional U-Net of latent diffusion, at published and other sizes.

The blocks, their order and their names are those of diffusers'
`UNet2DConditionModel` (Rombach et al., arXiv 2112.10752; Podell et al., arXiv
2307.01952): `down_blocks_i/resnets_j`, `attentions_j`, `downsamplers_0`,
`mid_block`, `up_blocks_i`. Images are NHWC here; a 1 x 1 convolution is a
Dense. `port/tables/pixel_names.py` has the names of published weights, and
`port/diffusers/config.py` reads their sizes.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import activations, layers
from lavit_jax.models.pixels import unet_blocks

MASK_BIAS = -10000.0  # diffusers adds it to the logits of masked tokens
_TINY_INIT = layers.traced_once(
  nn.initializers.variance_scaling(1e-4, "fan_in", "normal")
)
_PER_LEVEL = ("attention", "transformer_layers", "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusersQuirks:
  """Details in which published U-Nets differ from each other.

  Attributes:
    norm_eps: of the GroupNorms, except those of transformers (1e-6).
    cosines_first: whether the step's cosines come before its sines.
    freq_shift: see `unet_blocks.timestep_features`.
    linear_projection: whether files hold the projections into and out of a
      transformer as matrices, not as 1 x 1 convolutions. It makes no
      difference here.
    mask_bias: see `unet_blocks.Attention`.
    added_dim: width of the pooled condition and the sinusoids of sizes
      together, which are embedded and added to the step's embedding; 0: none
      (diffusers' "text_time", `projection_class_embeddings_input_dim`).
    added_time_dim: width of the sinusoids of one size.
  """

  norm_eps: float = 1e-5
  cosines_first: bool = True
  freq_shift: float = 0.0
  linear_projection: bool = False
  mask_bias: float | None = None
  added_dim: int = 0
  added_time_dim: int = 0

  def __post_init__(self):
    if bool(self.added_dim) != bool(self.added_time_dim):
      raise errors.ConfigError(
        f"added_dim={self.added_dim} and added_time_dim={self.added_time_dim}:"
        " either both must be 0 (nothing is added to the step) or neither."
        " Change unet.details."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
  """Sizes of the U-Net. Tuples have one entry per level, from fine to coarse.

  Attributes:
    in_channels: channels of the input, including those of a condition.
    out_channels: channels of the prediction.
    channels: width of each level.
    layers_per_block: residual blocks per level on the way down (up: one more);
      one number for all levels or a tuple.
    attention: whether a level has transformers.
    transformer_layers: layers of each transformer of a level; the middle block
      has as many as the coarsest level.
    num_heads: attention heads of a level; of the middle block likewise. It is
      diffusers' `attention_head_dim`, which is not the width of a head.
    cross_dim: Dc, width of the condition tokens.
    mid_attention: whether the middle block has a transformer.
    groups: groups of every GroupNorm.
    ff_mult: hidden width of the GEGLU layers over their model width.
    dtype: of the computation; parameters and norms are float32.
    remat: name of a policy in `layers.REMAT`, for each residual block and
      transformer layer.
    scan: whether the layers of each transformer are one scan over stacked
      parameters, see `stacked`: SDXL's 70 layers compile far faster.
    details: differences between published U-Nets.
  """

  in_channels: int
  out_channels: int
  channels: tuple[int, ...]
  layers_per_block: int | tuple[int, ...]
  attention: tuple[bool, ...]
  transformer_layers: tuple[int, ...]
  num_heads: tuple[int, ...]
  cross_dim: int
  mid_attention: bool = True
  groups: int = 32
  ff_mult: int = 4
  dtype: str = "float32"
  remat: str = "none"
  scan: bool = False
  details: DiffusersQuirks = DiffusersQuirks()

  def __post_init__(self):
    if not isinstance(self.details, DiffusersQuirks):
      object.__setattr__(self, "details", DiffusersQuirks(**self.details))
    names = ("channels", *_PER_LEVEL)
    if not isinstance(self.layers_per_block, int):
      names = (*names, "layers_per_block")
    for name in names:
      object.__setattr__(self, name, tuple(getattr(self, name)))
      if len(getattr(self, name)) != len(self.channels):
        raise errors.ConfigError(
          f"{name}={getattr(self, name)} must have one entry for each of the"
          f" {len(self.channels)} levels of channels={self.channels}."
          f" Change unet.{name}."
        )
    if self.remat not in layers.REMAT:
      raise errors.ConfigError(
        f"unet.remat={self.remat!r} is unknown: expected one of"
        f" {sorted(layers.REMAT)}."
      )
    last = len(self.channels) - 1
    for level, (width, heads) in enumerate(
      zip(self.channels, self.num_heads, strict=True)
    ):
      attends = self.attention[level] or (level == last and self.mid_attention)
      if width % self.groups or (attends and width % heads):
        raise errors.ConfigError(
          f"A level has {width} channels, not a multiple of"
          f" groups={self.groups} and num_heads={heads}: both must divide it."
          " Change unet.channels, unet.groups or unet.num_heads."
        )

  @property
  def depths(self) -> tuple[int, ...]:
    """Returns the residual blocks of each level on the way down."""
    if isinstance(self.layers_per_block, int):
      return (self.layers_per_block,) * len(self.channels)
    return self.layers_per_block


SD15_UNET = UNetConfig(
  in_channels=4,
  out_channels=4,
  channels=(320, 640, 1280, 1280),
  layers_per_block=2,
  attention=(True, True, True, False),
  transformer_layers=(1, 1, 1, 1),
  num_heads=(8, 8, 8, 8),
  cross_dim=768,
  dtype="bfloat16",
  remat="full",
  details=DiffusersQuirks(mask_bias=MASK_BIAS),
)
SDXL_UNET = UNetConfig(
  in_channels=4,
  out_channels=4,
  channels=(320, 640, 1280),
  layers_per_block=2,
  attention=(False, True, True),
  transformer_layers=(1, 2, 10),
  num_heads=(5, 10, 20),
  cross_dim=2048,
  dtype="bfloat16",
  remat="full",
  scan=True,
  details=DiffusersQuirks(
    linear_projection=True,
    mask_bias=MASK_BIAS,
    added_dim=2816,
    added_time_dim=256,
  ),
)


def stacked(params: Mapping[str, Any]) -> dict[str, Any]:
  """Converts parameters of a U-Net without `scan` to those of one with it.

  Args:
    params: unboxed, of NumPy or JAX arrays.
  """
  return layers.stack_params(params, unet_blocks.SCAN_NAME)


def unstacked(params: Mapping[str, Any]) -> dict[str, Any]:
  """Converts parameters of a U-Net with `scan` to those of one without."""
  return layers.unstack_params(params, unet_blocks.SCAN_NAME)


class Block(nn.Module):
  """One level: residual blocks, each with its transformer, then a sampler.

  Attributes:
    config: of the U-Net.
    level: index of the level, which selects its sizes.
    depth: number of residual blocks.
    sampler: "down", "up" or None.
  """

  config: UNetConfig
  level: int
  depth: int
  sampler: str | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    time: jax.Array,
    condition: jax.Array,
    mask: jax.Array | None = None,
    skips: Sequence[jax.Array] = (),
    size: Sequence[int] | None = None,
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Computes a level, on the way down if `skips` is empty, else up.

    Args:
      x: float[B, h, w, C].
      time: float[B, T], embedding of the step.
      condition: float[B, N, Dc].
      mask: bool[B, N], False for masked condition tokens.
      skips: maps of the way down, the last one used first.
      size: height and width after an "up" sampler.

    Returns:
      The output, and the maps after each residual block and the sampler.
    """
    config, level = self.config, self.level
    width, maps = config.channels[level], []
    remaining = list(skips)
    for j in range(self.depth):
      if remaining:
        x = jnp.concatenate([x, remaining.pop()], axis=-1)
      x = _resnet(config, width, f"resnets_{j}")(x, time)
      if config.attention[level]:
        x = transformer(config, level, f"attentions_{j}")(x, condition, mask)
      maps.append(x)
    if self.sampler == "down":
      down = unet_blocks.Downsample(width, config.dtype, name="downsamplers_0")
      x = down(x)
      maps.append(x)
    elif self.sampler == "up":
      up = unet_blocks.Upsample(width, config.dtype, name="upsamplers_0")
      x = up(x, size)
      maps.append(x)
    return x, maps


def _resnet(config, width, name):
  """Returns a residual block of the U-Net."""
  kind = unet_blocks.remat(unet_blocks.ResnetBlock, config.remat)
  eps = config.details.norm_eps
  return kind(width, config.groups, config.dtype, eps, name=name)


def transformer(
  config: UNetConfig, level: int, name: str
) -> unet_blocks.Transformer2D:
  """Returns a transformer of a level of the U-Net."""
  return unet_blocks.Transformer2D(
    config.transformer_layers[level],
    config.num_heads[level],
    config.groups,
    config.ff_mult,
    config.dtype,
    config.details.mask_bias,
    config.remat,
    config.scan,
    name=name,
  )


class MidBlock(nn.Module):
  """Residual block, transformer, residual block at the coarsest level."""

  config: UNetConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    time: jax.Array,
    condition: jax.Array,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Maps float[B, h, w, C] to the same; the rest is as of `Block`."""
    config, level = self.config, len(self.config.channels) - 1
    x = _resnet(config, x.shape[-1], "resnets_0")(x, time)
    if config.mid_attention:
      x = transformer(config, level, "attentions_0")(x, condition, mask)
    return _resnet(config, x.shape[-1], "resnets_1")(x, time)


class UNet(nn.Module):
  """The conditional U-Net."""

  config: UNetConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    condition: jax.Array,
    condition_mask: jax.Array | None = None,
    pooled: jax.Array | None = None,
    sizes: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts the noise, or what the schedule's `prediction` names.

    Args:
      x: float[B, h, w, in_channels], any h and w.
      t: int[B] or float[B], steps of the diffusion.
      condition: float[B, N, cross_dim].
      condition_mask: bool[B, N]; tokens where it is False are masked.
      pooled: float[B, P]; required with `details.added_dim`, refused without.
      sizes: float[B, S], likewise, of numbers such as SDXL's six (height and
        width of the source, top and left of the crop, height and width of the
        target); P + S * added_time_dim = added_dim.

    Returns:
      float32[B, h, w, out_channels].

    Raises:
      errors.UsageError: `pooled` or `sizes` do not fit the config.
    """
    config, dtype = self.config, self.config.dtype
    time = self._time(t, pooled, sizes)
    conv = functools.partial(unet_blocks.conv, dtype=dtype)
    conv_in = conv(config.channels[0], "conv_in", axes=unet_blocks.INPUT_AXES)
    x = conv_in(x)
    skips = [x]
    last = len(config.channels) - 1
    for i, depth in enumerate(config.depths):
      sampler = "down" if i < last else None
      block = Block(config, i, depth, sampler, name=f"down_blocks_{i}")
      x, maps = block(x, time, condition, condition_mask)
      skips += maps
    mid = MidBlock(config, name="mid_block")
    x = mid(x, time, condition, condition_mask)
    for i, level in enumerate(range(last, -1, -1)):
      depth, sampler = config.depths[level] + 1, "up" if level else None
      block = Block(config, level, depth, sampler, name=f"up_blocks_{i}")
      used, skips = skips[-depth:], skips[:-depth]
      size = skips[-1].shape[1:3] if level else None
      x, _ = block(x, time, condition, condition_mask, used, size)
    norm = unet_blocks.group_norm(
      config.groups, config.details.norm_eps, "conv_norm_out"
    )
    axes = unet_blocks.OUTPUT_AXES
    conv_out = conv(config.out_channels, "conv_out", init=_TINY_INIT, axes=axes)
    return conv_out(activations.silu(norm(x))).astype(jnp.float32)

  def _time(self, t, pooled, sizes):
    """Returns the embedding of the step, float[B, 4 * channels[0]]."""
    config, details = self.config, self.config.details
    base = config.channels[0]

    def embed(features, name):
      kind = unet_blocks.TimestepEmbedding
      return kind(4 * base, config.dtype, name=name)(features)

    def sinusoids(numbers, width):
      return unet_blocks.timestep_features(
        numbers, width, details.cosines_first, details.freq_shift
      )

    time = embed(sinusoids(t, base), "time_embedding")
    _check_added(details, pooled, sizes)
    if details.added_dim:
      waves = sinusoids(sizes.reshape(-1), details.added_time_dim)
      waves = waves.reshape(len(sizes), -1)  # [B, S * added_time_dim]
      added = jnp.concatenate([pooled, waves], axis=-1)
      time = time + embed(added, "add_embedding")
    return time


def _check_added(details, pooled, sizes):
  """Raises UsageError unless `pooled` and `sizes` fit the config."""
  shapes = [None if x is None else x.shape for x in (pooled, sizes)]
  if not details.added_dim:
    if shapes != [None, None]:
      raise errors.UsageError(
        f"pooled and sizes have shapes {shapes[0]}, {shapes[1]}, but this U-Net"
        " takes neither (unet.details.added_dim is 0). Leave them out."
      )
    return
  width = details.added_time_dim
  if (
    None in shapes or shapes[0][-1] + shapes[1][-1] * width != details.added_dim
  ):
    raise errors.UsageError(
      f"pooled and sizes have shapes {shapes[0]}, {shapes[1]}, but this U-Net"
      f" needs both, with width(pooled) + {width} * width(sizes) ="
      f" {details.added_dim}."
    )
