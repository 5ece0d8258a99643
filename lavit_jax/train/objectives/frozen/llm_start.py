"""The LLM of config.start_from, from which stage pretrain starts."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from lavit_jax.core import agreement, errors, sharding
from lavit_jax.core.storage import checkpoints, files
from lavit_jax.models import llama
from lavit_jax.train.objectives.frozen import abstract_params, branches

PART = "llm"
# Rotary positions have no table: max_len is no property of weights.
_MAY_DIFFER = ("max_len", "vocab_size")


def branch(
  config: ml_collections.ConfigDict, name: str = "llm"
) -> branches.Branch:
  """Returns where a tree of the part `llm` is stored, by default the LLM."""
  return branches.Branch(config.start_from, PART, name)


def check(
  config: ml_collections.ConfigDict, network: llama.LlamaConfig
) -> None:
  """Checks that the LLM of config.start_from, if it has one, is this run's.

  Args:
    config: of the run.
    network: config of its LLM.

  Raises:
    errors.ConfigError: a field of the network differs, and config.accept does
      not name it.
  """
  folder = config.start_from
  if not folder or PART not in checkpoints.parts_in(folder):
    return  # an error where it is read; a resumed run need not have it
  meta = checkpoints.read_meta(folder, PART)
  if "llama" not in meta:
    return  # only shapes can be compared
  stored = llama.LlamaConfig(**meta["llama"])
  agreement.settle(
    agreement.fields(stored, network, "model.llm.", _MAY_DIFFER),
    agreement.accepted(config),
    what=f"The {PART} of start_from={folder}",
  )


def check_lora(
  config: ml_collections.ConfigDict,
  network: llama.LlamaConfig,
  lora: Mapping[str, Any],
) -> None:
  """Checks that config.start_from has the LLM that a LoRA changes.

  Args:
    config: of the run.
    network: config of its LLM.
    lora: `rank` and `alpha`.

  Raises:
    errors.ConfigError: start_from is not set, or alpha is not above 0.
    errors.CheckpointError: the LLM is missing or does not fit.
  """
  if not config.start_from or lora["alpha"] <= 0:
    raise errors.ConfigError(
      f"model.lora={lora} changes a trained LLM: it needs an alpha above"
      " 0, and start_from, that LLM's model directory. Set model.lora.rank=0"
      " to train all weights."
    )
  check_text_tokenizer(config)
  shapes = sharding.unbox(abstract_params.llm(network))
  branches.check({"llm": branch(config)}, {"llm": shapes})


def check_text_tokenizer(config: ml_collections.ConfigDict) -> None:
  """Checks that start_from and model_dir have the same text tokenizer.

  Raises:
    errors.CheckpointError: they do not, so that text ids differ in meaning.
  """
  stored = files.input_path(config.start_from) / "tokenizer.model"
  expected = files.input_path(config.model_dir) / "tokenizer.model"
  if not stored.exists() or stored.read_bytes() != expected.read_bytes():
    raise errors.CheckpointError(
      f"{stored} is missing or is not {expected}, byte for byte: the text ids"
      " of the LLM in config.start_from would mean other text here. Copy that"
      " file to config.model_dir before the first stage is trained."
    )
