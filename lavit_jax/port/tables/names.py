"""The explicit table: every tensor of the official release and its place here.

One table a file of `rain1011/LaVIT-7B-v2`, with rows of (official name, path
here, transform). `{i}` in an official name is the layer; here layers are
stacked on a first axis. The trees that the paths lead into:

  ENCODER            params of `vision.EvaVit`
  TOKENIZER          variables of `tokenizer.DynamicVisualTokenizer`, less its
                     `params/decoder`
  UNDERSTANDING      params of `unified.UnifiedModel`, less `llm`
  LOWRES, HIGHRES    params of `decoder.LowresDecoder`, `HighresDecoder`; the
                     `decoder` in each fits the tokenizer's
  DECODER            that `decoder` alone
  LLM                params of `llama.Llama`
  UNCOND             the part `lowres_pixels`

Those of the U-Nets and their autoencoders are made by `names_pixels.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lavit_jax.core import errors

ROW_MULTIPLE = 128  # rows of embedding and head are padded to it


class Row(NamedTuple):
  """One parameter: its official name, its path here, how to get here."""

  official: str
  ours: str
  transform: str = "same"


Table = tuple[Row, ...]


class Transform(NamedTuple):
  """An array's way here and back. numpy arrays in and out."""

  forward: Callable[[np.ndarray], np.ndarray]
  backward: Callable[[np.ndarray], np.ndarray]


def _unpatch(x):
  size = round((x.shape[0] // 3) ** 0.5)
  return x.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)


def _pad_rows(x):
  missing = -x.shape[0] % ROW_MULTIPLE
  return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])


TRANSFORMS = {
  "same": Transform(lambda x: x, lambda x: x),
  # torch's Linear [out, in] to a kernel [in, out].
  "linear": Transform(lambda x: x.T, lambda x: x.T),
  # Fused [3 * D, D] to [D, 3, D], and its bias [3 * D] to [3, D].
  "qkv": Transform(
    lambda x: x.reshape(3, -1, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
  ),
  "qkv_bias": Transform(lambda x: x.reshape(3, -1), lambda x: x.reshape(-1)),
  # A convolution [D, 3, P, P] to the kernel [P * P * 3, D] over patches.
  "patch": Transform(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _unpatch
  ),
  # torch's Conv2d [out, in, h, w] to a kernel [h, w, in, out], and one of
  # 1 x 1 to a kernel [in, out].
  "conv": Transform(
    lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
  ),
  "pointwise": Transform(
    lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]
  ),
  # Rows of the vocabulary; `to_official` trims them.
  "rows": Transform(_pad_rows, lambda x: x),
}

ENCODER: Table = (
  Row("cls_token", "cls_token"),
  Row("pos_embed", "pos_embed"),
  Row("patch_embed.proj.weight", "patch_embed/kernel", "patch"),
  Row("patch_embed.proj.bias", "patch_embed/bias"),
  Row("blocks.{i}.norm1.weight", "blocks/norm1/scale"),
  Row("blocks.{i}.norm1.bias", "blocks/norm1/bias"),
  Row("blocks.{i}.attn.q_bias", "blocks/attn/q_bias"),
  Row("blocks.{i}.attn.v_bias", "blocks/attn/v_bias"),
  Row("blocks.{i}.attn.qkv.weight", "blocks/attn/qkv_kernel", "qkv"),
  Row("blocks.{i}.attn.proj.weight", "blocks/attn/proj/kernel", "linear"),
  Row("blocks.{i}.attn.proj.bias", "blocks/attn/proj/bias"),
  Row("blocks.{i}.norm2.weight", "blocks/norm2/scale"),
  Row("blocks.{i}.norm2.bias", "blocks/norm2/bias"),
  Row("blocks.{i}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "linear"),
  Row("blocks.{i}.mlp.fc1.bias", "blocks/mlp/fc1/bias"),
  Row("blocks.{i}.mlp.fc2.weight", "blocks/mlp/fc2/kernel", "linear"),
  Row("blocks.{i}.mlp.fc2.bias", "blocks/mlp/fc2/bias"),
  Row("norm.weight", "norm/scale"),
  Row("norm.bias", "norm/bias"),
  Row("head.weight", "head/kernel", "linear"),
  Row("head.bias", "head/bias"),
)

_SELECTOR: Table = (
  Row("in_conv.0.weight", "norm/scale"),
  Row("in_conv.0.bias", "norm/bias"),
  Row("in_conv.1.weight", "in_proj/kernel", "linear"),
  Row("in_conv.1.bias", "in_proj/bias"),
  Row("out_conv.0.weight", "fc1/kernel", "linear"),
  Row("out_conv.0.bias", "fc1/bias"),
  Row("out_conv.2.weight", "fc2/kernel", "linear"),
  Row("out_conv.2.bias", "fc2/bias"),
  Row("out_conv.4.weight", "fc3/kernel", "linear"),
  Row("out_conv.4.bias", "fc3/bias"),
)


def _attention_block(own: str, cross: str) -> Table:
  """A block of merger or decoder; `own` and `cross` name its attentions."""
  return (
    Row("blocks.{i}.norm0.weight", "blocks/norm0/scale"),
    Row("blocks.{i}.norm0.bias", "blocks/norm0/bias"),
    Row(f"blocks.{{i}}.{own}.qkv.weight", f"blocks/{own}/qkv_kernel", "qkv"),
    Row(f"blocks.{{i}}.{own}.qkv.bias", f"blocks/{own}/qkv_bias", "qkv_bias"),
    Row(
      f"blocks.{{i}}.{own}.proj.weight", f"blocks/{own}/proj/kernel", "linear"
    ),
    Row(f"blocks.{{i}}.{own}.proj.bias", f"blocks/{own}/proj/bias"),
    Row("blocks.{i}.norm1.weight", "blocks/norm1/scale"),
    Row("blocks.{i}.norm1.bias", "blocks/norm1/bias"),
    *(
      row
      for name in ("query", "key", "value", "proj")
      for row in (
        Row(
          f"blocks.{{i}}.{cross}.{name}.weight",
          f"blocks/{cross}/{name}/kernel",
          "linear",
        ),
        Row(f"blocks.{{i}}.{cross}.{name}.bias", f"blocks/{cross}/{name}/bias"),
      )
    ),
    Row("blocks.{i}.norm2.weight", "blocks/norm2/scale"),
    Row("blocks.{i}.norm2.bias", "blocks/norm2/bias"),
    Row("blocks.{i}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "linear"),
    Row("blocks.{i}.mlp.fc1.bias", "blocks/mlp/fc1/bias"),
    Row("blocks.{i}.mlp.fc2.weight", "blocks/mlp/fc2/kernel", "linear"),
    Row("blocks.{i}.mlp.fc2.bias", "blocks/mlp/fc2/bias"),
  )


_MERGER: Table = (
  Row("ln_vision.weight", "ln_vision/scale"),
  Row("ln_vision.bias", "ln_vision/bias"),
  *_attention_block("token_causal_attn", "token_cross_attn"),
  Row("norm.weight", "norm/scale"),
  Row("norm.bias", "norm/bias"),
)

DECODER: Table = (
  Row("pos_embed", "pos_embed"),
  Row("query_embed", "query_embed"),
  Row("in_proj.weight", "in_proj/kernel", "linear"),
  Row("in_proj.bias", "in_proj/bias"),
  *_attention_block("self_attn", "cross_attn"),
  Row("norm.weight", "norm/scale"),
  Row("norm.bias", "norm/bias"),
  Row("decode_task_layer.0.weight", "fc1/kernel", "linear"),
  Row("decode_task_layer.0.bias", "fc1/bias"),
  Row("decode_task_layer.2.weight", "fc2/kernel", "linear"),
  Row("decode_task_layer.2.bias", "fc2/bias"),
)


def under(official: str, ours: str, table: Table) -> Table:
  """The table with both kinds of name under a prefix."""
  return tuple(
    Row(official + row.official, ours + row.ours, row.transform)
    for row in table
  )


TOKENIZER: Table = (
  *under("token_predictor.", "params/selector/", _SELECTOR),
  *under("causal_encoder.", "params/merger/", _MERGER),
  Row("encode_task_layer.0.weight", "params/quantizer/fc1/kernel", "linear"),
  Row("encode_task_layer.0.bias", "params/quantizer/fc1/bias"),
  Row("encode_task_layer.2.weight", "params/quantizer/fc2/kernel", "linear"),
  Row("encode_task_layer.2.bias", "params/quantizer/fc2/bias"),
  Row("quantize.embedding.weight", "codebook/codes"),
  Row("vit_proj.weight", "params/llm_proj/kernel", "linear"),
  Row("vit_proj.bias", "params/llm_proj/bias"),
)

UNDERSTANDING: Table = (
  *under("causal_encoder.", "merger/", _MERGER),
  Row("vit_proj.weight", "projection/kernel", "linear"),
  Row("vit_proj.bias", "projection/bias"),
)

# Only where the overlay of the official understanding model has it.
UNDERSTANDING_SELECTOR: Table = under(
  "token_predictor.", "selector/", _SELECTOR
)

LOWRES: Table = (
  *under("", "decoder/", DECODER),
  Row("unet_proj.weight", "unet_proj/kernel", "linear"),
  Row("unet_proj.bias", "unet_proj/bias"),
)

HIGHRES: Table = (
  *under("", "decoder/", DECODER),
  Row("unet_proj_1.weight", "unet_proj_1/kernel", "linear"),
  Row("unet_proj_1.bias", "unet_proj_1/bias"),
  Row("unet_proj_2.weight", "unet_proj_2/kernel", "linear"),
  Row("unet_proj_2.bias", "unet_proj_2/bias"),
  Row(
    "unet_attnpool.positional_embedding", "unet_attnpool/positional_embedding"
  ),
  *(
    row
    for name in ("k_proj", "q_proj", "v_proj", "c_proj")
    for row in (
      Row(
        f"unet_attnpool.{name}.weight", f"unet_attnpool/{name}/kernel", "linear"
      ),
      Row(f"unet_attnpool.{name}.bias", f"unet_attnpool/{name}/bias"),
    )
  ),
)

_LAYER = "model.layers.{i}."

LLM: Table = (
  Row("model.embed_tokens.weight", "embedding", "rows"),
  Row(
    _LAYER + "self_attn.q_proj.weight",
    "layers/attention/query/kernel",
    "linear",
  ),
  Row(
    _LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", "linear"
  ),
  Row(
    _LAYER + "self_attn.v_proj.weight",
    "layers/attention/value/kernel",
    "linear",
  ),
  Row(
    _LAYER + "self_attn.o_proj.weight", "layers/attention/out/kernel", "linear"
  ),
  Row(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "linear"),
  Row(_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "linear"),
  Row(_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "linear"),
  Row(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale"),
  Row(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
  Row("model.norm.weight", "norm/scale"),
  Row("lm_head.weight", "head", "rows"),
)

# uncond_embeddings.bin is one tensor alone, which has no name.
UNCOND: Table = (Row("", "uncond"),)

# What official files may hold and nothing here needs.
_UNUSED = {
  id(TOKENIZER): r"encoder\.",
  id(LLM): r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",
}


def to_ours(table: Table, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Official tensors as a tree of numpy arrays for the modules here.

  Args:
    table: one of the tables above.
    tensors: by official name, all layers; the table tells how many.

  Returns:
    Nested dicts of arrays, layers stacked, rows of the vocabulary padded.

  Raises:
    errors.CheckpointError: names that are missing, or that nothing here
      needs: all of them at once.
  """
  given = {
    name: np.asarray(value)
    for name, value in tensors.items()
    if not is_unused(table, name)
  }
  depth = depth_of(table, given)
  names = [name for row in table for name in names_of(row, depth)]
  missing = sorted(set(names) - set(given))
  unknown = sorted(set(given) - set(names))
  if missing or unknown:
    raise errors.CheckpointError(
      f"These {len(given)} tensors are not those of the official file: missing"
      f" {missing or 'none'}, unknown {unknown or 'none'}. Check that the file"
      " is the one meant and complete."
    )
  flat = {}
  for row in table:
    forward = TRANSFORMS[row.transform].forward
    arrays = [forward(given[name]) for name in names_of(row, depth)]
    flat[row.ours] = np.stack(arrays) if is_stacked(row) else arrays[0]
  return unflatten(flat)


def to_official(
  table: Table, tree: Mapping[str, Any], rows: int | None = None
) -> dict[str, np.ndarray]:
  """The inverse of `to_ours`.

  Args:
    table: one of the tables above.
    tree: nested dicts of arrays, or of anything with a `shape`, in whose
      place an array of zeros that takes no memory is returned.
    rows: size of the vocabulary, to which padded rows are cut; None: all.

  Raises:
    errors.CheckpointError: paths of the tree the table lacks or the reverse.
  """
  flat = flatten(tree)
  paths = [row.ours for row in table]
  missing, unknown = (
    sorted(set(paths) - set(flat)),
    sorted(set(flat) - set(paths)),
  )
  if missing or unknown:
    raise errors.CheckpointError(
      f"This tree does not fit the table: missing {missing or 'none'}, unknown"
      f" {unknown or 'none'}. Was it made by another module or config?"
    )
  tensors = {}
  for row in table:
    backward = TRANSFORMS[row.transform].backward
    array = _array(flat[row.ours])
    array = array[:rows] if row.transform == "rows" else array
    layers = list(array) if is_stacked(row) else [array]
    names = names_of(row, len(layers))
    tensors |= {n: backward(x) for n, x in zip(names, layers, strict=True)}
  return tensors


def _array(leaf):
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return np.broadcast_to(np.zeros((), np.float32), leaf.shape)
  return np.asarray(leaf)


def is_unused(table: Table, name: str) -> bool:
  """Whether the official file may hold this name and nothing needs it."""
  pattern = _UNUSED.get(id(table))
  return bool(pattern and re.match(pattern, name))


def is_stacked(row: Row) -> bool:
  """Whether the row is one tensor a layer, stacked here."""
  return "{i}" in row.official


def names_of(row: Row, depth: int) -> list[str]:
  """Official names of one row, a name a layer."""
  if not is_stacked(row):
    return [row.official]
  return [row.official.replace("{i}", str(i)) for i in range(depth)]


def depth_of(table: Table, tensors) -> int:
  """How many layers the names have, by the highest number that occurs.

  0 for a table with no stacked rows, such as those of the U-Nets.
  """
  stacked = next((row.official for row in table if is_stacked(row)), None)
  if stacked is None:
    return 0
  pattern = re.escape(stacked.split("{i}")[0]) + r"(\d+)\."
  found = [re.match(pattern, name) for name in tensors]
  return max((int(m[1]) + 1 for m in found if m), default=0)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts to paths: {"a": {"b": x}} gives {"a/b": x}."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}/")
    else:
      flat[prefix + name] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree = {}
  for path, value in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree
