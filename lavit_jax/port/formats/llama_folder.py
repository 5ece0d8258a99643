"""The small files of a Hugging Face LLaMA folder, read and written.

What its config.json says is read in `llama_config.py`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.models import llama
from lavit_jax.port.formats import tensors

# Weights and their indices; every other file of such a folder is small.
_WEIGHTS = (".bin", ".safetensors", ".index.json", ".pt", ".pth", ".gguf")
_SMALL = 1 << 25  # bytes
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


def tie(found: tensors.Tensors, label: str) -> None:
  """Makes embedding and head one array, whichever of the two is there.

  Args:
    found: the tensors of the folder, changed.
    label: how messages name it.

  Raises:
    errors.CheckpointError: both are, and they differ.
  """
  pair = EMBEDDING, HEAD
  there = [name for name in pair if name in found]
  if len(there) == 2 and not tensors.same(*(found[name] for name in pair)):
    raise errors.CheckpointError(
      f"{label} says tie_word_embeddings, but {EMBEDDING} and {HEAD} differ."
      " Set the field to false if the head is one of its own."
    )
  for name in pair if there else ():
    found[name] = dataclasses.replace(found[there[0]], name=name)


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
