"""Blocks of the U-Net: convolutions, residual blocks and transformers.

Names and order are those of diffusers (see `unet`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import activations, layers

SCAN_NAME = "transformer_blocks"  # of the scanned layers of a transformer

_BOTH_SIDES = ((1, 1), (1, 1))
_CONV_AXES = ("conv", None, "conv_in", "conv_out")
# Axes of convolutions from and to few channels, which are not split.
INPUT_AXES = ("conv", None, None, "conv_out")
OUTPUT_AXES = ("conv", None, "conv_in", None)


def split_by_batch(x: jax.Array) -> jax.Array:
  """Constrains the sharding of x[B, ...] to the batch axis.

  Without the constraint, XLA also splits channels and positions where weights
  are split over them: for SDXL it then sent activations instead of weights and
  multiplied more, and gradients of whole U-Nets were wrong (jax 0.10.2, CPU,
  2 x 2 x 2 mesh).
  """
  return nn.with_logical_constraint(x, ("act_batch", *(None,) * (x.ndim - 1)))


class Conv(nn.Conv):
  """A convolution whose feature maps are split over the batch only."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, h, w, features]."""
    return split_by_batch(super().__call__(split_by_batch(x)))


def conv(
  features: int,
  name: str,
  *,
  strides: int = 1,
  dtype: str = "float32",
  init: Callable[..., Any] | None = None,
  axes: Sequence[str | None] = _CONV_AXES,
  padding: Any = _BOTH_SIDES,
) -> Conv:
  """Returns a 3 x 3 convolution, by default padded as PyTorch's.

  Args:
    features: channels of the output.
    name: of the module.
    strides: 1, or 2 to halve height and width.
    dtype: of the computation.
    init: of the kernel; LeCun normal by default.
    axes: logical axes of the kernel [3, 3, C, features].
    padding: pixels before and after, for each of height and width.
  """
  kernel_init = init or layers.LECUN_NORMAL
  return Conv(
    features,
    (3, 3),
    strides=strides,
    padding=padding,
    dtype=dtype,
    kernel_init=layers.partitioned(kernel_init, axes),
    bias_init=layers.partitioned(nn.initializers.zeros, axes[3:]),
    name=name,
  )


def group_norm(groups: int, epsilon: float, name: str) -> nn.GroupNorm:
  """Returns a GroupNorm in float32, its variance from the centred values."""
  return nn.GroupNorm(
    num_groups=groups,
    epsilon=epsilon,
    use_fast_variance=False,
    dtype=jnp.float32,
    scale_init=layers.partitioned(nn.initializers.ones, ("norm",)),
    bias_init=layers.partitioned(nn.initializers.zeros, ("norm",)),
    name=name,
  )


def remat(block: type[nn.Module], name: str) -> type[nn.Module]:
  """Returns the block with a policy of `layers.REMAT`, for use without scan."""
  if name == "none":
    return block
  return nn.remat(block, policy=layers.REMAT[name])


def timestep_features(
  t: jax.Array, width: int, cosines_first: bool = True, shift: float = 0
) -> jax.Array:
  """Computes sinusoids of numbers, with wavelengths from 2 pi to 20000 pi.

  Args:
    t: int[B] or float[B].
    width: of the result; an odd one ends with a zero.
    cosines_first: whether cosines come before sines.
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
  """Embeds the sinusoids of t: Linear, SiLU, Linear."""

  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps float[B, C] to float[B, width]."""
    dense = functools.partial(layers.dense, self.width, dtype=self.dtype)
    h = dense(("embed", "mlp"), name="linear_1")(features)
    return dense(("mlp", "embed"), name="linear_2")(activations.silu(h))


class ResnetBlock(nn.Module):
  """Two convolutions with GroupNorm and SiLU; the step enters between them."""

  channels: int
  groups: int
  dtype: str = "float32"
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """Maps float[B, h, w, C] and float[B, T] to float[B, h, w, channels].

    Without `time`, the step's embedding, as in a VAE, the block has no
    `time_emb_proj`.
    """
    h = activations.silu(group_norm(self.groups, self.epsilon, "norm1")(x))
    h = conv(self.channels, "conv1", dtype=self.dtype)(h)
    if time is not None:
      axes = ("time", "conv_out")
      shift = layers.dense(
        self.channels, axes, name="time_emb_proj", dtype=self.dtype
      )
      h = h + split_by_batch(shift(activations.silu(time)))[:, None, None]
    h = activations.silu(group_norm(self.groups, self.epsilon, "norm2")(h))
    h = conv(self.channels, "conv2", dtype=self.dtype)(h)
    if x.shape[-1] != self.channels:
      axes = ("conv_in", "conv_out")
      x = layers.dense(
        self.channels, axes, name="conv_shortcut", dtype=self.dtype
      )(x)
    return split_by_batch(x + h)


class Attention(nn.Module):
  """Multi-head attention of float[B, L, D] to itself or to a condition.

  Attributes:
    num_heads: H.
    dtype: of the computation; parameters are float32.
    mask_bias: None: there is no attention to masked tokens. Else it stands for
      the number that diffusers adds to the logits of masked tokens, -10000.
      The result is the same, except that a fully masked row attends to all.
  """

  num_heads: int
  dtype: str = "float32"
  mask_bias: float | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Attends from x to the context, by default to itself.

    Args:
      x: float[B, L, D].
      context: float[B, N, Dc] or None.
      mask: bool[B, N], False for masked tokens of the context.

    Returns:
      float[B, L, D].
    """
    width = x.shape[-1]
    context = x if context is None else context

    def project(y, name):
      dense = layers.dense(
        width, ("embed", "heads"), name=name, use_bias=False, dtype=self.dtype
      )
      y = einops.rearrange(dense(y), "b l (h d) -> b l h d", h=self.num_heads)
      return split_by_batch(y)

    query, key = project(x, "to_q"), project(context, "to_k")
    value = project(context, "to_v")
    if mask is not None:
      if self.mask_bias is not None:
        mask = mask | ~mask.any(-1, keepdims=True)
      mask = mask[:, None, None]  # [B, 1, 1, N]
    out = split_by_batch(layers.attention(query, key, value, mask=mask))
    out = einops.rearrange(out, "b l h d -> b l (h d)")
    axes = ("heads", "embed")
    out = layers.dense(width, axes, name="to_out_0", dtype=self.dtype)(out)
    return split_by_batch(out)


class FeedForward(nn.Module):
  """GEGLU block with the exact GELU; `mult` is hidden over model width."""

  mult: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, L, D] to float[B, L, D]."""
    width = x.shape[-1]
    hidden = self.mult * width
    axes = ("embed", "mlp")
    h = layers.dense(2 * hidden, axes, name="net_0_proj", dtype=self.dtype)(x)
    h, gate = jnp.split(split_by_batch(h), 2, axis=-1)  # [B, L, F] each
    h = split_by_batch(h * activations.gelu(gate))
    axes = ("mlp", "embed")
    return split_by_batch(
      layers.dense(width, axes, name="net_2", dtype=self.dtype)(h)
    )


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention to the condition, feed-forward."""

  num_heads: int
  ff_mult: int
  dtype: str = "float32"
  mask_bias: float | None = None

  @nn.compact
  def __call__(
    self, x: jax.Array, condition: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps float[B, L, D], float[B, N, Dc] and bool[B, N] to float[B, L, D]."""
    x = split_by_batch(x)
    attn1 = Attention(self.num_heads, self.dtype, name="attn1")
    attn2 = Attention(self.num_heads, self.dtype, self.mask_bias, name="attn2")
    x = split_by_batch(x + attn1(layers.LayerNorm(name="norm1")(x)))
    x = split_by_batch(
      x + attn2(layers.LayerNorm(name="norm2")(x), condition, mask)
    )
    ff = FeedForward(self.ff_mult, self.dtype, name="ff")
    return split_by_batch(x + ff(layers.LayerNorm(name="norm3")(x)))


class _ScannedBlock(TransformerBlock):
  """A layer in the form that `layers.stack` expects."""

  def __call__(self, x, context):
    """Maps float[B, L, D] and (condition, mask) to (float[B, L, D], None)."""
    return super().__call__(x, *context), None


class Transformer2D(nn.Module):
  """Transformer layers over the h * w positions of a feature map.

  With `scan` several layers are one scan, their parameters stacked under
  `transformer_blocks`; without, they are `transformer_blocks_0` and so on.
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
  def __call__(
    self, x: jax.Array, condition: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps float[B, h, w, C], a condition and its mask to float[B, h, w, C]."""
    channels = x.shape[-1]
    h = group_norm(self.groups, 1e-6, "norm")(x)
    h = einops.rearrange(h, "b h w c -> b (h w) c")
    axes = ("conv_in", "conv_out")
    h = layers.dense(channels, axes, name="proj_in", dtype=self.dtype)(h)
    sizes = (self.num_heads, self.ff_mult, self.dtype, self.mask_bias)
    if self.scan and self.num_layers > 1:
      kind = layers.stack(self, _ScannedBlock, self.num_layers, self.remat)
      h, _ = kind(*sizes, name=SCAN_NAME)(h, (condition, mask))
    else:
      kind = remat(TransformerBlock, self.remat)
      for i in range(self.num_layers):
        h = kind(*sizes, name=f"{SCAN_NAME}_{i}")(h, condition, mask)
    h = layers.dense(channels, axes, name="proj_out", dtype=self.dtype)(h)
    return split_by_batch(x + h.reshape(x.shape))


class Downsample(nn.Module):
  """Convolution of stride two.

  Attributes:
    channels: of the output.
    dtype: of the computation.
    end_only: pad at the right and the bottom only, as VAEs do, not on all
      sides.
  """

  channels: int
  dtype: str = "float32"
  end_only: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float[B, ceil(h / 2), ceil(w / 2), channels].

    With `end_only`, odd heights and widths are rounded down.
    """
    padding = ((0, 1), (0, 1)) if self.end_only else _BOTH_SIDES
    return conv(
      self.channels, "conv", strides=2, dtype=self.dtype, padding=padding
    )(x)


class Upsample(nn.Module):
  """Nearest-neighbour upsampling by two, then a convolution."""

  channels: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: jax.Array, size: Sequence[int] | None = None
  ) -> jax.Array:
    """Upsamples and convolves.

    Args:
      x: float[B, h, w, C].
      size: height and width to cut the upsampled map to: an odd size was
        rounded up on the way down.

    Returns:
      float[B, 2 h, 2 w, channels], or of the given size.
    """
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    if size is not None:
      x = x[:, : size[0], : size[1]]
    return conv(self.channels, "conv", dtype=self.dtype)(x)
