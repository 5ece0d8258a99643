"""The autoencoder between images and latents, for U-Nets that draw in them.

Blocks and names are those of diffusers' `AutoencoderKL` (Rombach et al., arXiv
2112.10752): `encoder` and `decoder` with `down_blocks_i` or `up_blocks_i`,
`mid_block`, and `quant_conv`, `post_quant_conv` beside them. Images are NHWC
in [-1, 1]. A U-Net sees latents times `scaling_factor`; nothing here applies
it.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import activations, layers
from lavit_jax.models.pixels import unet_blocks

_EPS = 1e-6
_FROM_DATA = ("conv", None, None, "conv_out")  # few channels are not split
_TO_DATA = ("conv", None, "conv_in", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeConfig:
  """Sizes of the autoencoder.

  Attributes:
    in_channels: channels of an image that is read.
    out_channels: channels of an image that is made.
    channels: width of each level from fine to coarse; each level but the
      first halves the sides.
    layers_per_block: residual blocks a level of the encoder (decoder: one
      more).
    latent_channels: channels of the latents.
    groups: groups of every GroupNorm.
    sample_size: side of the images it was trained on, the default tile of
      `decode_tiled`.
    scaling_factor: a U-Net's latents are these times it.
    force_upcast: compute in float32 whatever `dtype` says: maps overflow
      float16, and lose much in bfloat16.
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
    """Pixels a side of one place of the latents."""
    return 2 ** (len(self.channels) - 1)

  @property
  def compute_dtype(self) -> str:
    """What is really computed in."""
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
  """Norm, SiLU and the last convolution of encoder and decoder."""
  norm = unet_blocks.group_norm(config.groups, _EPS, "conv_norm_out")
  conv = unet_blocks.conv(
    features, "conv_out", dtype=config.compute_dtype, axes=_TO_DATA
  )
  return conv(activations.silu(norm(x)))


class Attention(nn.Module):
  """One head over all places of a map, with the norm before it."""

  config: VaeConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to the same."""
    batch, height, width, channels = x.shape
    dtype = self.config.compute_dtype
    dense = functools.partial(layers.dense, channels, dtype=dtype)
    h = unet_blocks.group_norm(self.config.groups, _EPS, "group_norm")(x)
    h = h.reshape(batch, height * width, channels)
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
  """The residual blocks of a level, then a sampler: "down", "up" or None."""

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
  """Images to means and logarithms of variances, side by side."""

  config: VaeConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, 3] to float[B, h, w, 2 * latent_channels]."""
    c, dtype = self.config, self.config.compute_dtype
    conv = unet_blocks.conv(
      c.channels[0], "conv_in", dtype=dtype, axes=_FROM_DATA
    )
    x = conv(x)
    for i, width in enumerate(c.channels):
      sampler = "down" if i < len(c.channels) - 1 else None
      name = f"down_blocks_{i}"
      x = Block(c, width, c.layers_per_block, sampler, name=name)(x)
    x = MidBlock(c, name="mid_block")(x)
    return _output(c, x, 2 * c.latent_channels)


class Decoder(nn.Module):
  """Latents to images."""

  config: VaeConfig

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Maps float[B, h, w, latent_channels] to float[B, H, W, 3]."""
    c, dtype = self.config, self.config.compute_dtype
    conv = unet_blocks.conv(
      c.channels[-1], "conv_in", dtype=dtype, axes=_FROM_DATA
    )
    x = MidBlock(c, name="mid_block")(conv(z))
    for i, width in enumerate(reversed(c.channels)):
      sampler = "up" if i < len(c.channels) - 1 else None
      name = f"up_blocks_{i}"
      x = Block(c, width, c.layers_per_block + 1, sampler, name=name)(x)
    return _output(c, x, c.out_channels)


class AutoencoderKL(nn.Module):
  """Encoder, decoder, and what stands between them and the latents."""

  config: VaeConfig

  def setup(self):
    c = self.config
    project = functools.partial(
      layers.dense, axes=(None, None), dtype=c.compute_dtype
    )
    self.encoder = Encoder(c)
    self.decoder = Decoder(c)
    self.quant_conv = project(2 * c.latent_channels)
    self.post_quant_conv = project(c.latent_channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images float[B, H, W, 3] made again from their latents' means."""
    return self.decode(self.encode(x)[0])

  def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distribution of the latents of images.

    Args:
      x: float[B, H, W, 3] in [-1, 1]; H and W multiples of `config.scale`.

    Returns:
      Mean and logarithm of the variance, float32[B, h, w, latent_channels];
      the latter lies in [-30, 20].

    Raises:
      errors.UsageError: sides that `config.scale` does not divide.
    """
    scale = self.config.scale
    if x.shape[1] % scale or x.shape[2] % scale:
      raise errors.UsageError(
        f"Images of {x.shape[1]} x {x.shape[2]} pixels: this autoencoder"
        f" needs sides that are multiples of {scale}. Resize or crop them."
      )
    moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z: jax.Array) -> jax.Array:
    """Images of latents.

    Args:
      z: float[B, h, w, latent_channels], divided by `scaling_factor`.

    Returns:
      float32[B, h * scale, w * scale, 3], about in [-1, 1], not clipped.
    """
    return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)


def sample(
  mean: jax.Array, logvar: jax.Array, noise: jax.Array | None = None
) -> jax.Array:
  """Latents of `AutoencoderKL.encode`'s by normal noise; without it, means."""
  if noise is None:
    return mean
  return mean + jnp.exp(0.5 * logvar) * noise


@functools.partial(jax.jit, static_argnames=("model", "tile", "overlap"))
def decode_tiled(
  model: AutoencoderKL,
  variables,
  latents: jax.Array,
  *,
  tile: int | None = None,
  overlap: int | None = None,
) -> jax.Array:
  """Images of large latents, decoded tile by tile in little memory.

  Tiles overlap, and in the overlap one fades into the next, by the rules of
  diffusers' `enable_tiling`: a tile starts every `tile - overlap` places, and
  the last ones of a row and of a column are smaller. Tiles of one size are
  decoded one after the other by one program, all images of the batch at a
  time. Norms and attention see one tile only, so that the result differs a
  little from `AutoencoderKL.decode`'s.

  Args:
    model: an `AutoencoderKL`.
    variables: {"params": ...}.
    latents: float[B, h, w, latent_channels], divided by `scaling_factor`.
    tile: places of the latents a side of a tile; None: as many as the
      images had that the model was trained on. Latents no larger than it
      are decoded whole.
    overlap: places that neighbours share; None: a quarter of a tile.

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
      f"overlap={overlap} places of tiles with {tile} a side: the overlap must"
      " be at least 0 and less than a tile."
    )
  height, width = latents.shape[1:3]
  decode = lambda z: model.apply(variables, z, method="decode")
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
  """Decodes a dict of tiles: those of one shape by one program, in turn."""
  by_shape = {}
  for place, z in tiles.items():
    by_shape.setdefault(z.shape, []).append(place)
  decoded = {}
  for places in by_shape.values():
    stacked = jnp.stack([tiles[place] for place in places])
    images = jax.lax.map(decode, stacked)
    decoded |= {place: images[n] for n, place in enumerate(places)}
  return decoded


def _join(tiles, overlap, stride):
  """One image of a dict of decoded tiles by (row, column)."""
  rows = {}
  for (i, j), tile in sorted(tiles.items()):
    if i > 0:
      tile = _fade(tiles[i - 1, j], tile, overlap, axis=1)
    if j > 0:
      tile = _fade(tiles[i, j - 1], tile, overlap, axis=2)
    tiles[i, j] = tile  # what its neighbours to come fade from
    rows.setdefault(i, []).append(tile[:, :stride, :stride])
  rows = [jnp.concatenate(row, axis=2) for row in rows.values()]
  return jnp.concatenate(rows, axis=1)


def _fade(before, tile, overlap, axis):
  """The tile, its first pixels on an axis faded in from the one before."""
  overlap = min(overlap, before.shape[axis], tile.shape[axis])
  if not overlap:
    return tile
  ends = before.shape[axis] - overlap, before.shape[axis]
  old = jax.lax.slice_in_dim(before, *ends, axis=axis)
  new, rest = jnp.split(tile, [overlap], axis=axis)
  weight = jnp.arange(overlap) / overlap
  weight = weight.reshape([-1 if a == axis else 1 for a in range(tile.ndim)])
  faded = old * (1 - weight) + new * weight
  return jnp.concatenate([faded, rest], axis=axis)
