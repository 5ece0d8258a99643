"""Sizes of U-Nets and autoencoders in diffusers' config.json, read and written.

Every field of a file is either used or must have the value that the networks
here have; any other value, and any field unknown to diffusers, is an error
that names it. Fields that a file lacks have diffusers' defaults.

  fields = json.loads((folder / "config.json").read_text())
  config = unet_config(fields, "unet/config.json")
  table = pixel_names.unet(config)
  tree = abstract_unet(config)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port.diffusers import network_fields
from lavit_jax.port.formats import config_fields
from lavit_jax.port.tables import sizes

_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_VAE_DOWN, _VAE_UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_ANY = config_fields.ANY

# Fields that are used, with diffusers' defaults.
_UNET_USED = {
  "in_channels": 4,
  "out_channels": 4,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
  "up_block_types": (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
  "block_out_channels": (320, 640, 1280, 1280),
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "norm_eps": 1e-5,
  "cross_attention_dim": 1280,
  "transformer_layers_per_block": 1,
  "attention_head_dim": 8,
  "num_attention_heads": None,
  "use_linear_projection": False,
  "addition_embed_type": None,
  "addition_time_embed_dim": None,
  "projection_class_embeddings_input_dim": None,
}
# Fields that must have one of these values, lists in each entry.
_UNET_FIXED = {
  "sample_size": _ANY,  # the default size of images; no weight depends on it
  "center_input_sample": (False,),
  "mid_block_type": ("UNetMidBlock2DCrossAttn",),
  "only_cross_attention": (False,),
  "downsample_padding": (1,),
  "mid_block_scale_factor": (1,),
  "dropout": (0,),
  "act_fn": ("silu", "swish"),
  "reverse_transformer_layers_per_block": (None,),
  "encoder_hid_dim": (None,),
  "encoder_hid_dim_type": (None,),
  "dual_cross_attention": (False,),
  "class_embed_type": (None,),
  "num_class_embeds": (None,),
  "upcast_attention": _ANY,  # the softmax here is in float32 anyway
  "resnet_time_scale_shift": ("default",),
  "resnet_skip_time_act": (False,),
  "resnet_out_scale_factor": (1,),
  "time_embedding_type": ("positional",),
  "time_embedding_dim": (None,),
  "time_embedding_act_fn": (None,),
  "timestep_post_act": (None,),
  "time_cond_proj_dim": (None,),
  "conv_in_kernel": (3,),
  "conv_out_kernel": (3,),
  "attention_type": ("default",),
  "class_embeddings_concat": (False,),
  "mid_block_only_cross_attention": (None, False),
  "cross_attention_norm": (None,),
  "addition_embed_type_num_heads": _ANY,  # of another addition_embed_type
}
_VAE_USED = {
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": (_VAE_DOWN,),
  "up_block_types": (_VAE_UP,),
  "block_out_channels": (64,),
  "layers_per_block": 1,
  "latent_channels": 4,
  "norm_num_groups": 32,
  "sample_size": 32,
  "scaling_factor": 0.18215,
  "force_upcast": True,
}
_VAE_FIXED = {
  "act_fn": ("silu", "swish"),
  "shift_factor": (None, 0),
  "latents_mean": (None,),
  "latents_std": (None,),
  "use_quant_conv": (True,),
  "use_post_quant_conv": (True,),
  "mid_block_add_attention": (True,),
}


def unet_config(
  fields: Mapping[str, Any],
  label: str = "config.json",
  *,
  dtype: str = "float32",
) -> unet.UNetConfig:
  """Returns the sizes of a U-Net from the fields of its config.json.

  Args:
    fields: the content of the file.
    label: how messages name the file.
    dtype: of the computation.

  Raises:
    errors.CheckpointError: fields are unknown, or have values that the U-Net
      here does not implement; the error lists all.
  """
  file = network_fields.NetworkFields(
    label, fields, "UNet2DConditionModel", _UNET_USED, _UNET_FIXED
  )
  values = _unet_levels(file) | {
    "in_channels": file.positive_int("in_channels"),
    "out_channels": file.positive_int("out_channels"),
    "groups": file.positive_int("norm_num_groups"),
    "dtype": dtype,
    "details": _quirks(file),
  }
  return file.build(lambda: unet.UNetConfig(**values))


def _unet_levels(file: network_fields.NetworkFields) -> dict[str, Any]:
  """Returns the arguments of UNetConfig that differ between levels."""
  widths = file.positive_ints("block_out_channels")
  levels = len(widths)
  attention = _attention(file, levels)
  heads = "num_attention_heads"
  if file.value(heads) is None:
    heads = "attention_head_dim"  # diffusers' misnomer: the number of heads
  layers = file.per_level("transformer_layers_per_block", levels)
  depths = file.per_level("layers_per_block", levels)
  cross = file.per_level("cross_attention_dim", levels)
  if len(set(cross)) > 1:
    file.wrong("cross_attention_dim", "one width for all levels")
  return {
    "channels": widths,
    "layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
    "attention": attention,
    "transformer_layers": layers,
    "num_heads": file.per_level(heads, levels),
    "cross_dim": cross[0],
  }


def _quirks(file: network_fields.NetworkFields) -> dict[str, Any]:
  """Returns the arguments of DiffusersQuirks."""
  added_dim, added_time_dim = _added(file)
  return {
    "norm_eps": file.positive_number("norm_eps"),
    "cosines_first": file.boolean("flip_sin_to_cos"),
    "freq_shift": file.positive_number("freq_shift", least=0),
    "linear_projection": file.boolean("use_linear_projection"),
    "mask_bias": unet.MASK_BIAS,
    "added_dim": added_dim,
    "added_time_dim": added_time_dim,
  }


def _attention(
  file: network_fields.NetworkFields, levels: int
) -> tuple[bool, ...]:
  """Returns which levels have transformers, on the way down and up alike."""
  down, up = file.strings("down_block_types"), file.strings("up_block_types")
  kinds = {_CROSS_DOWN: True, _DOWN: False}
  if len(down) != levels or set(down) - set(kinds):
    file.wrong("down_block_types", f"{levels} of {' and '.join(kinds)}")
    return (False,) * levels
  attention = tuple(kinds[name] for name in down)
  mirrored = [_CROSS_UP if crossed else _UP for crossed in attention[::-1]]
  if up != mirrored:
    file.wrong("up_block_types", f"those that mirror the way down: {mirrored}")
  return attention


def _added(file: network_fields.NetworkFields) -> tuple[int, int]:
  """Returns the widths of SDXL's additional embedding: in all, and a size's."""
  kind = file.value("addition_embed_type")
  if kind is None:
    return 0, 0
  if kind != "text_time":
    file.wrong("addition_embed_type", "'text_time' or null")
    return 0, 0
  return (
    file.positive_int("projection_class_embeddings_input_dim"),
    file.positive_int("addition_time_embed_dim"),
  )


def vae_config(
  fields: Mapping[str, Any],
  label: str = "config.json",
  *,
  dtype: str = "float32",
) -> vae.VaeConfig:
  """Returns the sizes of an autoencoder from the fields of its config.json.

  Args:
    fields: the content of the file.
    label: how messages name the file.
    dtype: of the computation, unless the file sets `force_upcast`.

  Raises:
    errors.CheckpointError: as `unet_config`.
  """
  file = network_fields.NetworkFields(
    label, fields, "AutoencoderKL", _VAE_USED, _VAE_FIXED
  )
  widths = file.positive_ints("block_out_channels")
  for name, block in (
    ("down_block_types", _VAE_DOWN),
    ("up_block_types", _VAE_UP),
  ):
    expected = [block] * len(widths)
    if file.strings(name) != expected:
      file.wrong(name, f"{expected}, one for each width")
  values: dict[str, Any] = {
    "in_channels": file.positive_int("in_channels"),
    "out_channels": file.positive_int("out_channels"),
    "channels": widths,
    "layers_per_block": file.positive_int("layers_per_block"),
    "latent_channels": file.positive_int("latent_channels"),
    "groups": file.positive_int("norm_num_groups"),
    "sample_size": file.positive_int("sample_size"),
    "scaling_factor": file.positive_number("scaling_factor"),
    "force_upcast": file.boolean("force_upcast"),
    "dtype": dtype,
  }
  return file.build(lambda: vae.VaeConfig(**values))


def unet_fields(config: unet.UNetConfig) -> dict[str, Any]:
  """Returns the fields of a config.json from which diffusers makes a U-Net.

  Raises:
    errors.ConfigError: diffusers has no such U-Net.
  """
  _require_diffusers_unet(config)
  details = config.details
  return {
    "_class_name": "UNet2DConditionModel",
    "in_channels": config.in_channels,
    "out_channels": config.out_channels,
    "flip_sin_to_cos": details.cosines_first,
    "freq_shift": details.freq_shift,
    "down_block_types": [
      _CROSS_DOWN if crossed else _DOWN for crossed in config.attention
    ],
    "up_block_types": [
      _CROSS_UP if crossed else _UP for crossed in config.attention[::-1]
    ],
    "block_out_channels": list(config.channels),
    "layers_per_block": config.layers_per_block
    if isinstance(config.layers_per_block, int)
    else list(config.depths),
    "norm_num_groups": config.groups,
    "norm_eps": details.norm_eps,
    "cross_attention_dim": config.cross_dim,
    "transformer_layers_per_block": list(config.transformer_layers),
    "attention_head_dim": list(config.num_heads),
    "use_linear_projection": details.linear_projection,
    "addition_embed_type": "text_time" if details.added_dim else None,
    "addition_time_embed_dim": details.added_time_dim or None,
    "projection_class_embeddings_input_dim": details.added_dim or None,
  }


def _require_diffusers_unet(config):
  fixed = {"ff_mult": 4, "mid_attention": True}
  if other := [n for n, v in fixed.items() if getattr(config, n) != v]:
    raise errors.ConfigError(
      f"A U-Net with {', '.join(f'{n}={getattr(config, n)}' for n in other)}"
      " cannot be written for diffusers, whose U-Nets have"
      f" {', '.join(f'{n}={fixed[n]}' for n in other)}."
    )


def vae_fields(config: vae.VaeConfig) -> dict[str, Any]:
  """Returns the fields from which diffusers makes an autoencoder."""
  levels = len(config.channels)
  return {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": list(config.channels),
    "down_block_types": [_VAE_DOWN] * levels,
    "force_upcast": config.force_upcast,
    "in_channels": config.in_channels,
    "latent_channels": config.latent_channels,
    "layers_per_block": config.layers_per_block,
    "norm_num_groups": config.groups,
    "out_channels": config.out_channels,
    "sample_size": config.sample_size,
    "scaling_factor": config.scaling_factor,
    "up_block_types": [_VAE_UP] * levels,
  }


def abstract_unet(config: unet.UNetConfig) -> dict[str, Any]:
  """Returns the abstract params of `unet.UNet`."""
  side = 2 ** (len(config.channels) - 1)
  inputs: list[Any] = [
    jnp.zeros((1, side, side, config.in_channels)),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 1, config.cross_dim)),
  ]
  details = config.details
  if details.added_dim:  # every split of the width has the same parameters
    pooled = jnp.zeros((1, details.added_dim - details.added_time_dim))
    inputs += [None, pooled, jnp.zeros((1, 1))]
  return sizes.abstract_variables(unet.UNet(config), *inputs)["params"]


def abstract_vae(config: vae.VaeConfig) -> dict[str, Any]:
  """Returns the abstract params of `vae.AutoencoderKL`."""
  shape = (1, config.scale, config.scale, config.in_channels)
  module = vae.AutoencoderKL(config)
  return sizes.abstract_variables(module, jnp.zeros(shape))["params"]


class Kind(NamedTuple):
  """One of the two networks of a pixel decoder in diffusers' format.

  Attributes:
    config: class of its sizes.
    read: makes them from the fields of a config.json and a label.
    fields: makes these fields from them.
    abstract: makes the abstract params.
  """

  config: Callable[..., Any]
  read: Callable[..., Any]
  fields: Callable[[Any], dict[str, Any]]
  abstract: Callable[[Any], dict[str, Any]]


KINDS = {
  "unet": Kind(unet.UNetConfig, unet_config, unet_fields, abstract_unet),
  "vae": Kind(vae.VaeConfig, vae_config, vae_fields, abstract_vae),
}
