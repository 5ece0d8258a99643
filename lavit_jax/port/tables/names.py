"""Name tables: every tensor of the official release and its path here.

There is one table for each file of `rain1011/LaVIT-7B-v2`; `rows.py` explains
the rows. The paths lead into these trees:

  ENCODER            params of `vision.EvaVit`
  TOKENIZER          variables of `tokenizer.DynamicVisualTokenizer`, without
                     its `params/decoder`
  UNDERSTANDING      params of `unified.UnifiedModel`, without `llm`
  LOWRES, HIGHRES    params of `decoder.LowresDecoder`, `HighresDecoder`; the
                     `decoder` in each fits the tokenizer's
  DECODER            that `decoder` alone
  LLM                params of `llama.Llama`
  UNCOND             the unconditional embeddings in the part `lowres_pixels`

`pixel_names.py` has the tables of U-Nets and autoencoders, `safety_names.py`
that of the safety checker. `to_flax` and `to_official` convert whole files.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.port.tables import rows

ENCODER: rows.Table = (
  rows.Row("cls_token", "cls_token"),
  rows.Row("pos_embed", "pos_embed"),
  *rows.layer("patch_embed.proj", "patch_embed", "patch"),
  *rows.norm("blocks.{i}.norm1", "blocks/norm1"),
  rows.Row("blocks.{i}.attn.q_bias", "blocks/attn/q_bias"),
  rows.Row("blocks.{i}.attn.v_bias", "blocks/attn/v_bias"),
  rows.Row("blocks.{i}.attn.qkv.weight", "blocks/attn/qkv_kernel", "qkv"),
  *rows.layer("blocks.{i}.attn.proj", "blocks/attn/proj"),
  *rows.norm("blocks.{i}.norm2", "blocks/norm2"),
  *rows.layer("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
  *rows.layer("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
  *rows.norm("norm", "norm"),
  *rows.layer("head", "head"),
)

_SELECTOR: rows.Table = (
  *rows.norm("in_conv.0", "norm"),
  *rows.layer("in_conv.1", "in_proj"),
  *rows.layer("out_conv.0", "fc1"),
  *rows.layer("out_conv.2", "fc2"),
  *rows.layer("out_conv.4", "fc3"),
)


def _attention_block(self_attn: str, cross_attn: str) -> rows.Table:
  """Returns a block of merger or decoder.

  Args:
    self_attn: name of its self-attention.
    cross_attn: name of its cross-attention.
  """
  block = "blocks.{i}."
  return (
    *rows.norm(block + "norm0", "blocks/norm0"),
    rows.Row(
      f"{block}{self_attn}.qkv.weight", f"blocks/{self_attn}/qkv_kernel", "qkv"
    ),
    rows.Row(
      f"{block}{self_attn}.qkv.bias", f"blocks/{self_attn}/qkv_bias", "qkv_bias"
    ),
    *rows.layer(f"{block}{self_attn}.proj", f"blocks/{self_attn}/proj"),
    *rows.norm(block + "norm1", "blocks/norm1"),
    *rows.layer(f"{block}{cross_attn}.query", f"blocks/{cross_attn}/query"),
    *rows.layer(f"{block}{cross_attn}.key", f"blocks/{cross_attn}/key"),
    *rows.layer(f"{block}{cross_attn}.value", f"blocks/{cross_attn}/value"),
    *rows.layer(f"{block}{cross_attn}.proj", f"blocks/{cross_attn}/proj"),
    *rows.norm(block + "norm2", "blocks/norm2"),
    *rows.layer(block + "mlp.fc1", "blocks/mlp/fc1"),
    *rows.layer(block + "mlp.fc2", "blocks/mlp/fc2"),
  )


_MERGER: rows.Table = (
  *rows.norm("ln_vision", "ln_vision"),
  *_attention_block("token_causal_attn", "token_cross_attn"),
  *rows.norm("norm", "norm"),
)

DECODER: rows.Table = (
  rows.Row("pos_embed", "pos_embed"),
  rows.Row("query_embed", "query_embed"),
  *rows.layer("in_proj", "in_proj"),
  *_attention_block("self_attn", "cross_attn"),
  *rows.norm("norm", "norm"),
  *rows.layer("decode_task_layer.0", "fc1"),
  *rows.layer("decode_task_layer.2", "fc2"),
)

TOKENIZER: rows.Table = (
  *rows.under("token_predictor.", "params/selector/", _SELECTOR),
  *rows.under("causal_encoder.", "params/merger/", _MERGER),
  *rows.layer("encode_task_layer.0", "params/quantizer/fc1"),
  *rows.layer("encode_task_layer.2", "params/quantizer/fc2"),
  rows.Row("quantize.embedding.weight", "codebook/codes"),
  *rows.layer("vit_proj", "params/llm_proj"),
)

PROJECTION: rows.Table = rows.layer("vit_proj", "projection")
UNDERSTANDING: rows.Table = (
  *rows.under("causal_encoder.", "merger/", _MERGER),
  *PROJECTION,
)
# Only in overlays that have a selector of their own.
UNDERSTANDING_SELECTOR: rows.Table = rows.under(
  "token_predictor.", "selector/", _SELECTOR
)

LOWRES: rows.Table = (
  *rows.under("", "decoder/", DECODER),
  *rows.layer("unet_proj", "unet_proj"),
)

HIGHRES: rows.Table = (
  *rows.under("", "decoder/", DECODER),
  *rows.layer("unet_proj_1", "unet_proj_1"),
  *rows.layer("unet_proj_2", "unet_proj_2"),
  rows.Row(
    "unet_attnpool.positional_embedding", "unet_attnpool/positional_embedding"
  ),
  *rows.layer("unet_attnpool.k_proj", "unet_attnpool/k_proj"),
  *rows.layer("unet_attnpool.q_proj", "unet_attnpool/q_proj"),
  *rows.layer("unet_attnpool.v_proj", "unet_attnpool/v_proj"),
  *rows.layer("unet_attnpool.c_proj", "unet_attnpool/c_proj"),
)
SEMANTIC_DECODERS = {"lowres": LOWRES, "highres": HIGHRES}  # by part

_LAYER = "model.layers.{i}."

LLM: rows.Table = (
  rows.Row("model.embed_tokens.weight", "embedding", "rows"),
  rows.kernel(_LAYER + "self_attn.q_proj", "layers/attention/query"),
  rows.kernel(_LAYER + "self_attn.k_proj", "layers/attention/key"),
  rows.kernel(_LAYER + "self_attn.v_proj", "layers/attention/value"),
  rows.kernel(_LAYER + "self_attn.o_proj", "layers/attention/out"),
  rows.kernel(_LAYER + "mlp.gate_proj", "layers/mlp/gate"),
  rows.kernel(_LAYER + "mlp.up_proj", "layers/mlp/up"),
  rows.kernel(_LAYER + "mlp.down_proj", "layers/mlp/down"),
  rows.Row(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale"),
  rows.Row(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
  rows.Row("model.norm.weight", "norm/scale"),
  rows.Row("lm_head.weight", "head", "rows"),
)

# uncond_embeddings.bin is a single tensor, which has no name.
UNCOND: rows.Table = (rows.Row("", "uncond"),)

# Tensors that official files may hold and that nothing here needs.
_UNUSED = {
  id(TOKENIZER): r"encoder\.",
  id(LLM): r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",
}


def is_unused(table: rows.Table, name: str) -> bool:
  """Returns whether the official file may hold a name that nothing needs."""
  pattern = _UNUSED.get(id(table))
  return bool(pattern and re.match(pattern, name))


def to_flax(
  table: rows.Table, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Converts official tensors to the tree of a module here.

  Args:
    table: one of the tables above.
    tensors: by official name, of all layers.

  Returns:
    Nested dicts of arrays, with layers stacked and rows of the vocabulary
    padded.

  Raises:
    errors.CheckpointError: names are missing, or nothing here needs them; the
      error lists all.
  """
  used = {
    name: np.asarray(value)
    for name, value in tensors.items()
    if not is_unused(table, name)
  }
  depth = rows.depth_of(table, used)
  expected = {n for row in table for n in rows.official_names(row, depth)}
  missing = sorted(expected - set(used))
  unknown = sorted(set(used) - expected)
  if missing or unknown:
    raise errors.CheckpointError(
      f"These {len(used)} tensors are not those of the official file: missing"
      f" {missing or 'none'}, unknown {unknown or 'none'}. Check that the file"
      " is complete and the right one."
    )
  flat = {}
  for row in table:
    forward = rows.TRANSFORMS[row.transform].forward
    arrays = [forward(used[name]) for name in rows.official_names(row, depth)]
    flat[row.path] = np.stack(arrays) if rows.is_stacked(row) else arrays[0]
  return traverse_util.unflatten_dict(flat, sep="/")


def to_official(
  table: rows.Table, tree: Mapping[str, Any], vocab_size: int | None = None
) -> dict[str, np.ndarray]:
  """Converts the tree of a module to official tensors, as `to_flax` inversely.

  Args:
    table: one of the tables above.
    tree: nested dicts of arrays, or of jax.ShapeDtypeStruct. These become
      arrays of zeros that take no memory.
    vocab_size: number to which the padded rows of the vocabulary are cut;
      None keeps all.

  Returns:
    Arrays by official name.

  Raises:
    errors.CheckpointError: the tree lacks a path of the table or has another.
  """
  flat = traverse_util.flatten_dict(tree, sep="/")
  paths = {row.path for row in table}
  missing, unknown = sorted(paths - set(flat)), sorted(set(flat) - paths)
  if missing or unknown:
    raise errors.CheckpointError(
      f"This tree does not fit the table: missing {missing or 'none'}, unknown"
      f" {unknown or 'none'}. Does it belong to another module or config?"
    )
  tensors: dict[str, np.ndarray] = {}
  for row in table:
    backward = rows.TRANSFORMS[row.transform].backward
    array = _array(flat[row.path])
    array = array[:vocab_size] if row.transform == "rows" else array
    layers = list(array) if rows.is_stacked(row) else [array]
    names = rows.official_names(row, len(layers))
    tensors |= {n: backward(x) for n, x in zip(names, layers, strict=True)}
  return tensors


def _array(leaf):
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return np.broadcast_to(np.zeros((), np.float32), leaf.shape)
  return np.asarray(leaf)
