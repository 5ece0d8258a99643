"""The small files of a Hugging Face LLaMA folder, read and written."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lavit_jax import errors
from lavit_jax.models import llama

# Weights and their indices; every other file of such a folder is small.
_WEIGHTS = (".bin", ".safetensors", ".index.json", ".pt", ".pth", ".gguf")
_SMALL = 1 << 25  # bytes

_REQUIRED = {
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
}


def read_json(path, label: str) -> dict[str, Any]:
  """A JSON object; CheckpointError where there is none."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.CheckpointError(
      f"{label} is missing: expected a file at {path}."
    )
  try:
    content = json.loads(path.read_text())
  except ValueError as e:
    raise errors.CheckpointError(f"{label} is not valid JSON: {e}.") from e
  if not isinstance(content, dict):
    raise errors.CheckpointError(f"{label} is not a JSON object.")
  return content


def read_fields(path, label: str) -> dict[str, Any]:
  """The fields of `LlamaConfig` in a config.json, less vocab_size.

  Raises:
    errors.CheckpointError: a field is missing, or the network is one that
      `models/llama.py` does not compute (scaled rotary, biases, other
      activations, head widths of their own).
  """
  config = read_json(path, label)
  missing = [name for name in _REQUIRED if name not in config]
  if missing or config.get("model_type", "llama") != "llama":
    raise errors.CheckpointError(
      f"{label} does not describe a LLaMA: model_type"
      f" {config.get('model_type')!r}, missing {missing or 'nothing'}."
      " Expected the config.json of a LlamaForCausalLM."
    )
  fields = {ours: config[theirs] for theirs, ours in _REQUIRED.items()}
  rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
  _refuse_other_networks(config, fields, rope, label)
  theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
  groups = config.get("num_key_value_heads") or fields["num_heads"]
  return fields | {
    "num_kv_heads": groups,
    "rope_theta": float(theta),
    "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
    "max_len": config.get("max_position_embeddings", 2048),
  }


def _refuse_other_networks(config, fields, rope, label):
  head_dim = fields["width"] // fields["num_heads"]
  kind = rope.get("rope_type", rope.get("type", "default"))
  found = {
    "rope_scaling": None if kind == "default" else kind,
    "attention_bias": config.get("attention_bias") or None,
    "mlp_bias": config.get("mlp_bias") or None,
    "hidden_act": _unless(config.get("hidden_act", "silu"), "silu"),
    "head_dim": _unless(config.get("head_dim") or head_dim, head_dim),
  }
  if found := {k: v for k, v in found.items() if v is not None}:
    listed = ", ".join(f"{k}={v!r}" for k, v in found.items())
    raise errors.CheckpointError(
      f"{label} has {listed}, which lavit_jax does not compute. Llama 1 and 2"
      " and models of their form (silu, no biases, plain rotary) can be taken."
    )


def _unless(value, usual):
  return None if value == usual else value


def small_files(folder) -> dict[str, bytes]:
  """Every small file of a folder by name, weights left out."""
  return {
    path.name: path.read_bytes()
    for path in sorted(pathlib.Path(folder).iterdir())
    if path.is_file()
    and not path.name.endswith(_WEIGHTS)
    and not path.name.startswith(".")
    and path.stat().st_size < _SMALL
  }


def config_json(config: llama.LlamaConfig, dtype: str) -> dict[str, Any]:
  """config.json of a LlamaForCausalLM of these sizes."""
  return {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": config.width,
    "initializer_range": 0.02,
    "intermediate_size": config.mlp_dim,
    "max_position_embeddings": config.max_len,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": config.num_heads,
    "num_hidden_layers": config.depth,
    "num_key_value_heads": config.num_kv_heads,
    "rms_norm_eps": config.norm_eps,
    "rope_scaling": None,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": False,
    "torch_dtype": dtype,
    "use_cache": True,
    "vocab_size": config.vocab_size,
  }


def default_files(
  config: llama.LlamaConfig, dtype: str, kept: Mapping[str, bytes]
) -> dict[str, bytes]:
  """The small files beside the weights, tokenizer.model excepted.

  Args:
    config: of the model.
    dtype: of the weights, such as "bfloat16".
    kept: files that the model was imported with; they win, but for
      config.json, which must tell the sizes of these weights.
  """
  marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
  made = {
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    "special_tokens_map.json": marks,
    "tokenizer_config.json": marks
    | {
      "add_bos_token": True,
      "add_eos_token": False,
      "clean_up_tokenization_spaces": False,
      "legacy": True,
      "model_max_length": config.max_len,
      "sp_model_kwargs": {},
      "tokenizer_class": "LlamaTokenizer",
    },
  }
  text = {name: to_json(content) for name, content in made.items()}
  return (
    text | dict(kept) | {"config.json": to_json(config_json(config, dtype))}
  )


def to_json(content) -> bytes:
  """JSON as Hugging Face writes it, two spaces a level."""
  return (json.dumps(content, indent=2) + "\n").encode()
