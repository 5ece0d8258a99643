"""FLOPs of one forward pass of every network, from its config alone.

The rule stands in `flops`. All functions give a `Cost` for what they are told:
tokens, images or maps.
"""

import dataclasses

from lavit_jax.models import llama
from lavit_jax.models.encoder import contrastive, vision
from lavit_jax.models.pixels import pixel_decoder, unet, vae
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)


@dataclasses.dataclass(frozen=True)
class Cost:
  """FLOPs of a forward pass.

  Attributes:
    weights: in products of activations with parameters.
    products: in products of activations with activations, in attention.
  """

  weights: float = 0.0
  products: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.weights + other.weights, self.products + other.products)

  def __mul__(self, times: float) -> "Cost":
    return Cost(self.weights * times, self.products * times)

  __rmul__ = __mul__

  @property
  def forward(self) -> float:
    """A forward pass."""
    return self.weights + self.products

  @property
  def trained(self) -> float:
    """Forward, and gradients of inputs and parameters: three times it."""
    return 3 * self.forward

  @property
  def passed(self) -> float:
    """Forward, and gradients of inputs alone: parameters are frozen.

    Both factors of a product of activations get a gradient.
    """
    return 2 * self.weights + 3 * self.products


def dense(rows: float, width_in: int, width_out: int) -> Cost:
  """float[rows, width_in] times float[width_in, width_out]."""
  return Cost(2.0 * rows * width_in * width_out)


def _attended(rows: float, keys: float, width: int) -> Cost:
  """Logits and mixed values of `rows` queries that see `keys` keys each."""
  return Cost(0.0, 4.0 * rows * keys * width)


def _mlp(rows: float, width: int, hidden: int) -> Cost:
  return 2 * dense(rows, width, hidden)


def llama_layers(
  config: llama.LlamaConfig, tokens: float, segment: float
) -> Cost:
  """All layers of a causal language model, head and embedding apart.

  Args:
    config: sizes.
    tokens: positions that are computed.
    segment: length of the document that a token is in, its mean over tokens.
      Token i of a document sees i + 1, on average (segment + 1) / 2.
  """
  c = config
  wide, groups = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  layer = (
    2 * dense(tokens, c.width, wide)  # query and output
    + 2 * dense(tokens, c.width, groups)
    + 3 * dense(tokens, c.width, c.mlp_dim)
    + _attended(tokens, (segment + 1) / 2, wide)
  )
  return c.depth * layer


def llama_head(config: llama.LlamaConfig, tokens: float) -> Cost:
  """Logits of the ids in use; padding rows are no work of the model."""
  return dense(tokens, config.width, config.vocab_size)


def vit(config: vision.ViTConfig, images: float) -> Cost:
  """The encoder, without EVA's head, which LaVIT does not use."""
  c = config
  rows = images * (1 + c.num_patches)
  layer = (
    4 * dense(rows, c.width, c.width)
    + _mlp(rows, c.width, c.mlp_dim)
    + _attended(rows, 1 + c.num_patches, c.width)
  )
  patches = dense(images * c.num_patches, 3 * c.patch_size**2, c.width)
  return patches + c.depth * layer


def merge(
  config: merger.MergerConfig,
  images: float,
  num_patches: int,
  queries: int,
  form: str,
) -> Cost:
  """The merger in one of its forms.

  Args:
    config: sizes.
    images: their number.
    num_patches: N; cross-attention has as many keys.
    queries: K of the form "compact"; the others have N.
    form: "compact", "soft" or "reference". Self-attention is causal and
      counts halved, but for "reference": there the eps of the policy lets
      every position see every other.
  """
  queries = queries if form == "compact" else num_patches
  seen = queries if form == "reference" else (queries + 1) / 2
  rows = images * queries
  layer = (
    6 * dense(rows, config.width, config.width)  # 4 of self, 2 of cross
    + _mlp(rows, config.width, config.mlp_dim)
    + _attended(rows, seen, config.width)
    + _attended(rows, num_patches, config.width)
  )
  return config.depth * layer + merge_keys(config, images, num_patches)


def merge_keys(
  config: merger.MergerConfig, images: float, num_patches: int
) -> Cost:
  """What `merge` spends on keys and values of all patches, in all blocks."""
  one = dense(images * num_patches, config.width, config.width)
  return config.depth * 2 * one


def select(config: selector.SelectorConfig, patches: float) -> Cost:
  """The token selector."""
  d = config.width
  return (
    dense(patches, d, d)
    + dense(patches, d, d // 2)
    + dense(patches, d // 2, d // 4)
    + dense(patches, d // 4, 2)
  )


def quantize(config: quantizer.QuantizerConfig, tokens: float) -> Cost:
  """The projection of tokens into the space of codes."""
  c = config
  return dense(tokens, c.width, c.width) + dense(tokens, c.width, c.code_dim)


def lookup(config: quantizer.QuantizerConfig, tokens: float) -> Cost:
  """The nearest of all codes; no gradient passes."""
  return dense(tokens, config.code_dim, config.num_codes)


def decode(config: decoder.DecoderConfig, images: float, keys: int) -> Cost:
  """The semantic decoder of images of `keys` codes each, padding too."""
  c = config
  rows, codes = images * c.num_patches, images * keys
  layer = (
    6 * dense(rows, c.width, c.width)
    + 2 * dense(codes, c.width, c.width)
    + _mlp(rows, c.width, c.mlp_dim)
    + _attended(rows, c.num_patches, c.width)
    + _attended(rows, keys, c.width)
  )
  ends = dense(codes, c.code_dim, c.width) + dense(rows, c.width, c.width)
  return ends + dense(rows, c.width, c.out_dim) + c.depth * layer


def condition(model, images: float) -> Cost:
  """What follows the semantic decoder in a Lowres- or HighresDecoder."""
  c = model.config
  rows = images * c.num_patches
  if isinstance(model, decoder.LowresDecoder):
    return dense(rows, c.width, model.condition_dim)
  pool = (
    dense(images, c.width, c.width)
    + 2 * dense(rows + images, c.width, c.width)
    + _attended(images, 1 + c.num_patches, c.width)
    + dense(images, c.width, model.pooled_dim)
  )
  return dense(rows, c.width, sum(model.condition_dims)) + pool


def words(config: tokenizer.TokenizerConfig, images: float) -> Cost:
  """Features to ids at capacity N, as pixel decoders are told: no encoder."""
  num = config.num_patches
  merged = merge(config.merger, images, num, num, config.merger_form)
  return (
    select(config.selector, images * num)
    + merged
    + quantize(config.quantizer, images * num)
    + lookup(config.quantizer, images * num)
  )


def contrast(
  config: contrastive.ContrastiveConfig, images: int, length: int
) -> dict[str, Cost]:
  """The networks of stage `encoder`, by name.

  Args:
    config: sizes.
    images: of the global batch.
    length: tokens of a caption, padding too.
  """
  c, num = config, config.vit.num_patches
  rows, seen = images * num, num + length - 1
  captioner = dense(rows, c.vit.width, c.captioner.width) + llama_layers(
    c.captioner, images * seen, seen
  )
  heads = (
    dense(images, c.vit.width, c.embed_dim)
    + dense(images, c.text.width, c.embed_dim)
    + dense(rows, c.vit.width, 3 * c.vit.patch_size**2)
    + Cost(0.0, 2.0 * images**2 * c.embed_dim)  # all pairs
    + Cost(0.0, 2.0 * rows * c.vit.width**2)  # covariance of features
  )
  return {
    "encoder": vit(c.vit, images),
    "text": llama_layers(c.text, images * length, length),
    "captioner": captioner,
    "head": llama_head(c.captioner, images * length),
    "contrast": heads,
  }


def pixel_condition(
  config: pixel_decoder.PixelDecoderConfig, images: float
) -> Cost:
  """What makes a U-Net's tokens and grid of reconstructed features."""
  c, width = config, config.unet.cross_dim
  rows = images * c.num_patches
  made = dense(rows, c.feature_dim, width)
  if c.grid_channels:
    places = (c.image_size // c.patch) ** 2 // c.num_patches
    made += dense(rows, width, 2 * width)
    made += dense(rows, 2 * width, places * c.grid_channels)
  return made


def _conv(places: float, width_in: int, width_out: int) -> Cost:
  """3 x 3, zeros at the edges counted as if they were data."""
  return Cost(2.0 * 9 * places * width_in * width_out)


def _resnet(places, width_in, width_out, time=0) -> Cost:
  made = _conv(places, width_in, width_out) + _conv(
    places, width_out, width_out
  )
  made += dense(1, time, width_out)
  if width_in != width_out:
    made += dense(places, width_in, width_out)
  return made


def _transformer(config: unet.UNetConfig, level, places, tokens) -> Cost:
  width = config.channels[level]
  layer = (
    6 * dense(places, width, width)
    + 2 * dense(tokens, config.cross_dim, width)
    + 3 * dense(places, width, config.ff_mult * width)  # GEGLU: 2 in, 1 out
    + _attended(places, places, width)
    + _attended(places, tokens, width)
  )
  ends = 2 * dense(places, width, width)
  return ends + config.transformer_layers[level] * layer


def unet_parts(
  config: unet.UNetConfig, height: int, width: int, tokens: int
) -> list[tuple[str, Cost]]:
  """A U-Net's work on one image, in the order in which it is done.

  Args:
    config: sizes.
    height: places of the input.
    width: likewise.
    tokens: condition tokens.

  Returns:
    Pairs of "time", "conv", "resnet" or "transformer", and its cost.
  """
  channels, last = config.channels, len(config.channels) - 1
  time, details = 4 * channels[0], config.details
  embed = dense(1, channels[0], time) + dense(1, time, time)
  if details.added_dim:
    embed += dense(1, details.added_dim, time) + dense(1, time, time)
  size, now = (height, width), channels[0]
  conv_in = _conv(height * width, config.in_channels, now)
  parts, skips = [("time", embed), ("conv", conv_in)], [(now, size)]

  def block(level, width_in, attends):
    places = size[0] * size[1]
    cost = _resnet(places, width_in, channels[level], time)
    parts.append(("resnet", cost))
    if attends:
      cost = _transformer(config, level, places, tokens)
      parts.append(("transformer", cost))
    return channels[level]

  for level, depth in enumerate(config.depths):
    for _ in range(depth):
      now = block(level, now, config.attention[level])
      skips.append((now, size))
    if level < last:
      size = (-(-size[0] // 2), -(-size[1] // 2))
      parts.append(("conv", _conv(size[0] * size[1], now, now)))
      skips.append((now, size))
  now = block(last, now, config.mid_attention)
  now = block(last, now, False)
  for level in range(last, -1, -1):
    for _ in range(config.depths[level] + 1):
      now = block(level, now + skips.pop()[0], config.attention[level])
    if level:
      size = skips[-1][1]
      parts.append(("conv", _conv(size[0] * size[1], now, now)))
  out = _conv(height * width, now, config.out_channels)
  return [*parts, ("conv", out)]


def denoise(
  config: unet.UNetConfig, height: int, width: int, tokens: int
) -> Cost:
  """A U-Net's forward pass for one image; arguments as of `unet_parts`."""
  parts = unet_parts(config, height, width, tokens)
  return sum((cost for _, cost in parts), Cost())


def _vae_mid(places: float, width: int) -> Cost:
  attention = 4 * dense(places, width, width)
  attention += _attended(places, places, width)
  return attention + 2 * _resnet(places, width, width)


def vae_encode(config: vae.VaeConfig, height: int, width: int) -> Cost:
  """The autoencoder's encoder, for one image of height x width pixels."""
  c, now, places = config, config.channels[0], height * width
  made = _conv(places, c.in_channels, now)
  for level, wide in enumerate(c.channels):
    for _ in range(c.layers_per_block):
      made, now = made + _resnet(places, now, wide), wide
    if level < len(c.channels) - 1:
      places //= 4
      made += _conv(places, now, now)
  latent = 2 * c.latent_channels
  made += _vae_mid(places, now) + _conv(places, now, latent)
  return made + dense(places, latent, latent)


def vae_decode(config: vae.VaeConfig, height: int, width: int) -> Cost:
  """The autoencoder's decoder, for one image of height x width pixels."""
  c, now = config, config.channels[-1]
  places = height * width // c.scale**2
  made = dense(places, c.latent_channels, c.latent_channels)
  made += _conv(places, c.latent_channels, now) + _vae_mid(places, now)
  for level, wide in enumerate(reversed(c.channels)):
    for _ in range(c.layers_per_block + 1):
      made, now = made + _resnet(places, now, wide), wide
    if level < len(c.channels) - 1:
      places *= 4
      made += _conv(places, now, now)
  return made + _conv(places, now, c.out_channels)
