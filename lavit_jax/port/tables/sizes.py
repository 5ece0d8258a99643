"""Sizes of networks from the shapes of their tensors, and shapes from sizes.

No official file says a size: all are read off the tensors, by majority where
several tensors show the same one. Head counts show in no shape and are given.
The `abstract_*` functions turn a config into the shapes its module has.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.port.tables import names

_EVA_HEAD = 1024  # of the official file
_DEFAULT_HEADS = 16

Shapes = Mapping[str, tuple[int, ...]]


class Unknown(Exception):
  """The tensors that would show a size are missing or have another rank."""


def _vote(shapes: Shapes, ends: Sequence[tuple[str, int, int]]) -> int:
  """The size that most tensors show.

  Args:
    shapes: by official name.
    ends: (end of the name, rank, axis) of tensors that show it.
  """
  votes = collections.Counter(
    shape[axis]
    for name, shape in shapes.items()
    for end, rank, axis in ends
    if name.endswith(end) and len(shape) == rank
  )
  if not votes:
    raise Unknown(ends[0][0])
  return votes.most_common(1)[0][0]


def vit(shapes: Shapes, heads: int, with_head: bool) -> vision.ViTConfig:
  """Sizes of the encoder.

  Args:
    shapes: of names.ENCODER.
    heads: attention heads.
    with_head: whether final norm and `head` belong to it.

  Raises:
    Unknown: a tensor that shows a size is missing.
    errors.CheckpointError: the patches are no square.
  """
  places = _vote(shapes, [("pos_embed", 3, 1)]) - 1
  side = math.isqrt(max(places, 0))
  if side * side != places or not side:
    raise errors.CheckpointError(
      f"pos_embed of the encoder has {places + 1} places: expected one for the"
      " CLS token and a square number for the patches."
    )
  patch = _vote(shapes, [("patch_embed.proj.weight", 4, 3)])
  head = 0
  if with_head:
    ends = [("head.weight", 2, 0), ("head.bias", 1, 0)]
    shown = any(name.startswith("head.") for name in shapes)
    head = _vote(shapes, ends) if shown else _EVA_HEAD
  return vision.ViTConfig(
    image_size=side * patch,
    patch_size=patch,
    width=_vote(shapes, [("norm1.weight", 1, 0), ("cls_token", 3, 2)]),
    depth=names.depth_of(names.ENCODER, shapes),
    num_heads=heads,
    mlp_dim=_vote(shapes, [("mlp.fc1.bias", 1, 0)]),
    head_dim_out=head,
  )


def _blocks(shapes: Shapes, table: names.Table, heads: int) -> dict[str, int]:
  return {
    "width": _vote(shapes, [("norm0.weight", 1, 0)]),
    "depth": names.depth_of(table, shapes),
    "num_heads": heads,
    "mlp_dim": _vote(shapes, [("mlp.fc1.bias", 1, 0)]),
  }


def semantic_decoder(
  shapes: Shapes, table: names.Table, heads: int
) -> decoder.DecoderConfig:
  """Sizes of the decoder in a file of names.LOWRES or HIGHRES."""
  return decoder.DecoderConfig(
    **_blocks(shapes, table, heads),
    num_patches=_vote(shapes, [("query_embed", 3, 1), ("pos_embed", 3, 1)]),
    code_dim=_vote(shapes, [("in_proj.weight", 2, 1)]),
    out_dim=_vote(shapes, [("decode_task_layer.2.bias", 1, 0)]),
  )


def lowres_meta(shapes: Shapes, heads: int) -> dict[str, Any]:
  """Meta of the part `lowres`: decoder, condition_dim."""
  config = semantic_decoder(shapes, names.LOWRES, heads)
  dim = _vote(shapes, [("unet_proj.bias", 1, 0), ("unet_proj.weight", 2, 0)])
  return {"decoder": dataclasses.asdict(config), "condition_dim": dim}


def highres_meta(shapes: Shapes, heads: int) -> dict[str, Any]:
  """Meta of the part `highres`: decoder, condition_dims, pooled_dim."""
  config = semantic_decoder(shapes, names.HIGHRES, heads)
  dims = [_vote(shapes, [(f"unet_proj_{i}.bias", 1, 0)]) for i in (1, 2)]
  pooled = _vote(shapes, [("unet_attnpool.c_proj.bias", 1, 0)])
  return {
    "decoder": dataclasses.asdict(config),
    "condition_dims": dims,
    "pooled_dim": pooled,
  }


def visual_tokenizer(
  shapes: Shapes,
  vit_config: vision.ViTConfig,
  heads: int,
  decoder_config: decoder.DecoderConfig | None,
) -> tokenizer.TokenizerConfig:
  """Sizes of names.TOKENIZER.

  The file has no decoder; where none is given, its sizes are the merger's.

  Raises:
    Unknown: a tensor that shows a size is missing.
    errors.ConfigError: encoder, tokenizer and decoder do not fit together.
  """
  blocks = _blocks(shapes, names.TOKENIZER, heads)
  width = blocks["width"]
  code_dim = _vote(shapes, [("quantize.embedding.weight", 2, 1)])
  return tokenizer.TokenizerConfig(
    vit=vit_config,
    selector=selector.SelectorConfig(width=width),
    merger=merger.MergerConfig(**blocks),
    quantizer=quantizer.QuantizerConfig(
      width=width,
      num_codes=_vote(shapes, [("quantize.embedding.weight", 2, 0)]),
      code_dim=code_dim,
    ),
    decoder=decoder_config
    or decoder.DecoderConfig(
      **blocks,
      num_patches=vit_config.num_patches,
      code_dim=code_dim,
      out_dim=width,
    ),
    merger_form="reference",
    llm_width=_vote(shapes, [("vit_proj.bias", 1, 0)]),
  )


def num_codes(shapes: Shapes) -> int:
  """K, codes of the tokenizer file."""
  return _vote(shapes, [("quantize.embedding.weight", 2, 0)])


def _abstract(module, *args):
  make = lambda: module.init(jax.random.key(0), *args)
  return nn.meta.unbox(jax.eval_shape(make))


def abstract_encoder(config: vision.ViTConfig) -> dict[str, Any]:
  """Abstract params of `vision.EvaVit`."""
  size = config.image_size
  module = vision.EvaVit(config)
  return _abstract(module, jnp.zeros((1, size, size, 3)))["params"]


def abstract_tokenizer(config: tokenizer.TokenizerConfig) -> dict[str, Any]:
  """Abstract variables of the tokenizer, its `params/decoder` included."""
  places = jnp.zeros((1, config.num_patches, config.width))
  mask = jnp.ones((1, config.num_patches))
  return _abstract(tokenizer.DynamicVisualTokenizer(config), places, mask)


def _codes(config):
  shape = (1, config.num_patches)
  return jnp.zeros((*shape, config.code_dim)), jnp.ones(shape, bool)


def abstract_decoder(module) -> dict[str, Any]:
  """Abstract params of a `LowresDecoder` or `HighresDecoder`."""
  return _abstract(module, *_codes(module.config))["params"]


def abstract_llama(config: llama.LlamaConfig) -> dict[str, Any]:
  """Abstract params of `llama.Llama`."""
  return _abstract(llama.Llama(config), jnp.zeros((1, 8), jnp.int32))["params"]


def heads_fit(width: int, heads: int, source: str) -> None:
  """Raises UsageError where heads do not divide a width.

  Args:
    width: of the visual networks.
    heads: as given or assumed.
    source: where the count comes from.
  """
  if heads < 1 or width % heads:
    raise errors.UsageError(
      f"{heads} attention heads ({source}) do not divide the width {width} of"
      " the visual networks. No official file holds the count: give --heads."
    )


def head_count(folder: pathlib.Path, heads: int | None) -> tuple[int, str]:
  """Attention heads of the visual networks, and where the count is from."""
  if heads is not None:
    return heads, "--heads"
  for place in (folder, folder.absolute().parent):
    path = place / "variant_config.json"
    if not path.is_file():
      continue
    try:
      return int(json.loads(path.read_text())["heads"]), str(path.name)
    except (ValueError, KeyError, TypeError) as e:
      raise errors.CheckpointError(
        f'{path} has no number "heads" ({e}). Give --heads instead.'
      ) from e
  return _DEFAULT_HEADS, "the official count, as no file says another"
