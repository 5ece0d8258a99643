import json

import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.port.formats import llama_config

SIZES = {
  "model_type": "llama",
  "hidden_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "vocab_size": 40,
  "max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def read(tmp_path, **fields):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(SIZES | fields))
  return llama_config.read(path, "here/config.json")


def refusal(tmp_path, **fields):
  with pytest.raises(errors.CheckpointError) as caught:
    read(tmp_path, **fields)
  assert "here/config.json" in str(caught.value)
  return str(caught.value)


def test_sizes_are_read_and_defaults_are_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  config = read(tmp_path)
  theirs = transformers.LlamaConfig(**SIZES)
  assert config.fields == {
    "width": 32,
    "depth": 1,
    "num_heads": 4,
    "mlp_dim": 48,
    "num_kv_heads": theirs.num_key_value_heads,
    "norm_eps": theirs.rms_norm_eps,
    "max_len": 64,
    "rope_theta": theirs.rope_parameters["rope_theta"],
  }
  assert (config.vocab_size, config.tied, config.notes) == (40, False, ())


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", 7])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_scaled_positions_are_refused_in_every_field(tmp_path, kind, name):
  scaled = {name: kind, "factor": 4.0}
  for fields in (
    {"rope_scaling": scaled},
    {"rope_parameters": scaled},
    {"rope_parameters": PLAIN, "rope_scaling": scaled},
    {"rope_parameters": scaled, "rope_scaling": PLAIN},
  ):
    place = next(p for p, value in fields.items() if value is scaled)
    assert f"{place}.{name}" in refusal(tmp_path, **fields)
  message = refusal(tmp_path, rope_parameters={"full_attention": scaled})
  assert "rope_parameters.full_attention" in message


@pytest.mark.parametrize("kind", [{}, {"type": "default"}])
def test_factors_of_positions_must_be_one(tmp_path, kind):
  for place in ("rope_scaling", "rope_parameters"):
    for name in ("factor", "attention_factor"):
      message = refusal(tmp_path, **{place: {name: 4.0, **kind}})
      assert f"{place}.{name} is 4.0, expected 1" in message
      config = read(tmp_path, **{place: {name: 1.0, **kind}})
      assert not config.notes


def test_the_base_of_positions_is_read_from_every_field(tmp_path):
  of = lambda **fields: read(tmp_path, **fields).fields["rope_theta"]
  assert of(rope_theta=5e5, rope_scaling=None) == 5e5
  assert of(rope_parameters=PLAIN | {"rope_theta": 1e6}) == 1e6
  assert of(rope_theta=1e6, rope_parameters=PLAIN | {"rope_theta": 1e6}) == 1e6
  message = refusal(tmp_path, rope_theta=1e6, rope_parameters=PLAIN)
  assert "rope_theta is 1e+06, rope_parameters.rope_theta is 10000" in message
  other = PLAIN | {"rope_theta": 1e6}
  message = refusal(tmp_path, rope_scaling=other, rope_parameters=PLAIN)
  assert "rope_scaling is" in message


@pytest.mark.parametrize(
  ("field", "values"),
  [
    ("hidden_size", ["64", 64.0, None, 0, -1, True, [64], 8 * 10**400]),
    ("num_attention_heads", [0, None, "4", 3, 32]),
    ("num_hidden_layers", [-1, 0, None, 1.5]),
    ("intermediate_size", [None, "x", {}]),
    ("num_key_value_heads", ["2", 0, 3, 8, -4]),
    ("max_position_embeddings", [None, "4096", 0]),
    ("vocab_size", ["40", 0, 1.5]),
    ("rms_norm_eps", [None, "x", 0, -1e-6, float("nan"), float("inf"), True]),
    ("rope_theta", ["x", None, 0, float("inf"), [], 10**400]),
    ("rope_parameters", [[1], "linear", 3]),
    ("rope_scaling", [[1], "linear", 3]),
    ("tie_word_embeddings", ["yes", 1, []]),
    ("head_dim", [16, "8", 0]),
    ("model_type", ["mistral", None, 3]),
  ],
)
def test_a_field_of_a_wrong_type_is_named(tmp_path, field, values):
  for value in values:
    message = refusal(tmp_path, **{field: value})
    assert f"{field} is " in message, value


def test_all_problems_are_in_one_error(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps({"hidden_size": "64", "mlp_bias": True}))
  with pytest.raises(errors.CheckpointError) as caught:
    llama_config.read(path, "config.json")
  for part in (
    "hidden_size is '64', expected a whole number",
    "num_hidden_layers is missing",
    "mlp_bias is true, expected false",
  ):
    assert part in str(caught.value)


@pytest.mark.parametrize(
  ("field", "right", "wrong"),
  [
    ("attention_bias", [False, None], [True]),
    ("mlp_bias", [False, None], [True]),
    ("hidden_act", ["silu", "swish"], ["gelu", None, ["silu", "gelu"]]),
    ("head_dim", [None, 8], [16]),
    ("sliding_window", [None], [16, 4096]),
    ("layer_types", [["full_attention"] * 2], [["sliding_attention"]]),
    ("partial_rotary_factor", [1.0, None], [0.5]),
    ("rope_type", ["default"], ["linear"]),
    ("attention_multiplier", [None], [0.1]),
    ("logits_scaling", [1.0], [8.0]),
    ("embedding_multiplier", [1], [12.0]),
    ("final_logit_softcapping", [None], [30.0]),
    ("num_experts", [0], [8]),
    ("quantization_config", [None], [{"bits": 4}]),
  ],
)
def test_fields_that_change_the_network_are_checked_by_value(
  tmp_path, field, right, wrong
):
  for value in right:
    assert read(tmp_path, **{field: value}).fields == read(tmp_path).fields
  for value in wrong:
    assert f"{field} is " in refusal(tmp_path, **{field: value})


def test_a_window_that_is_not_used_is_no_window(tmp_path):
  found = read(tmp_path, sliding_window=16, use_sliding_window=False)
  assert found.fields == read(tmp_path).fields


def test_unknown_fields_are_named_in_a_note(tmp_path):
  config = read(
    tmp_path, mood="good", auto_map={}, rope_parameters=PLAIN | {"beta": 3}
  )
  (note,) = config.notes
  for part in ("mood='good'", "auto_map={}", "rope_parameters.beta=3"):
    assert part in note
  assert not read(tmp_path, _name_or_path="x", pretraining_tp=2).notes


def test_every_field_of_transformers_is_accounted_for(tmp_path):
  transformers = pytest.importorskip("transformers")
  fields = transformers.LlamaConfig(**SIZES).to_dict()
  assert not read(tmp_path, **fields).notes


# What transformers computes otherwise must be read or refused.
CHANGES = {
  "hidden_act": "gelu",
  "rms_norm_eps": 1e-2,
  "rope_theta": 500.0,
  "rope_scaling": LINEAR,
  "rope_parameters": LINEAR | {"rope_theta": 1e4},
  "partial_rotary_factor": 0.5,
  "attention_bias": True,
  "mlp_bias": True,
  "head_dim": 16,
  "num_key_value_heads": 2,
  "num_attention_heads": 2,
  "sliding_window": 3,
  "pretraining_tp": 2,
  "initializer_range": 0.3,
  "attention_dropout": 0.5,
  "max_position_embeddings": 4,
  "use_cache": False,
}


def logits_of(fields):
  """Returns logits of transformers, with weights that depend on no field."""
  import torch
  import transformers

  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
  random = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in sorted(model.named_parameters()):
      value.copy_(torch.randn(value.shape, generator=random) * 0.3)
      if name.endswith("bias"):
        value.fill_(0.5)
    return model.eval()(torch.arange(12)[None]).logits.numpy()


@pytest.fixture(scope="module")
def usual_logits():
  for module in ("torch", "transformers"):
    pytest.importorskip(module)
  return logits_of(SIZES)


@pytest.mark.parametrize("field", list(CHANGES))
def test_a_field_that_changes_transformers_logits_is_not_ignored(
  usual_logits, tmp_path, field
):
  changed = SIZES | {field: CHANGES[field]}
  moved = not np.allclose(usual_logits, logits_of(changed), atol=1e-4)
  try:
    passed_over = read(tmp_path, **changed).fields == read(tmp_path).fields
  except errors.CheckpointError:
    passed_over = False
  assert not (moved and passed_over)
