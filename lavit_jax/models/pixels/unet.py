"""Conditional U-Net of latent diffusion, as published and at any size.

The blocks, their order and their names are those of diffusers'
`UNet2DConditionModel` (Rombach et al., arXiv 2112.10752; Podell et al., arXiv
2307.01952): `down_blocks_i/resnets_j`, `attentions_j`, `downsamplers_0`,
`mid_block`, `up_blocks_i`. Images are NHWC here; a 1 x 1 convolution is a
Dense. `port/names_pixels.py` has the names of published weights, and
`port/diffusers_config.py` reads their sizes.
"""

import dataclasses
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.models import activations, layers
from lavit_jax.models.pixels import unet_blocks

MASK_BIAS = -10000.0  # what diffusers adds to the logits of masked tokens
_TINY_INIT = nn.initializers.variance_scaling(1e-4, "fan_in", "normal")
_PER_LEVEL = ("attention", "transformer_layers", "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusersQuirks:
  """What published U-Nets do differently.

  Attributes:
    norm_eps: of the GroupNorms, those of the transformers (1e-6) apart.
    cosines_first: cosines of the step before its sines.
    freq_shift: see `unet_blocks.timestep_features`.
    linear_projection: whether files hold the projections into and out of a
      transformer as matrices; else as 1 x 1 convolutions. The same here.
    mask_bias: see `unet_blocks.Attention`.
    added_dim: width of a pooled condition and the sinusoids of sizes
      together, which are embedded and added to the step's; 0: none
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
        " either both are 0 (nothing is added to the step) or neither. Change"
        " unet.details."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
  """Sizes of the U-Net, one tuple entry a level from fine to coarse.

  Attributes:
    in_channels: channels of the input, extra condition channels included.
    out_channels: channels of the prediction.
    channels: width of each level.
    layers_per_block: residual blocks a level on the way down (up: one more);
      one number for all levels or a tuple.
    attention: whether a level has transformer blocks.
    transformer_layers: transformer layers in each attention of a level; the
      middle has those of the coarsest level.
    num_heads: attention heads of a level, and of the middle likewise
      (diffusers' `attention_head_dim`, which is no width of a head).
    cross_dim: width of the condition tokens.
    mid_attention: transformer between the two middle residual blocks.
    groups: groups of every GroupNorm.
    ff_mult: hidden width of the GEGLU layers over their model width.
    dtype: of the computation; parameters and norms are float32.
    remat: name of a policy in `layers.REMAT`, what backward recomputes of
      each residual block and transformer layer.
    scan: whether the layers of each transformer are one scan over stacked
      parameters, see `stacked`: SDXL's 70 layers compile far faster.
    details: what published U-Nets do differently.
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
          f"A level of {width} channels is not a multiple of"
          f" groups={self.groups} and num_heads={heads}: both must divide it."
          " Change unet.channels, unet.groups or unet.num_heads."
        )

  @property
  def depths(self) -> tuple[int, ...]:
    """Residual blocks of each level on the way down."""
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


_LAYER = re.compile(r"transformer_blocks_(\d+)")


def stacked(params):
  """The parameters for `scan` of a U-Net without it.

  Args:
    params: unboxed, of numpy or JAX arrays.
  """
  flat = traverse_util.flatten_dict(params)
  groups, made = {}, {}
  for path, leaf in flat.items():
    found = [(i, m) for i, k in enumerate(path) if (m := _LAYER.fullmatch(k))]
    if not found:
      made[path] = leaf
      continue
    (i, match), *_ = found
    to = (*path[:i], "transformer_blocks", *path[i + 1 :])
    groups.setdefault(to, {})[int(match[1])] = path
  for to, paths in groups.items():
    leaves = [flat[paths[i]] for i in range(len(paths))]
    if len(leaves) == 1:  # no scan of one layer
      made[paths[0]] = leaves[0]
    else:
      numpy = isinstance(leaves[0], np.ndarray)
      made[to] = (np if numpy else jnp).stack(leaves)
  return traverse_util.unflatten_dict(made)


def unstacked(params):
  """The inverse of `stacked`."""
  made = {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    if "transformer_blocks" not in path:
      made[path] = leaf
      continue
    i = path.index("transformer_blocks")
    for number, layer in enumerate(leaf):
      name = f"transformer_blocks_{number}"
      made[*path[:i], name, *path[i + 1 :]] = layer
  return traverse_util.unflatten_dict(made)


class Block(nn.Module):
  """One level: residual blocks, each with its transformer, then a sampler.

  `level` picks the sizes from the config. `sampler` is "down", "up" or None.
  """

  config: UNetConfig
  level: int
  depth: int
  sampler: str | None = None

  @nn.compact
  def __call__(self, x, time, condition, mask=None, skips=(), size=None):
    """One level, down when `skips` is empty, else up.

    Args:
      x: float[B, h, w, C].
      time: float[B, T].
      condition: float[B, N, Dc].
      mask: bool[B, N], False where a condition token is not to be seen.
      skips: maps of the way down, last one consumed first.
      size: sides of what an "up" sampler gives.

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
    if self.sampler == "down":
      down = unet_blocks.Downsample(width, config.dtype, name="downsamplers_0")
      x = down(x)
      maps.append(x)
    elif self.sampler == "up":
      up = unet_blocks.Upsample(width, config.dtype, name="upsamplers_0")
      x = up(x, size)
      maps.append(x)
    return x, maps


def resnet(config, width, name):
  """The residual block of a config."""
  kind = unet_blocks.remat(unet_blocks.ResnetBlock, config.remat)
  eps = config.details.norm_eps
  return kind(width, config.groups, config.dtype, eps, name=name)


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
    config.details.mask_bias,
    config.remat,
    config.scan,
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
  def __call__(
    self, x, t, condition, condition_mask=None, pooled=None, sizes=None
  ):
    """Predicts the noise (or what the schedule's `prediction` names).

    Args:
      x: float[B, h, w, in_channels], any h and w.
      t: int[B] or float[B], the step of the diffusion.
      condition: float[B, N, cross_dim].
      condition_mask: bool[B, N]; tokens where it is False are not seen.
      pooled: float[B, P], only and always with `details.added_dim`.
      sizes: float[B, S] of numbers such as SDXL's six (height and width of
        the source, top and left of the crop, height and width aimed at);
        P + S * added_time_dim = added_dim.

    Returns:
      float32[B, h, w, out_channels].

    Raises:
      errors.UsageError: `pooled` or `sizes` do not fit the config.
    """
    config, dtype = self.config, self.config.dtype
    time = self._time(t, pooled, sizes)
    axes = ("conv", None, None, "conv_out")
    conv_in = unet_blocks.conv(
      config.channels[0], "conv_in", dtype=dtype, axes=axes
    )
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
    axes = ("conv", None, "conv_in", None)
    conv_out = unet_blocks.conv(
      config.out_channels, "conv_out", dtype=dtype, init=_TINY_INIT, axes=axes
    )
    return conv_out(activations.silu(norm(x))).astype(jnp.float32)

  def _time(self, t, pooled, sizes):
    """The vector of every residual block, float[B, 4 * channels[0]]."""
    config, details = self.config, self.config.details
    base = config.channels[0]

    def embed(features, name):
      return unet_blocks.TimestepEmbedding(4 * base, config.dtype, name=name)(
        features
      )

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
  """Raises UsageError where `pooled` and `sizes` do not fit."""
  shapes = [None if x is None else x.shape for x in (pooled, sizes)]
  if not details.added_dim:
    if shapes != [None, None]:
      raise errors.UsageError(
        f"pooled and sizes of shapes {shapes[0]}, {shapes[1]} given to a U-Net"
        " that takes none (unet.details.added_dim is 0). Leave them out."
      )
    return
  step = details.added_time_dim
  if (
    None in shapes or shapes[0][-1] + shapes[1][-1] * step != details.added_dim
  ):
    raise errors.UsageError(
      f"pooled and sizes have shapes {shapes[0]}, {shapes[1]}: this U-Net needs"
      f" both, with width(pooled) + {step} * width(sizes) ="
      f" {details.added_dim}."
    )
