"""A Hugging Face LLaMA folder: tied weights, and its config and token files.

`llama_config.py` reads the config.json.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.models import llama
from lavit_jax.port.formats import small_files, tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tie(by_name: tensors.Tensors, label: str) -> None:
  """Makes embedding and head one tensor, whichever of the two is there.

  Args:
    by_name: the tensors of the folder, changed in place.
    label: how messages name it.

  Raises:
    errors.CheckpointError: both are there and differ.
  """
  pair = EMBEDDING, HEAD
  present = [name for name in pair if name in by_name]
  if len(present) == 2 and not tensors.same(*(by_name[name] for name in pair)):
    raise errors.CheckpointError(
      f"The config.json of {label} sets tie_word_embeddings, but {EMBEDDING}"
      f" and {HEAD} differ. Set the field to false if the head has weights of"
      " its own."
    )
  for name in pair if present else ():
    by_name[name] = dataclasses.replace(by_name[present[0]], name=name)


def config_json(config: llama.LlamaConfig, dtype: str) -> dict[str, Any]:
  """Returns the config.json of a LlamaForCausalLM of these sizes."""
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
  """Returns the small files beside the weights, except tokenizer.model.

  Args:
    config: of the model.
    dtype: name of the weights' dtype, such as "bfloat16".
    kept: files of the import, which take precedence; except config.json,
      which must describe these weights.

  Returns:
    Contents by file name.
  """
  special_tokens = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
  }
  defaults = {
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    "special_tokens_map.json": special_tokens,
    "tokenizer_config.json": special_tokens
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
  files = {n: small_files.to_json(content) for n, content in defaults.items()}
  files |= kept
  files["config.json"] = small_files.to_json(config_json(config, dtype))
  return files
