"""Name tables of the networks in diffusers' format: U-Net and autoencoder.

Their levels differ in depth, so each table is made from a config, with one row
for every tensor in the order of diffusers' state_dict. The paths lead into

  unet   params of `unet.UNet`
  vae    params of `vae.AutoencoderKL`; its attention has names of one of two
         generations

Names and paths are the same but for dots there and underscores here.
"""

from collections.abc import Iterable

from lavit_jax.models.pixels import unet as unet_lib
from lavit_jax.models.pixels import vae as vae_lib
from lavit_jax.port.tables import rows

# Names of the projections in a VAE's attention. Diffusers up to 0.16 wrote the
# second generation, for example the file of Stable Diffusion 1.5.
GENERATIONS = {
  "to_q": ("to_q", "to_k", "to_v", "to_out.0"),
  "query": ("query", "key", "value", "proj_attn"),
}
_PATHS = ("to_q", "to_k", "to_v", "to_out_0")


def _numbered(name: str, number: int, table: rows.Table) -> rows.Table:
  return rows.under(f"{name}.{number}.", f"{name}_{number}/", table)


def _resnet(*, time: bool, shortcut: bool) -> rows.Table:
  return (
    *rows.norm("norm1", "norm1"),
    *rows.layer("conv1", "conv1", "conv"),
    *(rows.layer("time_emb_proj", "time_emb_proj", "linear") if time else ()),
    *rows.norm("norm2", "norm2"),
    *rows.layer("conv2", "conv2", "conv"),
    *(
      rows.layer("conv_shortcut", "conv_shortcut", "pointwise")
      if shortcut
      else ()
    ),
  )


def _cross_attention(name: str) -> rows.Table:
  return (
    rows.kernel(f"{name}.to_q", f"{name}/to_q"),
    rows.kernel(f"{name}.to_k", f"{name}/to_k"),
    rows.kernel(f"{name}.to_v", f"{name}/to_v"),
    *rows.layer(f"{name}.to_out.0", f"{name}/to_out_0"),
  )


_TRANSFORMER_BLOCK: rows.Table = (
  *rows.norm("norm1", "norm1"),
  *_cross_attention("attn1"),
  *rows.norm("norm2", "norm2"),
  *_cross_attention("attn2"),
  *rows.norm("norm3", "norm3"),
  *rows.layer("ff.net.0.proj", "ff/net_0_proj"),
  *rows.layer("ff.net.2", "ff/net_2"),
)


def _transformer(config: unet_lib.UNetConfig, level: int) -> rows.Table:
  kind = "linear" if config.details.linear_projection else "pointwise"
  layers = range(config.transformer_layers[level])
  blocks = [
    _numbered("transformer_blocks", i, _TRANSFORMER_BLOCK) for i in layers
  ]
  return (
    *rows.norm("norm", "norm"),
    *rows.layer("proj_in", "proj_in", kind),
    *rows.joined(blocks),
    *rows.layer("proj_out", "proj_out", kind),
  )


def _unet_level(
  config: unet_lib.UNetConfig, level: int, shortcuts, sampler: str | None
) -> rows.Table:
  """Returns a level, down or up.

  Args:
    config: of the U-Net.
    level: its number, from fine to coarse.
    shortcuts: whether each of its residual blocks has a shortcut.
    sampler: "down", "up", or None for a level that keeps its size.
  """
  attention = _transformer(config, level)
  attentions = range(len(shortcuts)) if config.attention[level] else ()
  sampled = _numbered(
    f"{sampler}samplers", 0, rows.layer("conv", "conv", "conv")
  )
  return (
    *rows.joined(_numbered("attentions", j, attention) for j in attentions),
    *rows.joined(
      _numbered("resnets", j, _resnet(time=True, shortcut=shortcut))
      for j, shortcut in enumerate(shortcuts)
    ),
    *(sampled if sampler else ()),
  )


def _unet_mid(config: unet_lib.UNetConfig) -> rows.Table:
  attention = _transformer(config, len(config.channels) - 1)
  resnet = _resnet(time=True, shortcut=False)
  return (
    *(_numbered("attentions", 0, attention) if config.mid_attention else ()),
    *_numbered("resnets", 0, resnet),
    *_numbered("resnets", 1, resnet),
  )


def _embedding(name: str) -> rows.Table:
  table = (
    *rows.layer("linear_1", "linear_1", "linear"),
    *rows.layer("linear_2", "linear_2", "linear"),
  )
  return rows.under(f"{name}.", f"{name}/", table)


def unet(config: unet_lib.UNetConfig) -> rows.Table:
  """Returns the table of a U-Net: diffusers' `UNet2DConditionModel`."""
  widths, depths = config.channels, config.depths
  last = len(widths) - 1
  down, up = [], []
  for i in range(last + 1):
    wider = i > 0 and widths[i] != widths[i - 1]
    shortcuts = [wider, *[False] * (depths[i] - 1)]
    level = _unet_level(config, i, shortcuts, "down" if i < last else None)
    down.append(_numbered("down_blocks", i, level))
  for i, number in enumerate(range(last, -1, -1)):
    # Every input is wider than the output by the maps of the way down.
    shortcuts = [True] * (depths[number] + 1)
    table = _unet_level(config, number, shortcuts, "up" if number else None)
    up.append(_numbered("up_blocks", i, table))
  added = bool(config.details.added_dim)
  return (
    *rows.layer("conv_in", "conv_in", "conv"),
    *_embedding("time_embedding"),
    *(_embedding("add_embedding") if added else ()),
    *rows.joined(down),
    *rows.joined(up),
    *rows.under("mid_block.", "mid_block/", _unet_mid(config)),
    *rows.norm("conv_norm_out", "conv_norm_out"),
    *rows.layer("conv_out", "conv_out", "conv"),
  )


def _vae_mid(generation: str) -> rows.Table:
  projections = zip(GENERATIONS[generation], _PATHS, strict=True)
  attention = (
    *rows.norm("group_norm", "group_norm"),
    *rows.joined(rows.layer(name, path) for name, path in projections),
  )
  resnet = _resnet(time=False, shortcut=False)
  table = (
    *_numbered("attentions", 0, attention),
    *_numbered("resnets", 0, resnet),
    *_numbered("resnets", 1, resnet),
  )
  return rows.under("mid_block.", "mid_block/", table)


def _vae_levels(name: str, widths, depth: int, sampler: str) -> rows.Table:
  """Returns the levels of an encoder or decoder, from its input on."""
  tables = []
  for i, width in enumerate(widths):
    wider = i > 0 and width != widths[i - 1]
    resnets = [
      _numbered("resnets", j, _resnet(time=False, shortcut=wider and j == 0))
      for j in range(depth)
    ]
    sampled = _numbered(
      f"{sampler}samplers", 0, rows.layer("conv", "conv", "conv")
    )
    last = i == len(widths) - 1
    table = (*rows.joined(resnets), *(() if last else sampled))
    tables.append(_numbered(name, i, table))
  return rows.joined(tables)


def vae(config: vae_lib.VaeConfig, generation: str = "to_q") -> rows.Table:
  """Returns the table of an autoencoder: diffusers' `AutoencoderKL`.

  Args:
    config: its sizes.
    generation: of its names, a key of GENERATIONS; see `vae_generation`.
  """
  widths, depth = config.channels, config.layers_per_block
  output = (
    *rows.norm("conv_norm_out", "conv_norm_out"),
    *rows.layer("conv_out", "conv_out", "conv"),
  )
  mid = _vae_mid(generation)
  encoder = (
    *rows.layer("conv_in", "conv_in", "conv"),
    *_vae_levels("down_blocks", widths, depth, "down"),
    *mid,
    *output,
  )
  decoder = (
    *rows.layer("conv_in", "conv_in", "conv"),
    *_vae_levels("up_blocks", widths[::-1], depth + 1, "up"),
    *mid,
    *output,
  )
  return (
    *rows.under("encoder.", "encoder/", encoder),
    *rows.under("decoder.", "decoder/", decoder),
    *rows.layer("quant_conv", "quant_conv", "pointwise"),
    *rows.layer("post_quant_conv", "post_quant_conv", "pointwise"),
  )


def vae_generation(tensor_names: Iterable[str]) -> str:
  """Returns the key of GENERATIONS that an autoencoder's names belong to.

  No file is known to mix generations. Of such a file, the names that do not
  fit the table would be listed as missing and not used.
  """
  old = any(name.endswith(".query.weight") for name in tensor_names)
  return "query" if old else "to_q"


def table_of(
  config: unet_lib.UNetConfig | vae_lib.VaeConfig, generation: str = "to_q"
) -> rows.Table:
  """Returns the table of either network.

  Args:
    config: of a U-Net or an autoencoder.
    generation: of an autoencoder's names; a U-Net ignores it.
  """
  if isinstance(config, vae_lib.VaeConfig):
    return vae(config, generation)
  return unet(config)
