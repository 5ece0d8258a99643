"""The config.json of a Hugging Face LLaMA, every field accounted for.

A field is read, or refused unless it has the value that `models/llama.py`
computes, or known to have no effect, or named in a note because its effect is
unknown. Fields that a file lacks have transformers' defaults.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.port.formats import config_fields, small_files

_OFF = (None, False)
_ONE = (None, 1)
# Fields with the values that `models/llama.py` computes; a file may lack them.
_FIXED = {
  "attention_bias": _OFF,
  "mlp_bias": _OFF,
  "bias": _OFF,
  "qkv_bias": _OFF,
  "use_bias": _OFF,
  "attention_out_bias": _OFF,
  "lm_head_bias": _OFF,
  "add_cross_attention": _OFF,
  "is_encoder_decoder": _OFF,
  "is_causal": (None, True),
  "use_parallel_residual": _OFF,
  "parallel_attn": _OFF,
  "qk_norm": _OFF,
  "qk_layernorm": _OFF,
  "use_qk_norm": _OFF,
  "hidden_act": ("silu", "swish"),
  "hidden_activation": (None, "silu", "swish"),
  "norm_type": (None, "rms", "rmsnorm", "rms_norm"),
  "layer_types": (None, "full_attention"),  # in each entry
  "attention_chunk_size": (None,),
  "no_rope_layers": (None,),
  "no_rope_layer_interval": (None, 0),
  "rope_type": (None, "default"),
  "rope_interleaved": _OFF,
  "rope_interleave": _OFF,
  "partial_rotary_factor": _ONE,
  "rotary_pct": _ONE,
  "attention_multiplier": (None,),  # replaces 1/sqrt(head width)
  "query_pre_attn_scalar": (None,),
  "attn_logit_softcapping": (None,),
  "final_logit_softcapping": (None,),
  "attn_temperature_tuning": _OFF,
  "clip_qkv": (None,),
  "embedding_multiplier": _ONE,
  "residual_multiplier": _ONE,
  "logits_scaling": _ONE,
  "logit_scale": _ONE,
  "scale_emb": _ONE,
  "scale_depth": (None,),
  "dim_model_base": (None,),
  "num_experts": (None, 0, 1),
  "num_local_experts": (None, 0, 1),
  "n_routed_experts": (None, 0, 1),
  "moe_intermediate_size": (None,),
  "pruned_heads": (None, {}),
  "quantization_config": (None,),
}
# Fields that change no number here: ids of tokens, settings of training, how
# transformers runs and labels a model, and settings of its `generate`. Not
# auto_map: it names code, which may do anything.
_WITHOUT_EFFECT = """
  architectures attention_dropout attn_implementation bad_words_ids
  begin_suppress_tokens bos_token_id chunk_size_feed_forward cls_token_id
  cross_attention_hidden_size decoder_start_token_id diversity_penalty
  do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
  eos_token_id exponential_decay_length_penalty finetuning_task
  forced_bos_token_id forced_eos_token_id gradient_checkpointing
  hidden_dropout id2label initializer_range is_decoder label2id
  length_penalty max_length max_sequence_length min_length model_type
  name_or_path no_repeat_ngram_size num_beam_groups num_beams
  num_return_sequences output_attentions output_hidden_states output_scores
  pad_token_id prefix pretraining_tp problem_type remove_invalid_values
  repetition_penalty resid_pdrop return_dict return_dict_in_generate
  sep_token_id suppress_tokens task_specific_params temperature
  tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
  torchscript transformers_version typical_p unk_token_id use_bfloat16
  use_cache
"""
_READ = """
  head_dim hidden_size intermediate_size max_position_embeddings
  num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps
  rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings
  use_sliding_window vocab_size
"""
_ROPE_FACTORS = ("partial_rotary_factor", "factor", "attention_factor")
_ROPE_SETTINGS = {"rope_type", "type", "rope_theta", *_ROPE_FACTORS}
_DEFAULTS = {
  "max_position_embeddings": 2048,
  "num_key_value_heads": None,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": None,
  "vocab_size": None,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The network that a config.json describes.

  Attributes:
    fields: arguments of `llama.LlamaConfig`, without vocab_size.
    vocab_size: rows of the embedding; None where the file does not say.
    tied: whether the head is the embedding.
    notes: sentences for the user about fields with an unknown effect.
  """

  fields: dict[str, Any]
  vocab_size: int | None
  tied: bool
  notes: tuple[str, ...]


def read(path: str | os.PathLike, label: str) -> Config:
  """Reads a config.json.

  Args:
    path: of the file.
    label: how messages name it.

  Raises:
    errors.CheckpointError: there is no such file, or it describes a network
      that `models/llama.py` does not compute; every field that is missing, of
      a wrong type or at an unsupported value is named.
  """
  content = small_files.read_json(path, label)
  if content.get("model_type", "llama") != "llama":
    raise _unsupported(label, [f"model_type is {content['model_type']!r}"])
  file = _LlamaFields(content)
  width = file.positive_int("hidden_size")
  heads = file.positive_int("num_attention_heads")
  fields = {
    "width": width,
    "depth": file.positive_int("num_hidden_layers"),
    "num_heads": heads,
    "mlp_dim": file.positive_int("intermediate_size"),
    "num_kv_heads": file.optional_int("num_key_value_heads") or heads,
    "norm_eps": float(file.positive_number("rms_norm_eps")),
    "max_len": file.positive_int("max_position_embeddings"),
  }
  file.check_heads(width, heads, int(fields["num_kv_heads"]))
  file.check_window()
  for name, allowed in _FIXED.items():
    file.check_fixed(name, allowed)
  fields["rope_theta"] = file.rope_theta()
  vocab_size = file.optional_int("vocab_size")
  tied = file.value("tie_word_embeddings") is not None and file.boolean(
    "tie_word_embeddings"
  )
  if file.problems:
    raise _unsupported(label, file.problems)
  return Config(fields, vocab_size, tied, file.notes(label))


def _unsupported(label, problems):
  return errors.CheckpointError(
    f"{label} does not describe a LLaMA that lavit_jax computes:"
    f" {'; '.join(problems)}. Expected the config.json of a LlamaForCausalLM:"
    " Llama 1 and 2 and models of their form (silu, no biases, unscaled rotary"
    " positions)."
  )


class _LlamaFields(config_fields.Fields):
  """The fields of one file, and those of them that are unknown."""

  def __init__(self, content: Mapping[str, Any]):
    super().__init__(content, _DEFAULTS)
    known = {*_READ.split(), *_WITHOUT_EFFECT.split(), *_FIXED}
    self._unknown = [
      name for name in content if name not in known and not name.startswith("_")
    ]

  def notes(self, label: str) -> tuple[str, ...]:
    """Returns one sentence on the unknown fields, if there are any."""
    if not self._unknown:
      return ()
    listed = ", ".join(
      f"{name}={config_fields.shown(self.value(name))}"
      for name in sorted(self._unknown)
    )
    return (
      f"{label} has fields that lavit_jax does not know and ignored: {listed}."
      " If one of them changes what the model computes, the imported model"
      " computes something else",
    )

  def check_heads(self, width: int, heads: int, kv_heads: int) -> None:
    """Checks that the heads divide the width into even, equal parts."""
    if self.problems:
      return
    if width % heads or (width // heads) % 2:
      self.wrong(
        "num_attention_heads",
        f"a number that divides hidden_size={width} into heads of one even"
        " width",
      )
    elif self.value("head_dim") not in (
      config_fields.ABSENT,
      None,
      width // heads,
    ):
      self.wrong(
        "head_dim",
        f"{width // heads}, which is hidden_size over num_attention_heads",
      )
    if heads % kv_heads:
      self.wrong("num_key_value_heads", f"a divisor of {heads}")

  def check_window(self) -> None:
    """Checks that there is no sliding window, or that it is not used."""
    used = self.value("use_sliding_window") is not False
    window = self.value("sliding_window")
    if used and window not in (config_fields.ABSENT, None):
      self.wrong("sliding_window", "null: attention to all positions")

  def rope_theta(self) -> float:
    """Returns the base of the rotary positions, which must be unscaled.

    transformers 5 writes rope_parameters, transformers 4 rope_theta and
    rope_scaling. Where a file has both, the versions read different ones, so
    they must agree.
    """
    objects = [
      name
      for name in ("rope_parameters", "rope_scaling")
      if self._is_rope_object(name)
    ]
    if len(objects) == 2 and len({str(self.value(n)) for n in objects}) == 2:
      self.wrong("rope_scaling", "the same as rope_parameters, or null")
    names = ["rope_theta", *(f"{name}.rope_theta" for name in objects)]
    names = [n for n in names if self.value(n) is not config_fields.ABSENT]
    problems_before = len(self.problems)
    bases = {name: float(self.positive_number(name)) for name in names}
    valid = problems_before == len(self.problems)
    if valid and len(set(bases.values())) > 1:
      listed = ", ".join(f"{name} is {base:g}" for name, base in bases.items())
      self.problems.append(f"{listed}: expected one value")
    return next(iter(bases.values()), 10000.0)

  def _is_rope_object(self, field) -> bool:
    """Returns whether a field holds rotary settings; records wrong ones."""
    settings = self.value(field)
    if settings in (config_fields.ABSENT, None, {}):
      return False
    if not isinstance(settings, Mapping):
      self.wrong(field, "an object, or null")
      return False
    for name in ("rope_type", "type"):
      if settings.get(name, "default") != "default":
        self.wrong(f"{field}.{name}", "'default': positions without scaling")
    for name in _ROPE_FACTORS:
      if settings.get(name) not in _ONE:
        self.wrong(f"{field}.{name}", "1")
    for name in [n for n in settings if n not in _ROPE_SETTINGS]:
      if isinstance(settings[name], Mapping):  # settings by kind of layer
        self.wrong(f"{field}.{name}", "the same settings for all layers")
      else:
        self._unknown.append(f"{field}.{name}")
    return True
