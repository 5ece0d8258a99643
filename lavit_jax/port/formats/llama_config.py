"""The config.json of a Hugging Face LLaMA: every field accounted for.

A field is read; or refused unless it is at the value that `models/llama.py`
computes; or known to change nothing that is computed; or, where nobody here
knows what it does, named in a note. What a file may leave out has
transformers' defaults.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.port.formats import config_fields, llama_folder

_ABSENT = object()
_OFF = (None, False)
_ONE = (None, 1)
# Fields that must be at one of these values: each changes what is computed.
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
  "attention_multiplier": (None,),  # instead of 1/sqrt(width of a head)
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
# Fields that change no number here: ids of tokens, what training drew with,
# how transformers runs and labels a model, and settings of its `generate`.
# Not auto_map: it names code, which may do anything.
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
_FACTORS = ("partial_rotary_factor", "factor", "attention_factor")
_ROPE = {"rope_type", "type", "rope_theta", *_FACTORS}


@dataclasses.dataclass(frozen=True)
class Config:
  """What a config.json says of a network.

  Attributes:
    fields: of `llama.LlamaConfig`, less vocab_size.
    vocab_size: rows that the file speaks of; None where it does not.
    tied: whether the head is the embedding.
    notes: sentences for the user, on fields that nothing here knows.
  """

  fields: dict[str, Any]
  vocab_size: int | None
  tied: bool
  notes: tuple[str, ...]


def read(path, label: str) -> Config:
  """What the config.json at `path` says; `label` names it in messages.

  Raises:
    errors.CheckpointError: there is no such file, or it is of a network that
      `models/llama.py` does not compute, or of none; every field that is
      missing, of a wrong kind or at another value is named.
  """
  content = llama_folder.read_json(path, label)
  if content.get("model_type", "llama") != "llama":
    raise _wrong(label, [f"model_type is {content['model_type']!r}"])
  file = _File(content)
  width = file.whole("hidden_size")
  heads = file.whole("num_attention_heads")
  fields = {
    "width": width,
    "depth": file.whole("num_hidden_layers"),
    "num_heads": heads,
    "mlp_dim": file.whole("intermediate_size"),
    "num_kv_heads": file.whole("num_key_value_heads", None) or heads,
    "norm_eps": file.real("rms_norm_eps", 1e-6),
    "max_len": file.whole("max_position_embeddings", 2048),
  }
  file.check_heads(width, heads, fields["num_kv_heads"])
  file.check_window()
  file.check_fixed()
  fields["rope_theta"] = file.rope_theta()
  size = file.whole("vocab_size", None)
  tied = file.flag("tie_word_embeddings")
  if file.problems:
    raise _wrong(label, file.problems)
  return Config(fields, size, tied, file.notes(label))


def _wrong(label, problems):
  return errors.CheckpointError(
    f"{label} does not describe a LLaMA that lavit_jax computes:"
    f" {'; '.join(problems)}. Expected the config.json of a LlamaForCausalLM:"
    " Llama 1 and 2 and models of their form (silu, no biases, plain rotary)."
  )


class _File:
  """The fields of one file; `problems` gathers all that is wrong.

  A method that finds a wrong value notes it and gives one that will do until
  then.
  """

  def __init__(self, content: Mapping[str, Any]):
    self._content = content
    known = {*_READ.split(), *_WITHOUT_EFFECT.split(), *_FIXED}
    self._unknown = [
      name for name in content if name not in known and not name.startswith("_")
    ]
    self.problems: list[str] = []

  def notes(self, label: str) -> tuple[str, ...]:
    """One sentence on the fields whose effect is not known here, if any."""
    if not self._unknown:
      return ()
    listed = ", ".join(
      f"{name}={_short(self._value(name))}" for name in sorted(self._unknown)
    )
    return (
      f"{label} has fields that lavit_jax does not know and left:"
      f" {listed}. If one changes what the model computes, it is another"
      " network here",
    )

  def _value(self, name):
    """A field; one in `rope_parameters.factor`'s form is of an object."""
    outer, _, inner = name.partition(".")
    value = self._content.get(outer, _ABSENT)
    return value.get(inner, _ABSENT) if inner else value

  def _is_wrong(self, name, expected):
    value = self._value(name)
    said = "missing" if value is _ABSENT else _short(value)
    self.problems.append(f"{name} is {said}, expected {expected}")

  def whole(self, name: str, default: Any = _ABSENT) -> int:
    """A whole number of at least 1; null where the default is None."""
    value = self._content.get(name, default)
    if config_fields.is_whole(value) or (value is None and default is None):
      return value
    self._is_wrong(name, "a whole number, 1 or more")
    return 1

  def real(self, name: str, default: Any = _ABSENT) -> float:
    """A finite number above 0."""
    value = self._value(name)
    value = default if value is _ABSENT else value
    if config_fields.is_number(value) and value > 0:
      return float(value)
    self._is_wrong(name, "a number above 0")
    return 1.0

  def flag(self, name: str) -> bool:
    """True or false; false where it is null or missing."""
    value = self._content.get(name)
    if not isinstance(value, bool | None):
      self._is_wrong(name, "true or false")
    return bool(value)

  def check_heads(self, width: int, heads: int, groups: int) -> None:
    """Whether heads are as wide as the model is over their number."""
    if self.problems:
      return
    if width % heads or (width // heads) % 2:
      self._is_wrong(
        "num_attention_heads",
        f"a number that cuts hidden_size={width} into heads of one even width",
      )
    elif self._content.get("head_dim") not in (None, width // heads):
      self._is_wrong(
        "head_dim", f"{width // heads}, hidden_size over num_attention_heads"
      )
    if heads % groups:
      self._is_wrong("num_key_value_heads", f"a divisor of {heads}")

  def check_window(self) -> None:
    """No sliding window, unless it is said not to be used."""
    used = self._content.get("use_sliding_window") is not False
    if used and self._content.get("sliding_window") is not None:
      self._is_wrong("sliding_window", "null: all positions are attended to")

  def check_fixed(self) -> None:
    """The fields that must be at one value."""
    for name, allowed in _FIXED.items():
      value = self._content.get(name, _ABSENT)
      values = value if isinstance(value, list) and value else [value]
      if value is not _ABSENT and any(v not in allowed for v in values):
        shown = " or ".join(_short(a) for a in allowed if a is not None)
        self._is_wrong(name, shown or "null")

  def rope_theta(self) -> float:
    """The base of plain rotary positions; every other kind is wrong.

    transformers 5 has them in rope_parameters, 4 in rope_theta beside
    rope_scaling; where a file has both, the versions read different ones.
    """
    places = [n for n in ("rope_parameters", "rope_scaling") if self._rope(n)]
    if len(places) == 2 and len({str(self._content[n]) for n in places}) == 2:
      self._is_wrong("rope_scaling", "the same as rope_parameters, or null")
    told = ["rope_theta"] if "rope_theta" in self._content else []
    told += [
      f"{n}.rope_theta" for n in places if "rope_theta" in self._content[n]
    ]
    wrong = len(self.problems)
    found = {name: self.real(name) for name in told}
    if wrong == len(self.problems) and len(set(found.values())) > 1:
      listed = ", ".join(
        f"{name} is {value:g}" for name, value in found.items()
      )
      self.problems.append(f"{listed}: expected one value")
    return next(iter(found.values()), 10000.0)

  def _rope(self, place) -> bool:
    """Whether an object of rotary settings is there; notes what is wrong."""
    settings = self._content.get(place)
    if settings is None or settings == {}:
      return False
    if not isinstance(settings, Mapping):
      self._is_wrong(place, "an object, or null")
      return False
    for name in ("rope_type", "type"):
      if settings.get(name, "default") != "default":
        self._is_wrong(f"{place}.{name}", "'default': no scaled positions")
    for name in _FACTORS:
      if settings.get(name) not in _ONE:
        self._is_wrong(f"{place}.{name}", "1")
    for name in [n for n in settings if n not in _ROPE]:
      if isinstance(settings[name], Mapping):  # settings by kind of layer
        self._is_wrong(f"{place}.{name}", "one setting for all layers")
      else:
        self._unknown.append(f"{place}.{name}")
    return True


def _short(value) -> str:
  if value is None or isinstance(value, bool):
    return {None: "null", True: "true", False: "false"}[value]
  return re.sub(r"\s+", " ", repr(value))[:80]
