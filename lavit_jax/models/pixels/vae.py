"""The autoencoder between images and the latents that a U-Net denoises.

Blocks and names are those of diffusers' `AutoencoderKL` (Rombach et al., arXiv
2112.10752): `encoder` and `decoder` with `down_blocks_i` or `up_blocks_i` and
`mid_block`; `quant_conv` and `post_quant_conv`. Images are NHWC in [-1, 1]. A
U-Net takes latents times `scaling_factor`; nothing here applies it.
"""

import dataclasses
import functools
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import activations, layers
from lavit_jax.models.pixels import unet_blocks

_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeConfig:
  """Sizes of the autoencoder.

  Attributes:
    in_channels: channels of the encoder's images.
    out_channels: channels of the decoder's images.
    channels: width of each level from fine to coarse; each level but the
      first halves height and width.
    layers_per_block: residual blocks per level of the encoder; the decoder has
      one more.
    latent_channels: channels of the latents.
    groups: groups of every GroupNorm.
    sample_size: height and width of the training images, the default tile of
      `decode_tiled`.
    scaling_factor: factor of the latents for a U-Net.
    force_upcast: compute in float32 whatever `dtype` is: feature maps overflow
      float16, and lose much precision in bfloat16.
    dtype: of the computation; parameters and norms are float32.
  """

  in_channels: int = 3
  out_channels: int = 3
  channels: tuple[int, ...]
  layers_per_block: int
  latent_channels: int = 4
  groups: int = 32
  sample_size: int = 512
  scaling_factor: float = 0.18215
  force_upcast: bool = True
  dtype: str = "float32"

  def __post_init__(self):
    object.__setattr__(self, "channels", tuple(self.channels))
    for width in self.channels:
      if width % self.groups:
        raise errors.ConfigError(
          f"vae.channels={self.channels}: every width must be a multiple of"
          f" groups={self.groups}. Change vae.channels or vae.groups."
        )

  @property
  def scale(self) -> int:
    """Returns the height and width, in pixels, of one latent position."""
    return 2 ** (len(self.channels) - 1)

  @property
  def compute_dtype(self) -> str:
    """Returns the dtype of the computation, after `force_upcast`."""
    return "float32" if self.force_upcast else self.dtype


SD15_VAE = VaeConfig(channels=(128, 256, 512, 512), layers_per_block=2)
SDXL_VAE = VaeConfig(
  channels=(128, 256, 512, 512),
  layers_per_block=2,
  sample_size=1024,
  scaling_factor=0.13025,
)


def _resnet(config, width, name):
  return unet_blocks.ResnetBlock(
    width, config.groups, config.compute_dtype, _EPS, name=name
  )


def _output(config, x, features):
  """Applies norm, SiLU and the last convolution of encoder and decoder."""
  norm = unet_blocks.group_norm(config.groups, _EPS, "conv_norm_out")
  conv = unet_blocks.conv(
    features,
    "conv_out",
    dtype=config.compute_dtype,
    axes=unet_blocks.OUTPUT_AXES,
  )
  return conv(activations.silu(norm(x)))


class Attention(nn.Module):
  """Single-head attention over all positions of a map, after a norm."""

  config: VaeConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to the same."""
    dtype = self.config.compute_dtype
    dense = functools.partial(layers.dense, x.shape[-1], dtype=dtype)
    h = unet_blocks.group_norm(self.config.groups, _EPS, "group_norm")(x)
    h = einops.rearrange(h, "b h w c -> b (h w) c")
    query, key, value = (
      dense(("embed", "heads"), name=name)(h)[:, :, None]  # [B, L, 1, C]
      for name in ("to_q", "to_k", "to_v")
    )
    out = layers.attention(query, key, value)[:, :, 0]
    out = dense(("heads", "embed"), name="to_out_0")(out)
    return x + out.reshape(x.shape)


class MidBlock(nn.Module):
  """Residual block, attention, residual block."""

  config: VaeConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to the same."""
    x = _resnet(self.config, x.shape[-1], "resnets_0")(x)
    x = Attention(self.config, name="attentions_0")(x)
    return _resnet(self.config, x.shape[-1], "resnets_1")(x)


class Block(nn.Module):
  """The residual blocks of a level, then a sampler.

  Attributes:
    config: of the autoencoder.
    width: channels of the level.
    depth: number of residual blocks.
    sampler: "down", "up" or None.
  """

  config: VaeConfig
  width: int
  depth: int
  sampler: str | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, h', w', width]."""
    for j in range(self.depth):
      x = _resnet(self.config, self.width, f"resnets_{j}")(x)
    dtype = self.config.compute_dtype
    if self.sampler == "down":
      name = "downsamplers_0"
      return unet_blocks.Downsample(self.width, dtype, True, name=name)(x)
    if self.sampler == "up":
      return unet_blocks.Upsample(self.width, dtype, name="upsamplers_0")(x)
    return x


class Encoder(nn.Module):
  """Maps images to means and log variances of latents, concatenated."""

  config: VaeConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, 3] to float[B, h, w, 2 * latent_channels]."""
    c, dtype = self.config, self.config.compute_dtype
    conv = unet_blocks.conv(
      c.channels[0], "conv_in", dtype=dtype, axes=unet_blocks.INPUT_AXES
    )
    x = conv(x)
    for i, width in enumerate(c.channels):
      sampler = "down" if i < len(c.channels) - 1 else None
      name = f"down_blocks_{i}"
      x = Block(c, width, c.layers_per_block, sampler, name=name)(x)
    x = MidBlock(c, name="mid_block")(x)
    return _output(c, x, 2 * c.latent_channels)


class Decoder(nn.Module):
  """Maps latents to images."""

  config: VaeConfig

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Maps float[B, h, w, latent_channels] to float[B, H, W, 3]."""
    c, dtype = self.config, self.config.compute_dtype
    conv = unet_blocks.conv(
      c.channels[-1], "conv_in", dtype=dtype, axes=unet_blocks.INPUT_AXES
    )
    x = MidBlock(c, name="mid_block")(conv(z))
    for i, width in enumerate(reversed(c.channels)):
      sampler = "up" if i < len(c.channels) - 1 else None
      name = f"up_blocks_{i}"
      x = Block(c, width, c.layers_per_block + 1, sampler, name=name)(x)
    return _output(c, x, c.out_channels)


class AutoencoderKL(nn.Module):
  """Encoder, decoder, and their projections to and from the latents."""

  config: VaeConfig

  def setup(self) -> None:
    c = self.config
    project = functools.partial(
      layers.dense, axes=(None, None), dtype=c.compute_dtype
    )
    self.encoder = Encoder(c)
    self.decoder = Decoder(c)
    self.quant_conv = project(2 * c.latent_channels)
    self.post_quant_conv = project(c.latent_channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Reconstructs images float[B, H, W, 3] from their latents' means."""
    return self.decode(self.encode(x)[0])

  def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the distribution of the latents of images.

    Args:
      x: float[B, H, W, 3] in [-1, 1]; H and W multiples of `config.scale`.

    Returns:
      Mean and log variance, float32[B, h, w, latent_channels]; the latter is
      clipped to [-30, 20].

    Raises:
      errors.UsageError: `config.scale` does not divide height and width.
    """
    scale = self.config.scale
    if x.shape[1] % scale or x.shape[2] % scale:
      raise errors.UsageError(
        f"Images have {x.shape[1]} x {x.shape[2]} pixels, but this autoencoder"
        f" needs heights and widths that are multiples of {scale}. Resize or"
        " crop them."
      )
    moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z: jax.Array) -> jax.Array:
    """Maps latents to images.

    Args:
      z: float[B, h, w, latent_channels], divided by `scaling_factor`.

    Returns:
      float32[B, h * scale, w * scale, 3], about in [-1, 1], not clipped.
    """
    return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)


def sample(
  mean: jax.Array, logvar: jax.Array, noise: jax.Array | None = None
) -> jax.Array:
  """Samples latents from their distribution.

  Args:
    mean: float32[B, h, w, C], from `AutoencoderKL.encode`.
    logvar: float32[B, h, w, C], likewise.
    noise: standard normal [B, h, w, C]; without it the mean is returned.
  """
  if noise is None:
    return mean
  return mean + jnp.exp(0.5 * logvar) * noise


@functools.partial(jax.jit, static_argnames=("model", "tile", "overlap"))
def decode_tiled(
  model: AutoencoderKL,
  variables: Any,
  latents: jax.Array,
  *,
  tile: int | None = None,
  overlap: int | None = None,
) -> jax.Array:
  """Decodes large latents tile by tile, in little memory.

  Tiles overlap, and in the overlap one fades into the next, as in diffusers'
  `enable_tiling`: a tile starts every `tile - overlap` positions, and the last
  ones of a row and of a column are smaller. Tiles of one size are decoded one
  after the other by one program, for all images of the batch at once. Norms
  and attention act on one tile only, so that the result differs a little from
  that of `AutoencoderKL.decode`.

  Args:
    model: an `AutoencoderKL`.
    variables: {"params": ...}.
    latents: float[B, h, w, latent_channels], divided by `scaling_factor`.
    tile: height and width of a tile in latent positions; None: those of the
      training images. Latents no larger than a tile are decoded at once.
    overlap: positions that neighbouring tiles share; None: a quarter of a
      tile.

  Returns:
    float32[B, h * scale, w * scale, 3].

  Raises:
    errors.UsageError: not 0 <= overlap < tile.
  """
  scale = model.config.scale
  tile = model.config.sample_size // scale if tile is None else tile
  overlap = tile // 4 if overlap is None else overlap
  if not 0 <= overlap < tile:
    raise errors.UsageError(
      f"overlap={overlap} positions of tiles with {tile} per side: the overlap"
      " must be at least 0 and less than a tile."
    )
  height, width = latents.shape[1:3]
  decode = lambda z: jnp.asarray(model.apply(variables, z, method="decode"))
  if height <= tile and width <= tile:
    return decode(latents)
  stride = tile - overlap
  tops, lefts = range(0, height, stride), range(0, width, stride)
  tiles = _decode_tiles(
    decode,
    {
      (i, j): latents[:, top : top + tile, left : left + tile]
      for i, top in enumerate(tops)
      for j, left in enumerate(lefts)
    },
  )
  return _join(tiles, overlap * scale, stride * scale)


def _decode_tiles(decode, tiles):
  """Decodes tiles by (row, column): those of one shape by one program."""
  by_shape = {}
  for index, z in tiles.items():
    by_shape.setdefault(z.shape, []).append(index)
  decoded = {}
  for indices in by_shape.values():
    stacked = jnp.stack([tiles[index] for index in indices])
    images = jax.lax.map(decode, stacked)
    decoded |= {index: images[n] for n, index in enumerate(indices)}
  return decoded


def _join(tiles, overlap, stride):
  """Joins decoded tiles by (row, column) to one image."""
  rows = {}
  for (i, j), tile in sorted(tiles.items()):
    if i > 0:
      tile = _fade(tiles[i - 1, j], tile, overlap, axis=1)
    if j > 0:
      tile = _fade(tiles[i, j - 1], tile, overlap, axis=2)
    tiles[i, j] = tile  # later neighbours fade from it
    rows.setdefault(i, []).append(tile[:, :stride, :stride])
  rows = [jnp.concatenate(row, axis=2) for row in rows.values()]
  return jnp.concatenate(rows, axis=1)


def _fade(previous, tile, overlap, axis):
  """Fades the first pixels of a tile in from the previous one on an axis."""
  overlap = min(overlap, previous.shape[axis], tile.shape[axis])
  if not overlap:
    return tile
  ends = previous.shape[axis] - overlap, previous.shape[axis]
  old = jax.lax.slice_in_dim(previous, *ends, axis=axis)
  new, rest = jnp.split(tile, [overlap], axis=axis)
  weight = jnp.arange(overlap) / overlap
  weight = weight.reshape([-1 if a == axis else 1 for a in range(tile.ndim)])
  faded = old * (1 - weight) + new * weight
  return jnp.concatenate([faded, rest], axis=axis)
