"""Sources that are refused, with errors that name the reason."""

import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reads PyTorch files")
pytest.importorskip("safetensors", reason="reads safetensors files")

from tests.port import imports, sources

FILES = sources.FILES


@pytest.fixture
def source(tmp_path):
  return sources.write(tmp_path / "source")


def test_all_problems_of_all_files_are_listed_at_once(tmp_path):
  state = sources.state()
  del state[FILES["encoder"]]["blocks.0.attn.qkv.weight"]
  state[FILES["tokenizer"]]["vit_prj.bias"] = np.zeros(8, np.float32)
  state[FILES["lowres"]]["norm.bias"] = np.zeros(25, np.float32)
  del state[sources.LLM]["model.layers.1.mlp.up_proj.weight"]
  state[FILES["overlay"]]["nothing.weight"] = np.zeros(3, np.float32)
  message = imports.refusal(sources.write(tmp_path / "source", state), tmp_path)
  for piece in (
    "eva_vitg_psz14.bin: blocks.0.attn.qkv.weight",
    "tokenizer_encoder.bin: vit_prj.bias",
    "tokenizer_decoder.bin: norm.bias [25] instead of [24]",
    "language_model: model.layers.1.mlp.up_proj.weight",
    "visual_weight.bin: nothing.weight",
  ):
    assert piece in message


def test_layers_in_config_json_that_no_file_has_are_missing(tmp_path):
  state = sources.state()
  state[sources.LLM] = {
    name: value
    for name, value in state[sources.LLM].items()
    if ".layers.1." not in name
  }
  source = sources.write(tmp_path / "source", state)
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert "missing: language_model: model.layers.1." in message


def test_a_tensor_of_another_rank_shows_no_size(tmp_path):
  state = sources.state()
  state[FILES["encoder"]]["pos_embed"] = np.zeros(10, np.float32)
  source = sources.write(tmp_path / "source", state)
  assert "pos_embed" in imports.refusal(source, tmp_path, only=["encoder"])


def test_biases_may_be_missing_if_they_are_named(tmp_path):
  state = sources.state()
  gone = ["blocks.1.attn.q_bias", "blocks.0.norm1.weight"]
  for name in gone:
    del state[FILES["encoder"]][name]
  source = sources.write(tmp_path / "source", state)
  message = imports.refusal(
    source, tmp_path, only=["encoder"], allow_missing=gone[:1]
  )
  assert gone[1] in message
  assert gone[0] not in message
  target = tmp_path / "model"
  imports.imported(source, target, only=["encoder"], allow_missing=gone)
  found = imports.params(target, "encoder")
  assert not found["blocks/attn/q_bias"][1].any()
  assert (found["blocks/norm1/scale"][0] == 1).all()


@pytest.mark.parametrize(
  ("name", "why"),
  [
    ("blocks.0.attn.qkv.weight", "nothing can replace"),
    ("blocks.0.atn.bias", "no file that is imported has"),
  ],
)
def test_other_tensors_may_not_be_missing(source, tmp_path, name, why):
  message = imports.refusal(
    source, tmp_path, only=["encoder"], allow_missing=[name]
  )
  assert name in message
  assert why in message


def test_missing_files_are_listed(source, tmp_path):
  (source / FILES["highres"]).unlink()
  (source / "language_model" / "tokenizer.model").unlink()
  message = imports.refusal(source, tmp_path)
  assert FILES["highres"] in message
  assert "language_model/tokenizer.model" in message


def test_another_layout_is_refused(tmp_path, source):
  (tmp_path / "other").mkdir()
  assert "official layout" in imports.refusal(tmp_path / "other", tmp_path)
  source.rename(tmp_path / "other" / "checkpoint")
  assert "Did you mean" in imports.refusal(tmp_path / "other", tmp_path)


def test_a_source_that_is_neither_path_nor_id_is_refused(tmp_path):
  assert "no such file" in imports.refusal("./not/there/at/all", tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_truncated_file_is_named(source, tmp_path, keep):
  path = source / FILES["encoder"]
  os.truncate(path, int(keep * path.stat().st_size) if keep < 1 else keep)
  message = imports.refusal(source, tmp_path, only=["encoder"])
  assert FILES["encoder"] in message
  assert "truncated" in message


def test_a_pickle_with_code_is_refused_without_running_it(source, tmp_path):
  path = source / FILES["encoder"]
  torch.save({"cls_token": _Evil(tmp_path / "run")}, path)
  message = imports.refusal(source, tmp_path, only=["encoder"])
  assert FILES["encoder"] in message
  assert "not only tensors" in message
  assert "mkdir" in message
  assert not (tmp_path / "run").exists()


class _Evil:
  def __init__(self, path):
    self._path = str(path)

  def __reduce__(self):
    return os.mkdir, (self._path,)


def test_a_pickle_with_other_values_is_refused(source, tmp_path):
  path = source / FILES["lowres"]
  torch.save(sources.load(path) | {"step": 7}, path)
  message = imports.refusal(source, tmp_path, only=["lowres"])
  assert "'step' is a int" in message
  assert FILES["lowres"] in message


def test_integers_are_no_weights(tmp_path):
  state = sources.state()
  state[FILES["lowres"]]["norm.bias"] = np.zeros(24, np.int8)
  source = sources.write(tmp_path / "source", state)
  assert "norm.bias as torch.int8" in imports.refusal(
    source, tmp_path, only=["lowres"]
  )


def test_double_precision_needs_a_cast(tmp_path):
  state = sources.state()
  state[FILES["lowres"]]["norm.bias"] = np.arange(24.0)
  source = sources.write(tmp_path / "source", state)
  message = imports.refusal(source, tmp_path, only=["lowres"])
  assert "norm.bias" in message
  assert "--dtype float32" in message
  imports.imported(source, tmp_path / "cast", only=["lowres"], dtype="float32")


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_shard_missing_from_an_index_is_named(source, tmp_path, safetensors):
  _, weight_map = imports.shard(source, 3, safetensors)
  file = sorted(set(weight_map.values()))[1]
  (source / "language_model" / file).unlink()
  assert file in imports.refusal(source, tmp_path, only=["llm"])


@pytest.mark.parametrize(
  "name", ["../secret.bin", "/etc/weights.bin", "sub/part.bin", "part.sh"]
)
def test_an_index_that_leaves_its_folder_is_refused(source, tmp_path, name):
  index, weight_map = imports.shard(source, 2, safetensors=False)
  weight_map["lm_head.weight"] = name
  index.write_text(json.dumps({"weight_map": weight_map}))
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert repr(name) in message
  assert index.name in message


@pytest.mark.parametrize(
  "text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_an_index_of_another_form_is_refused(source, tmp_path, text):
  index, _ = imports.shard(source, 2, safetensors=False)
  index.write_text(text)
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert f"{index.name} is no index" in message


def test_a_name_twice_in_an_index_is_refused(source, tmp_path):
  index, weight_map = imports.shard(source, 2, safetensors=False)
  text = json.dumps({"weight_map": weight_map})
  text = text.replace('"lm_head.weight"', '"model.norm.weight"')
  index.write_text(text)
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert "model.norm.weight twice" in message


def test_a_name_that_no_shard_has_is_refused(source, tmp_path):
  index, weight_map = imports.shard(source, 2, safetensors=False)
  weight_map["model.layers.9.x"] = next(iter(weight_map.values()))
  index.write_text(json.dumps({"weight_map": weight_map}))
  assert "model.layers.9.x" in imports.refusal(source, tmp_path, only=["llm"])


@pytest.mark.parametrize("file", ["tokenizer", "overlay"])
def test_copies_of_the_encoder_must_be_the_same(tmp_path, file):
  state = sources.state()
  wrong = state[FILES["encoder"]]["norm.bias"] + 1
  state[FILES[file]]["encoder.norm.bias"] = wrong
  state[FILES[file]]["encoder.nothing"] = wrong
  source = sources.write(tmp_path / "source", state)
  message = imports.refusal(source, tmp_path, only=["tokenizer", "llm"])
  assert f"{FILES[file]}: encoder.norm.bias" in message
  assert f"not used: {FILES[file]}: encoder.nothing" in message


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
  state = sources.state()
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    state[sources.LLM][name] = state[sources.LLM][name][:-1]
  source = sources.write(tmp_path / "source", state)
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert "32009 rows" in message
  assert "32010" in message


def test_embedding_and_head_must_have_the_same_rows(tmp_path):
  state = sources.state()
  state[sources.LLM]["lm_head.weight"] = np.zeros((32000, 8), np.float32)
  source = sources.write(tmp_path / "source", state)
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert "lm_head.weight [32000, 8] instead of [32010, 8]" in message


@pytest.mark.parametrize(
  "fields",
  [
    {"model_type": "mistral"},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"attention_bias": True},
    {"hidden_act": "gelu"},
    {"head_dim": 5},
  ],
)
def test_a_language_model_of_another_kind_is_refused(tmp_path, fields):
  source = sources.write(tmp_path / "source", **fields)
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert next(iter(fields)) in message


def test_files_of_two_models_are_refused(tmp_path):
  state = sources.state()
  state[FILES["overlay"]] |= {
    "vit_proj.weight": np.zeros((9, 24), np.float32),
    "vit_proj.bias": np.zeros(9, np.float32),
  }
  source = sources.write(tmp_path / "source", state)
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert "vit_proj.bias [9] instead of [8]" in message


@pytest.mark.parametrize("wrong", [["unet"], [""], []])
def test_unknown_parts_are_refused(source, tmp_path, wrong):
  assert "encoder, tokenizer" in imports.refusal(source, tmp_path, only=wrong)
