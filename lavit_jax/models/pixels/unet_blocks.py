"""What the U-Net is made of: convolutions, residual and attention blocks.

Names and order are those of diffusers (see `unet`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import activations, layers

_BOTH_SIDES = ((1, 1), (1, 1))
_CONV_AXES = ("conv", None, "conv_in", "conv_out")


def by_rows(x: jax.Array) -> jax.Array:
  """x[B, ...] split over the batch alone.

  Left to itself, XLA also splits channels and places, where weights are split
  over them: SDXL then sent activations in place of weights and multiplied
  more; the gradients of whole U-Nets even came out wrong (jax 0.10.2, CPU,
  2 x 2 x 2 mesh).
  """
  return nn.with_logical_constraint(x, ("act_batch", *(None,) * (x.ndim - 1)))


class Conv(nn.Conv):
  """A convolution whose maps are split over the batch alone."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, h, w, features]."""
    return by_rows(super().__call__(by_rows(x)))


def conv(
  features,
  name,
  *,
  strides=1,
  dtype="float32",
  init=None,
  axes=_CONV_AXES,
  padding=_BOTH_SIDES,
):
  """3 x 3 with one pixel of zeros on each side, as torch pads."""
  kernel_init = init or nn.initializers.lecun_normal()
  return Conv(
    features,
    (3, 3),
    strides=strides,
    padding=padding,
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


def remat(block: type[nn.Module], name: str) -> type[nn.Module]:
  """The block with a remat policy of `layers.REMAT`, for use in no scan."""
  if name == "none":
    return block
  return nn.remat(block, policy=layers.REMAT[name])


def timestep_features(
  t: jax.Array, width: int, cosines_first: bool = True, shift: float = 0
) -> jax.Array:
  """Sinusoids of numbers, their wavelengths from 2 pi to 20000 pi.

  Args:
    t: int[B] or float[B].
    width: of the result; an odd one ends with a zero.
    cosines_first: cosines, then sines, or the reverse.
    shift: 1 makes the longest wavelength 20000 pi exactly; diffusers'
      `freq_shift` (its `flip_sin_to_cos` is `cosines_first`).

  Returns:
    float32[B, width].
  """
  half = width // 2
  rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - shift))
  angles = t.astype(jnp.float32)[:, None] * rates
  parts = [jnp.cos(angles), jnp.sin(angles)]
  features = jnp.concatenate(parts if cosines_first else parts[::-1], axis=-1)
  return jnp.pad(features, ((0, 0), (0, 1))) if width % 2 else features


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
      activations.silu(h)
    )


class ResnetBlock(nn.Module):
  """Two convolutions with GroupNorm and SiLU; the time enters between."""

  channels: int
  groups: int
  dtype: str = "float32"
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """Maps float[B, h, w, C] and float[B, T] to float[B, h, w, channels].

    Without a time (in a VAE) the block has no `time_emb_proj`.
    """
    h = activations.silu(group_norm(self.groups, self.epsilon, "norm1")(x))
    h = conv(self.channels, "conv1", dtype=self.dtype)(h)
    if time is not None:
      axes = ("time", "conv_out")
      shift = layers.dense(
        self.channels, axes, name="time_emb_proj", dtype=self.dtype
      )
      h = h + by_rows(shift(activations.silu(time)))[:, None, None]
    h = activations.silu(group_norm(self.groups, self.epsilon, "norm2")(h))
    h = conv(self.channels, "conv2", dtype=self.dtype)(h)
    if x.shape[-1] != self.channels:
      axes = ("conv_in", "conv_out")
      x = layers.dense(
        self.channels, axes, name="conv_shortcut", dtype=self.dtype
      )(x)
    return by_rows(x + h)


class Attention(nn.Module):
  """Multi-head attention of float[B, L, D] to itself or to a condition.

  Attributes:
    mask_bias: None: what is masked is not seen at all. Else it stands for
      what diffusers adds to the logits of what is masked, -10000: the same,
      but a row all masked sees everything.
  """

  num_heads: int
  dtype: str = "float32"
  mask_bias: float | None = None

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
      return by_rows(y.reshape(*y.shape[:2], *split))  # [B, L, H, Dh]

    query, key = project(x, "to_q"), project(context, "to_k")
    value = project(context, "to_v")
    if mask is not None:
      if self.mask_bias is not None:
        mask = mask | ~mask.any(-1, keepdims=True)
      mask = mask[:, None, None]  # [B, 1, 1, N]
    out = by_rows(layers.attention(query, key, value, mask=mask))
    out = out.reshape(*x.shape[:2], width)
    axes = ("heads", "embed")
    out = layers.dense(width, axes, name="to_out_0", dtype=self.dtype)(out)
    return by_rows(out)


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
    h, gate = jnp.split(by_rows(h), 2, axis=-1)  # [B, L, F] each
    h = by_rows(h * activations.gelu(gate))
    axes = ("mlp", "embed")
    return by_rows(layers.dense(width, axes, name="net_2", dtype=self.dtype)(h))


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention to the condition, feed-forward."""

  num_heads: int
  ff_mult: int
  dtype: str = "float32"
  mask_bias: float | None = None

  @nn.compact
  def __call__(self, x, condition, mask=None):
    """Maps float[B, L, D], float[B, N, Dc] and bool[B, N] to float[B, L, D]."""
    x = by_rows(x)
    attn1 = Attention(self.num_heads, self.dtype, name="attn1")
    attn2 = Attention(self.num_heads, self.dtype, self.mask_bias, name="attn2")
    x = by_rows(x + attn1(layers.LayerNorm(name="norm1")(x)))
    x = by_rows(x + attn2(layers.LayerNorm(name="norm2")(x), condition, mask))
    ff = FeedForward(self.ff_mult, self.dtype, name="ff")
    return by_rows(x + ff(layers.LayerNorm(name="norm3")(x)))


class _ScannedBlock(TransformerBlock):
  """A layer in the form in which `layers.stack` wants it."""

  def __call__(self, x, told):
    """Maps float[B, L, D] and (condition, mask) to (float[B, L, D], None)."""
    return super().__call__(x, *told), None


class Transformer2D(nn.Module):
  """Transformer layers over the h * w places of a feature map.

  With `scan` several layers are one scan, their parameters stacked under
  `transformer_blocks`; else they are `transformer_blocks_0` and so on.
  """

  num_layers: int
  num_heads: int
  groups: int
  ff_mult: int
  dtype: str = "float32"
  mask_bias: float | None = None
  remat: str = "none"
  scan: bool = False

  @nn.compact
  def __call__(self, x, condition, mask=None):
    """Maps float[B, h, w, C] and the condition to float[B, h, w, C]."""
    batch, height, width, channels = x.shape
    h = group_norm(self.groups, 1e-6, "norm")(x)
    h = h.reshape(batch, height * width, channels)
    axes = ("conv_in", "conv_out")
    h = layers.dense(channels, axes, name="proj_in", dtype=self.dtype)(h)
    sizes = (self.num_heads, self.ff_mult, self.dtype, self.mask_bias)
    if self.scan and self.num_layers > 1:
      kind = layers.stack(_ScannedBlock, self.num_layers, self.remat)
      h, _ = kind(*sizes, name="transformer_blocks")(h, (condition, mask))
    else:
      kind = remat(TransformerBlock, self.remat)
      for i in range(self.num_layers):
        h = kind(*sizes, name=f"transformer_blocks_{i}")(h, condition, mask)
    h = layers.dense(channels, axes, name="proj_out", dtype=self.dtype)(h)
    return by_rows(x + h.reshape(x.shape))


class Downsample(nn.Module):
  """Convolution of stride two.

  Attributes:
    end_only: pad zeros at the right and the bottom alone, as VAEs do, not on
      all sides.
  """

  channels: int
  dtype: str = "float32"
  end_only: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, ceil(h / 2), ceil(w / 2), channels].

    Where only the end is padded, odd sides are halved downwards.
    """
    padding = ((0, 1), (0, 1)) if self.end_only else _BOTH_SIDES
    return conv(
      self.channels, "conv", strides=2, dtype=self.dtype, padding=padding
    )(x)


class Upsample(nn.Module):
  """Nearest neighbour, twice the size, then a convolution."""

  channels: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, size=None) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, 2 h, 2 w, channels].

    `size`, a pair no larger than that, cuts the map before the convolution:
    a map of odd size was halved upwards on its way down.
    """
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    if size is not None:
      x = x[:, : size[0], : size[1]]
    return conv(self.channels, "conv", dtype=self.dtype)(x)
