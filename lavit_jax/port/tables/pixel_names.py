"""The tables of `names.py` for the networks in diffusers' format.

A U-Net and its autoencoder have levels of different depth, so their tables
are made from a config, a row for every tensor, in the order of diffusers'
state_dict:

  unet   params of `unet.UNet`
  vae    params of `vae.AutoencoderKL`, under either generation of names for
         its attention

Names are the same on both sides, but for points there and underscores here.
"""

from collections.abc import Iterable

from lavit_jax.models.pixels import unet as unet_lib
from lavit_jax.models.pixels import vae as vae_lib
from lavit_jax.port.tables import names

# What a VAE's attention calls its projections: diffusers up to 0.16 wrote the
# second kind, Stable Diffusion 1.5's own file among others.
GENERATIONS = {
  "to_q": ("to_q", "to_k", "to_v", "to_out.0"),
  "query": ("query", "key", "value", "proj_attn"),
}
_OURS = ("to_q", "to_k", "to_v", "to_out_0")


def _norm(official: str, ours: str | None = None) -> names.Table:
  ours = official if ours is None else ours
  return (
    names.Row(f"{official}.weight", f"{ours}/scale"),
    names.Row(f"{official}.bias", f"{ours}/bias"),
  )


def _layer(
  official: str, transform: str, ours: str | None = None
) -> names.Table:
  """Kernel and bias of a matrix or convolution."""
  ours = official if ours is None else ours
  return (
    names.Row(f"{official}.weight", f"{ours}/kernel", transform),
    names.Row(f"{official}.bias", f"{ours}/bias"),
  )


def _kernel(official: str, ours: str) -> names.Row:
  return names.Row(f"{official}.weight", f"{ours}/kernel", "linear")


def _numbered(name: str, number: int, table: names.Table) -> names.Table:
  return names.under(f"{name}.{number}.", f"{name}_{number}/", table)


def _resnet(*, time: bool, shortcut: bool) -> names.Table:
  return (
    *_norm("norm1"),
    *_layer("conv1", "conv"),
    *(_layer("time_emb_proj", "linear") if time else ()),
    *_norm("norm2"),
    *_layer("conv2", "conv"),
    *(_layer("conv_shortcut", "pointwise") if shortcut else ()),
  )


def _cross_attention(name: str) -> names.Table:
  return (
    *(_kernel(f"{name}.{p}", f"{name}/{p}") for p in ("to_q", "to_k", "to_v")),
    *_layer(f"{name}.to_out.0", "linear", f"{name}/to_out_0"),
  )


_TRANSFORMER_BLOCK: names.Table = (
  *_norm("norm1"),
  *_cross_attention("attn1"),
  *_norm("norm2"),
  *_cross_attention("attn2"),
  *_norm("norm3"),
  *_layer("ff.net.0.proj", "linear", "ff/net_0_proj"),
  *_layer("ff.net.2", "linear", "ff/net_2"),
)


def _transformer(config: unet_lib.UNetConfig, level: int) -> names.Table:
  kind = "linear" if config.details.linear_projection else "pointwise"
  layers = range(config.transformer_layers[level])
  blocks = [
    _numbered("transformer_blocks", i, _TRANSFORMER_BLOCK) for i in layers
  ]
  return (
    *_norm("norm"),
    *_layer("proj_in", kind),
    *_joined(blocks),
    *_layer("proj_out", kind),
  )


def _joined(tables: Iterable[names.Table]) -> names.Table:
  return tuple(row for table in tables for row in table)


def _unet_level(
  config: unet_lib.UNetConfig, level: int, shortcuts, sampler: str | None
) -> names.Table:
  """A level, down or up; `shortcuts` has a bool for each residual block."""
  attention = _transformer(config, level)
  attentions = range(len(shortcuts)) if config.attention[level] else ()
  sampled = _numbered(f"{sampler}samplers", 0, _layer("conv", "conv"))
  return (
    *_joined(_numbered("attentions", j, attention) for j in attentions),
    *_joined(
      _numbered("resnets", j, _resnet(time=True, shortcut=shortcut))
      for j, shortcut in enumerate(shortcuts)
    ),
    *(sampled if sampler else ()),
  )


def _unet_mid(config: unet_lib.UNetConfig) -> names.Table:
  attention = _transformer(config, len(config.channels) - 1)
  resnet = _resnet(time=True, shortcut=False)
  return (
    *(_numbered("attentions", 0, attention) if config.mid_attention else ()),
    *_numbered("resnets", 0, resnet),
    *_numbered("resnets", 1, resnet),
  )


def _embedding(name: str) -> names.Table:
  table = (*_layer("linear_1", "linear"), *_layer("linear_2", "linear"))
  return names.under(f"{name}.", f"{name}/", table)


def unet(config: unet_lib.UNetConfig) -> names.Table:
  """The table of a U-Net: diffusers' `UNet2DConditionModel`."""
  widths, depths = config.channels, config.depths
  last = len(widths) - 1
  down, up = [], []
  for i in range(last + 1):
    wider = i > 0 and widths[i] != widths[i - 1]
    shortcuts = [wider, *[False] * (depths[i] - 1)]
    level = _unet_level(config, i, shortcuts, "down" if i < last else None)
    down.append(_numbered("down_blocks", i, level))
  for i, level in enumerate(range(last, -1, -1)):
    # The maps from the way down make every input wider than the output.
    shortcuts = [True] * (depths[level] + 1)
    table = _unet_level(config, level, shortcuts, "up" if level else None)
    up.append(_numbered("up_blocks", i, table))
  added = bool(config.details.added_dim)
  return (
    *_layer("conv_in", "conv"),
    *_embedding("time_embedding"),
    *(_embedding("add_embedding") if added else ()),
    *_joined(down),
    *_joined(up),
    *names.under("mid_block.", "mid_block/", _unet_mid(config)),
    *_norm("conv_norm_out"),
    *_layer("conv_out", "conv"),
  )


def _vae_mid(generation: str) -> names.Table:
  projections = zip(GENERATIONS[generation], _OURS, strict=True)
  attention = (
    *_norm("group_norm"),
    *_joined(_layer(name, "linear", ours) for name, ours in projections),
  )
  resnet = _resnet(time=False, shortcut=False)
  table = (
    *_numbered("attentions", 0, attention),
    *_numbered("resnets", 0, resnet),
    *_numbered("resnets", 1, resnet),
  )
  return names.under("mid_block.", "mid_block/", table)


def _vae_levels(name: str, widths, depth: int, sampler: str) -> names.Table:
  """The levels of an encoder or decoder, from its input on."""
  tables = []
  for i, width in enumerate(widths):
    wider = i > 0 and width != widths[i - 1]
    resnets = [
      _numbered("resnets", j, _resnet(time=False, shortcut=wider and j == 0))
      for j in range(depth)
    ]
    sampled = _numbered(f"{sampler}samplers", 0, _layer("conv", "conv"))
    last = i == len(widths) - 1
    table = (*_joined(resnets), *(() if last else sampled))
    tables.append(_numbered(name, i, table))
  return _joined(tables)


def vae(config: vae_lib.VaeConfig, generation: str = "to_q") -> names.Table:
  """The table of an autoencoder: diffusers' `AutoencoderKL`.

  Args:
    config: its sizes.
    generation: of names, a key of GENERATIONS; see `vae_generation`.
  """
  widths, depth = config.channels, config.layers_per_block
  output = (*_norm("conv_norm_out"), *_layer("conv_out", "conv"))
  mid = _vae_mid(generation)
  encoder = (
    *_layer("conv_in", "conv"),
    *_vae_levels("down_blocks", widths, depth, "down"),
    *mid,
    *output,
  )
  decoder = (
    *_layer("conv_in", "conv"),
    *_vae_levels("up_blocks", widths[::-1], depth + 1, "up"),
    *mid,
    *output,
  )
  return (
    *names.under("encoder.", "encoder/", encoder),
    *names.under("decoder.", "decoder/", decoder),
    *_layer("quant_conv", "pointwise"),
    *_layer("post_quant_conv", "pointwise"),
  )


def vae_generation(tensor_names: Iterable[str]) -> str:
  """Which names the attention of an autoencoder's file has.

  Files that mix both are not known to exist; the names that do not fit the
  table are then listed as missing and unknown.
  """
  old = any(name.endswith(".query.weight") for name in tensor_names)
  return "query" if old else "to_q"
