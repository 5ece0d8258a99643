"""Sizes of networks from the shapes of their tensors, and shapes from sizes.

No official file states a size: all are inferred from the tensors, by majority
where several tensors show the same one. No shape shows the number of attention
heads, which is an argument. The `abstract_*` functions return the shapes that
the module of a config has.
"""

import collections
import dataclasses
import functools
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
from lavit_jax.port.tables import names, rows

EVA_CLASSES = 1024  # outputs of EVA's `head` in the official file
_DEFAULT_HEADS = 16

Shapes = Mapping[str, tuple[int, ...]]


class UnknownSize(Exception):
  """The tensors that show a size are missing or have another rank."""


def _vote(shapes: Shapes, ends: Sequence[tuple[str, int, int]]) -> int:
  """Returns the size that most tensors show.

  Args:
    shapes: by official name.
    ends: (end of the name, rank, axis) of the tensors that show it.

  Raises:
    UnknownSize: there is no such tensor.
  """
  votes = collections.Counter(
    shape[axis]
    for name, shape in shapes.items()
    for end, rank, axis in ends
    if name.endswith(end) and len(shape) == rank
  )
  if not votes:
    raise UnknownSize(ends[0][0])
  return votes.most_common(1)[0][0]


def vit(shapes: Shapes, heads: int, with_head: bool) -> vision.ViTConfig:
  """Returns the sizes of the encoder.

  Args:
    shapes: of names.ENCODER.
    heads: attention heads.
    with_head: whether it has the final norm and `head`.

  Raises:
    UnknownSize: a tensor that shows a size is missing.
    errors.CheckpointError: the number of patches is no square number.
  """
  patches = _vote(shapes, [("pos_embed", 3, 1)]) - 1
  side = math.isqrt(max(patches, 0))
  if side * side != patches or not side:
    raise errors.CheckpointError(
      f"pos_embed of the encoder has {patches + 1} positions: expected one for"
      " the CLS token and a square number for the patches."
    )
  patch = _vote(shapes, [("patch_embed.proj.weight", 4, 3)])
  classes = 0
  if with_head:
    ends = [("head.weight", 2, 0), ("head.bias", 1, 0)]
    shown = any(name.startswith("head.") for name in shapes)
    classes = _vote(shapes, ends) if shown else EVA_CLASSES
  return vision.ViTConfig(
    image_size=side * patch,
    patch_size=patch,
    width=_vote(shapes, [("norm1.weight", 1, 0), ("cls_token", 3, 2)]),
    depth=rows.depth_of(names.ENCODER, shapes),
    num_heads=heads,
    mlp_dim=_vote(shapes, [("mlp.fc1.bias", 1, 0)]),
    head_dim_out=classes,
  )


def _blocks(shapes: Shapes, table: rows.Table, heads: int) -> dict[str, Any]:
  """Returns the arguments that the configs of merger and decoder share."""
  return {
    "width": _vote(shapes, [("norm0.weight", 1, 0)]),
    "depth": rows.depth_of(table, shapes),
    "num_heads": heads,
    "mlp_dim": _vote(shapes, [("mlp.fc1.bias", 1, 0)]),
  }


def semantic_decoder(
  shapes: Shapes, table: rows.Table, heads: int
) -> decoder.DecoderConfig:
  """Returns the sizes of the decoder in a file of names.LOWRES or HIGHRES."""
  return decoder.DecoderConfig(
    **_blocks(shapes, table, heads),
    num_patches=_vote(shapes, [("query_embed", 3, 1), ("pos_embed", 3, 1)]),
    code_dim=_vote(shapes, [("in_proj.weight", 2, 1)]),
    out_dim=_vote(shapes, [("decode_task_layer.2.bias", 1, 0)]),
  )


def lowres_meta(shapes: Shapes, heads: int) -> dict[str, Any]:
  """Returns the meta of the part `lowres`: decoder, condition_dim."""
  config = semantic_decoder(shapes, names.LOWRES, heads)
  dim = _vote(shapes, [("unet_proj.bias", 1, 0), ("unet_proj.weight", 2, 0)])
  return {"decoder": dataclasses.asdict(config), "condition_dim": dim}


def highres_meta(shapes: Shapes, heads: int) -> dict[str, Any]:
  """Returns the meta of the part `highres`.

  Its keys are decoder, condition_dims and pooled_dim.
  """
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
  """Returns the sizes of names.TOKENIZER.

  Args:
    shapes: of the file.
    vit_config: of the encoder.
    heads: attention heads.
    decoder_config: of the decoder, which is not in the file; None for one of
      the merger's sizes.

  Raises:
    UnknownSize: a tensor that shows a size is missing.
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
  """Returns K, the number of codes in the tokenizer's file."""
  return _vote(shapes, [("quantize.embedding.weight", 2, 0)])


def abstract_variables(module: nn.Module, *args: Any) -> dict[str, Any]:
  """Returns the variables of a module as jax.ShapeDtypeStruct, unboxed.

  A network is traced once: a port asks for the same shapes many times.

  Args:
    module: of any config.
    *args: of its `init`, arrays or None.
  """
  shapes = (None if x is None else (x.shape, x.dtype) for x in args)
  # Callers may change the dicts that they get.
  return jax.tree.map(lambda x: x, _traced(module, tuple(shapes)))


@functools.lru_cache(maxsize=32)
def _traced(module, shapes):
  inputs = [None if x is None else jax.ShapeDtypeStruct(*x) for x in shapes]
  init = lambda *inputs: module.init(jax.random.key(0), *inputs)
  return nn.meta.unbox(jax.eval_shape(init, *inputs))


def abstract_encoder(config: vision.ViTConfig) -> dict[str, Any]:
  """Returns the abstract params of `vision.EvaVit`."""
  size = config.image_size
  module = vision.EvaVit(config)
  images = jnp.zeros((1, size, size, 3))
  return abstract_variables(module, images)["params"]


def abstract_tokenizer(
  config: tokenizer.TokenizerConfig, with_decoder: bool = True
) -> dict[str, Any]:
  """Returns the abstract variables of the tokenizer.

  Args:
    config: its sizes.
    with_decoder: whether `params/decoder` is included; the official file does
      not have it.
  """
  features = jnp.zeros((1, config.num_patches, config.width))
  mask = jnp.ones((1, config.num_patches))
  module = tokenizer.DynamicVisualTokenizer(config)
  variables = abstract_variables(module, features, mask)
  if not with_decoder:
    del variables["params"]["decoder"]
  return variables


def reading_branch(
  tokenizer_variables: Mapping[str, Any], with_selector: bool = False
) -> dict[str, Any]:
  """Returns the tokenizer's params at the paths of names.UNDERSTANDING.

  Args:
    tokenizer_variables: with `params`.
    with_selector: whether names.UNDERSTANDING_SELECTOR is included.
  """
  params = tokenizer_variables["params"]
  branch = {"merger": params["merger"], "projection": params["llm_proj"]}
  if with_selector:
    branch["selector"] = params["selector"]
  return branch


def abstract_decoder(
  module: decoder.LowresDecoder | decoder.HighresDecoder,
) -> dict[str, Any]:
  """Returns the abstract params of a semantic decoder."""
  shape = (1, module.config.num_patches)
  codes = jnp.zeros((*shape, module.config.code_dim))
  return abstract_variables(module, codes, jnp.ones(shape, bool))["params"]


def abstract_llama(config: llama.LlamaConfig) -> dict[str, Any]:
  """Returns the abstract params of `llama.Llama`."""
  ids = jnp.zeros((1, 8), jnp.int32)
  return abstract_variables(llama.Llama(config), ids)["params"]


def check_heads(width: int, heads: int, source: str) -> None:
  """Checks that the number of heads divides the width.

  Args:
    width: of the visual networks.
    heads: attention heads.
    source: origin of that number, for the message.

  Raises:
    errors.UsageError: it does not divide the width.
  """
  if heads < 1 or width % heads:
    raise errors.UsageError(
      f"{heads} attention heads ({source}) do not divide the width {width} of"
      " the visual networks. No official file states the number: give --heads."
    )


def head_count(folder: pathlib.Path, heads: int | None) -> tuple[int, str]:
  """Returns the attention heads of the visual networks and their origin.

  Args:
    folder: of the checkpoint; variant_config.json in it or in its parent may
      state the number.
    heads: as the user gave it, or None.

  Raises:
    errors.CheckpointError: variant_config.json has no such number.
  """
  if heads is not None:
    return heads, "--heads"
  for parent in (folder, folder.absolute().parent):
    path = parent / "variant_config.json"
    if not path.is_file():
      continue
    try:
      return int(json.loads(path.read_text())["heads"]), str(path.name)
    except (ValueError, KeyError, TypeError) as e:
      raise errors.CheckpointError(
        f'{path} has no number "heads" ({e}). Give --heads instead.'
      ) from e
  return _DEFAULT_HEADS, "the official number, as no file states another"
