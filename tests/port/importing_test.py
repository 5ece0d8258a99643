import dataclasses
import json
import os
import pathlib
import shutil
import string

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reads PyTorch files")
pytest.importorskip("safetensors", reason="reads safetensors files")

from safetensors import torch as safe

from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints, fingerprints
from lavit_jax.infer.loading import made_of, parts
from lavit_jax.port import importing
from lavit_jax.port.tables import names
from tests import micro
from tests.port import sources

FILES = sources.FILES
PARTS = ("encoder", "tokenizer", "lowres", "highres", "llm")
SMALL = ["encoder", "tokenizer"]


def imported(source, target, **kwargs):
  return importing.run(source, target, quiet=True, **kwargs)


def params(model, part):
  """Flat arrays of a part as they are stored."""
  loaded = checkpoints.load_part(model, part, dtype=None)
  flat = names.flatten(loaded.params)
  return {path: np.asarray(leaf) for path, leaf in flat.items()}


def assert_equal(found, wanted):
  assert set(found) == set(wanted)
  for path, value in wanted.items():
    assert found[path].dtype == value.dtype, path
    np.testing.assert_array_equal(found[path], value, err_msg=path)


def refusal(source, tmp_path, **kwargs):
  """The message with which an import is refused; nothing may remain."""
  before = set(tmp_path.iterdir())
  with pytest.raises(errors.LavitError) as caught:
    imported(source, tmp_path / "model", **kwargs)
  assert set(tmp_path.iterdir()) == before
  return str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """(source, model directory) of the whole small checkpoint."""
  root = tmp_path_factory.mktemp("imported")
  source = sources.write(root / "source")
  imported(source, root / "model")
  return source, root / "model"


@pytest.fixture
def source(tmp_path):
  return sources.write(tmp_path / "source")


@pytest.mark.parametrize(
  ("part", "table"),
  [
    ("encoder", names.ENCODER),
    ("tokenizer", names.TOKENIZER),
    ("lowres", names.LOWRES),
    ("highres", names.HIGHRES),
  ],
)
def test_a_part_is_the_file_through_the_table(model, part, table):
  wanted = names.flatten(names.to_ours(table, sources.state()[FILES[part]]))
  assert_equal(params(model[1], part), wanted)


def test_the_language_model_comes_with_its_reading_branch(model):
  state = sources.state()
  llm = names.to_ours(names.LLM, state[sources.LLM])
  branch = names.to_ours(names.UNDERSTANDING, state[FILES["overlay"]])
  wanted = names.flatten({"llm": llm, **branch})
  assert_equal(params(model[1], "llm"), wanted)


def test_sizes_are_read_off_the_files(model):
  metas = {part: checkpoints.read_meta(model[1], part) for part in PARTS}
  as_json = lambda config: json.loads(json.dumps(dataclasses.asdict(config)))
  assert metas["encoder"]["vit"] == as_json(sources.VIT)
  assert metas["tokenizer"]["tokenizer"] == as_json(sources.TOKENIZER)
  assert metas["lowres"]["decoder"] == as_json(sources.DECODER)
  assert metas["lowres"]["condition_dim"] == 10
  assert metas["highres"]["decoder"]["depth"] == 2
  assert metas["highres"]["condition_dims"] == [7, 11]
  assert metas["highres"]["pooled_dim"] == 13
  assert metas["llm"]["llama"] == as_json(sources.LLAMA)
  assert metas["llm"]["vocabulary"] == {"text_size": 32000, "num_codes": 8}
  assert metas["llm"]["capacity"] == 9


def test_words_and_small_files_come_along(model):
  source, directory = model
  assert (directory / "tokenizer.model").read_bytes() == sources.WORDS
  for name in ("config.json", "generation_config.json"):
    original = (source / "language_model" / name).read_bytes()
    assert (directory / "official" / name).read_bytes() == original
  hidden = [p.name for p in directory.iterdir() if p.name.startswith(".")]
  assert not hidden


def test_no_path_of_this_machine_is_stored(model):
  source, directory = model
  for part in PARTS:
    assert (
      str(source.parent) not in (directory / part / "part.json").read_text()
    )


def test_parts_say_with_what_they_were_trained(model):
  directory = model[1]
  prints = {
    "encoder": fingerprints.of_part(directory, "encoder"),
    "tokenizer": fingerprints.of_words(directory),
    "text_tokenizer": fingerprints.of_file(directory / "tokenizer.model"),
  }
  words = {n: prints[n] for n in ("encoder", "tokenizer")}
  wanted = {
    "encoder": {},
    "tokenizer": {"encoder": prints["encoder"]},
    "lowres": words,
    "highres": words,
    "llm": prints,
  }
  for part, told in wanted.items():
    found = checkpoints.read_meta(directory, part)
    assert found.get("made_of", {}) == told, part


def test_other_words_than_an_imported_models_are_refused(model, tmp_path):
  directory = tmp_path / "model"
  shutil.copytree(model[1], directory)
  assert parts.text_tokenizer(directory).size
  sentences = [f"{a} {b}" for a in string.ascii_letters for b in "xyz"]
  vocabulary.TextTokenizer.train(sentences, directory / "tokenizer.model", 330)
  with pytest.raises(errors.CheckpointError, match="would be other words"):
    parts.text_tokenizer(directory)
  micro.perturb(directory, "encoder")
  for part in ("tokenizer", "llm", "lowres", "highres"):
    with pytest.raises(errors.CheckpointError, match="another encoder"):
      made_of.check_made_of(directory, part)


def test_the_language_model_is_not_read_again_to_know_it(
  source, tmp_path, monkeypatch
):
  read, stored = [], checkpoints.StoredPart
  monkeypatch.setattr(
    checkpoints,
    "StoredPart",
    lambda folder, name: read.append(name) or stored(folder, name),
  )
  imported(source, tmp_path / "model")
  assert sorted(read) == ["encoder", "tokenizer"]
  read.clear()
  imported(source, tmp_path / "other", only=["llm"])
  meta = checkpoints.read_meta(tmp_path / "other", "llm")
  assert set(meta["made_of"]) == {"text_tokenizer"}
  assert not read


def test_parts_are_added_to_a_model_that_lacks_them(source, tmp_path):
  target = tmp_path / "model"
  imported(source, target, only=["lowres"])
  assert checkpoints.parts_in(target) == ["lowres"]
  imported(source, target, only=["encoder"])
  assert checkpoints.parts_in(target) == ["encoder", "lowres"]
  with pytest.raises(errors.UsageError, match="already has lowres"):
    imported(source, target, only=["tokenizer", "lowres"])
  assert checkpoints.parts_in(target) == ["encoder", "lowres"]


def test_a_place_that_is_taken_is_refused(source, tmp_path):
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "thesis.txt").write_text("mine")
  assert "not empty" in refusal(source, tmp_path, only=["lowres"])
  (tmp_path / "file").write_text("mine")
  with pytest.raises(errors.UsageError, match="is a file"):
    imported(source, tmp_path / "file", only=["lowres"])


def test_a_name_under_which_arrays_would_be_lost_is_refused_at_once(tmp_path):
  with pytest.raises(errors.CheckpointError, match=r"out\[1\] has \["):
    importing.run(tmp_path / "not read yet", tmp_path / "out[1]")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_cast_on_request(source, tmp_path, dtype):
  target = tmp_path / "model"
  imported(source, target, only=["lowres"], dtype=dtype)
  tree = names.to_ours(names.LOWRES, sources.state()[FILES["lowres"]])
  kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
  wanted = {k: v.astype(kind) for k, v in names.flatten(tree).items()}
  assert_equal(params(target, "lowres"), wanted)


def test_numbers_that_float16_cannot_hold_are_named(tmp_path):
  state = sources.state()
  state[FILES["lowres"]]["unet_proj.bias"][3] = 1e6
  source = sources.write(tmp_path / "source", state)
  said = refusal(source, tmp_path, only=["lowres"], dtype="float16")
  assert "unet_proj.bias" in said
  assert "float16" in said


def test_half_precision_is_kept_and_mixtures_are_widened(tmp_path):
  tensors = {
    name: torch.from_numpy(value).to(torch.bfloat16)
    for name, value in sources.state()[FILES["encoder"]].items()
  }
  name = "blocks.1.mlp.fc1.bias"
  tensors[name] = tensors[name].to(torch.float16)
  state = sources.state() | {FILES["encoder"]: tensors}
  source = sources.write(tmp_path / "source", state)
  imported(source, tmp_path / "model", only=["encoder"])
  found = params(tmp_path / "model", "encoder")
  assert found["cls_token"].dtype == ml_dtypes.bfloat16
  assert found["blocks/mlp/fc1/bias"].dtype == np.float32
  np.testing.assert_array_equal(
    found["blocks/mlp/fc1/bias"][1], tensors[name].float().numpy()
  )
  port = checkpoints.read_meta(tmp_path / "model", "encoder")["port"]
  other = "blocks.0.mlp.fc1.bias"
  assert port["dtypes"] == {name: "float16", other: "bfloat16"}


def shard(folder, count, safetensors):
  """Cuts the LLM of a source into shards with an index."""
  tensors = sources.load(folder / sources.LLM)
  (folder / sources.LLM).unlink()
  suffix = "safetensors" if safetensors else "bin"
  stem = "model" if safetensors else "pytorch_model"
  weight_map = {}
  for i in range(count):
    file = f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}"
    part = dict(list(tensors.items())[i::count])
    path = folder / "language_model" / file
    if safetensors:
      safe.save_file({k: v.contiguous() for k, v in part.items()}, path)
    else:
      torch.save(part, path)
    weight_map |= dict.fromkeys(part, file)
  index = folder / "language_model" / f"{stem}.{suffix}.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return index, weight_map


@pytest.mark.parametrize("safetensors", [False, True])
def test_shards_and_what_a_source_may_have_besides(
  model, tmp_path, safetensors
):
  """Shards, inv_freq, copies of the encoder, a selector in the overlay."""
  state = sources.state()
  for i in range(2):
    name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
    state[sources.LLM][name] = np.ones(1, np.float32)
  tokenizer = state[FILES["tokenizer"]]
  tokenizer |= {
    f"encoder.{name}": value for name, value in state[FILES["encoder"]].items()
  }
  overlay = {
    "token_predictor.in_conv.0.bias": np.full(24, 3, np.float32),
    "causal_encoder.norm.weight": np.full(24, 2, np.float32),
    "quantize.embedding.weight": np.zeros((8, 6), np.float32),
    "encoder.cls_token": state[FILES["encoder"]]["cls_token"],
  }
  state[FILES["overlay"]] = overlay
  source = sources.write(tmp_path / "source", state)
  shard(source, 3, safetensors)
  imported(source, tmp_path / "model")
  for part in ("encoder", "tokenizer", "lowres", "highres"):
    assert_equal(params(tmp_path / "model", part), params(model[1], part))
  plain = params(model[1], "tokenizer")
  wanted = {
    path: value
    for path, value in params(model[1], "llm").items()
    if path.startswith("llm/")
  }
  for ours, theirs in (
    ("merger/", "merger/"),
    ("selector/", "selector/"),
    ("projection/", "llm_proj/"),
  ):
    root = f"params/{theirs}"
    wanted |= {
      ours + path.removeprefix(root): value
      for path, value in plain.items()
      if path.startswith(root)
    }
  wanted["selector/norm/bias"] = overlay["token_predictor.in_conv.0.bias"]
  wanted["merger/norm/scale"] = overlay["causal_encoder.norm.weight"]
  assert_equal(params(tmp_path / "model", "llm"), wanted)


def test_further_rows_are_padding(tmp_path):
  state = sources.state()
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    more = np.ones((30, 8), np.float32)
    state[sources.LLM][name] = np.concatenate([state[sources.LLM][name], more])
  rows = sources.ROWS + 30
  source = sources.write(tmp_path / "source", state, vocab_size=rows)
  imported(source, tmp_path / "model", only=["llm"])
  meta = checkpoints.read_meta(tmp_path / "model", "llm")
  assert meta["llama"]["vocab_size"] == rows
  assert meta["vocabulary"] == {"text_size": 32000, "num_codes": 8}
  head = params(tmp_path / "model", "llm")["llm/head"]
  assert head.shape[0] % 128 == 0
  assert head[rows - 1].all()
  assert not head[rows:].any()


def test_heads_are_given_or_stated_or_sixteen(tmp_path):
  source = sources.write(tmp_path / "a" / "checkpoint", heads=None)
  said = refusal(source, tmp_path, only=["encoder"])
  assert "16 attention heads" in said
  assert "--heads" in said
  heads = lambda name: checkpoints.read_meta(tmp_path / name, "encoder")["vit"][
    "num_heads"
  ]
  imported(source, tmp_path / "given", only=["encoder"], heads=2)
  assert heads("given") == 2
  (tmp_path / "a" / "variant_config.json").write_text('{"heads": 6}')
  imported(source, tmp_path / "beside", only=["encoder"])
  assert heads("beside") == 6


# Bad input -----------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
  state = sources.state()
  del state[FILES["encoder"]]["blocks.0.attn.qkv.weight"]
  state[FILES["tokenizer"]]["vit_prj.bias"] = np.zeros(8, np.float32)
  state[FILES["lowres"]]["norm.bias"] = np.zeros(25, np.float32)
  del state[sources.LLM]["model.layers.1.mlp.up_proj.weight"]
  state[FILES["overlay"]]["nothing.weight"] = np.zeros(3, np.float32)
  said = refusal(sources.write(tmp_path / "source", state), tmp_path)
  for piece in (
    "eva_vitg_psz14.bin: blocks.0.attn.qkv.weight",
    "tokenizer_encoder.bin: vit_prj.bias",
    "tokenizer_decoder.bin: norm.bias [25] instead of [24]",
    "language_model: model.layers.1.mlp.up_proj.weight",
    "visual_weight.bin: nothing.weight",
  ):
    assert piece in said


def test_layers_that_config_json_counts_and_no_file_has_are_missing(tmp_path):
  state = sources.state()
  state[sources.LLM] = {
    name: value
    for name, value in state[sources.LLM].items()
    if ".layers.1." not in name
  }
  source = sources.write(tmp_path / "source", state)
  said = refusal(source, tmp_path, only=["llm"])
  assert "missing: language_model: model.layers.1." in said


def test_a_tensor_of_another_rank_is_no_size(tmp_path):
  state = sources.state()
  state[FILES["encoder"]]["pos_embed"] = np.zeros(10, np.float32)
  source = sources.write(tmp_path / "source", state)
  assert "pos_embed" in refusal(source, tmp_path, only=["encoder"])


def test_biases_may_be_missing_if_they_are_named(tmp_path):
  state = sources.state()
  gone = ["blocks.1.attn.q_bias", "blocks.0.norm1.weight"]
  for name in gone:
    del state[FILES["encoder"]][name]
  source = sources.write(tmp_path / "source", state)
  said = refusal(source, tmp_path, only=["encoder"], allow_missing=gone[:1])
  assert gone[1] in said
  assert gone[0] not in said
  target = tmp_path / "model"
  imported(source, target, only=["encoder"], allow_missing=gone)
  found = params(target, "encoder")
  assert not found["blocks/attn/q_bias"][1].any()
  assert (found["blocks/norm1/scale"][0] == 1).all()


@pytest.mark.parametrize(
  ("name", "why"),
  [
    ("blocks.0.attn.qkv.weight", "nothing can stand in"),
    ("blocks.0.atn.bias", "no file that is imported has"),
  ],
)
def test_other_tensors_may_not_be_missing(source, tmp_path, name, why):
  said = refusal(source, tmp_path, only=["encoder"], allow_missing=[name])
  assert name in said
  assert why in said


def test_missing_files_are_listed(source, tmp_path):
  (source / FILES["highres"]).unlink()
  (source / "language_model" / "tokenizer.model").unlink()
  said = refusal(source, tmp_path)
  assert FILES["highres"] in said
  assert "language_model/tokenizer.model" in said


def test_another_layout_is_refused(tmp_path, source):
  (tmp_path / "other").mkdir()
  assert "official layout" in refusal(tmp_path / "other", tmp_path)
  source.rename(tmp_path / "other" / "checkpoint")
  assert "Did you mean" in refusal(tmp_path / "other", tmp_path)


def test_what_is_no_path_and_no_id_is_refused(tmp_path):
  assert "no such file" in refusal("./not/there/at/all", tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_truncated_file_is_named(source, tmp_path, keep):
  path = source / FILES["encoder"]
  os.truncate(path, int(keep * path.stat().st_size) if keep < 1 else keep)
  said = refusal(source, tmp_path, only=["encoder"])
  assert FILES["encoder"] in said
  assert "truncated" in said


def test_a_pickle_that_runs_code_is_refused_unrun(source, tmp_path):
  path = source / FILES["encoder"]
  torch.save({"cls_token": _Evil(tmp_path / "run")}, path)
  said = refusal(source, tmp_path, only=["encoder"])
  assert FILES["encoder"] in said
  assert "not only tensors" in said
  assert "mkdir" in said
  assert not (tmp_path / "run").exists()


class _Evil:
  def __init__(self, path):
    self._path = str(path)

  def __reduce__(self):
    return os.mkdir, (self._path,)


def test_a_pickle_with_other_values_is_refused(source, tmp_path):
  path = source / FILES["lowres"]
  torch.save(sources.load(path) | {"step": 7}, path)
  said = refusal(source, tmp_path, only=["lowres"])
  assert "'step' is a int" in said
  assert FILES["lowres"] in said


def test_integers_are_no_weights(tmp_path):
  state = sources.state()
  state[FILES["lowres"]]["norm.bias"] = np.zeros(24, np.int8)
  source = sources.write(tmp_path / "source", state)
  assert "norm.bias as torch.int8" in refusal(source, tmp_path, only=["lowres"])


def test_double_precision_needs_a_cast(tmp_path):
  state = sources.state()
  state[FILES["lowres"]]["norm.bias"] = np.arange(24.0)
  source = sources.write(tmp_path / "source", state)
  said = refusal(source, tmp_path, only=["lowres"])
  assert "norm.bias" in said
  assert "--dtype float32" in said
  imported(source, tmp_path / "cast", only=["lowres"], dtype="float32")


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_shard_missing_from_an_index_is_named(source, tmp_path, safetensors):
  _, weight_map = shard(source, 3, safetensors)
  file = sorted(set(weight_map.values()))[1]
  (source / "language_model" / file).unlink()
  assert file in refusal(source, tmp_path, only=["llm"])


def test_shards_without_an_index_must_be_complete(model, source, tmp_path):
  index, weight_map = shard(source, 3, safetensors=False)
  index.unlink()
  imported(source, tmp_path / "whole", only=["llm"])
  assert_equal(params(tmp_path / "whole", "llm"), params(model[1], "llm"))
  file = sorted(set(weight_map.values()))[2]
  (source / "language_model" / file).unlink()
  assert file in refusal(source, tmp_path, only=["llm"])


@pytest.mark.parametrize(
  "name", ["../secret.bin", "/etc/weights.bin", "sub/part.bin", "part.sh"]
)
def test_an_index_that_leaves_its_folder_is_refused(source, tmp_path, name):
  index, weight_map = shard(source, 2, safetensors=False)
  weight_map["lm_head.weight"] = name
  index.write_text(json.dumps({"weight_map": weight_map}))
  said = refusal(source, tmp_path, only=["llm"])
  assert repr(name) in said
  assert index.name in said


@pytest.mark.parametrize(
  "text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_an_index_of_another_form_is_refused(source, tmp_path, text):
  index, _ = shard(source, 2, safetensors=False)
  index.write_text(text)
  said = refusal(source, tmp_path, only=["llm"])
  assert f"{index.name} is no index" in said


def test_a_name_twice_in_an_index_is_refused(source, tmp_path):
  index, weight_map = shard(source, 2, safetensors=False)
  text = json.dumps({"weight_map": weight_map})
  text = text.replace('"lm_head.weight"', '"model.norm.weight"')
  index.write_text(text)
  said = refusal(source, tmp_path, only=["llm"])
  assert "model.norm.weight twice" in said


def test_a_name_that_no_shard_has_is_refused(source, tmp_path):
  index, weight_map = shard(source, 2, safetensors=False)
  weight_map["model.layers.9.x"] = next(iter(weight_map.values()))
  index.write_text(json.dumps({"weight_map": weight_map}))
  assert "model.layers.9.x" in refusal(source, tmp_path, only=["llm"])


def test_a_tensor_in_two_shards_must_be_the_same(model, source, tmp_path):
  _, weight_map = shard(source, 2, safetensors=False)
  files = [source / "language_model" / f for f in set(weight_map.values())]
  first, second = (sources.load(file) for file in files)
  name, value = next(iter(first.items()))
  torch.save(second | {name: value}, files[1])
  imported(source, tmp_path / "same", only=["llm"])
  assert_equal(params(tmp_path / "same", "llm"), params(model[1], "llm"))
  torch.save(second | {name: value + 1}, files[1])
  said = refusal(source, tmp_path, only=["llm"])
  assert name in said
  assert "different values" in said


@pytest.mark.parametrize("file", ["tokenizer", "overlay"])
def test_copies_of_the_encoder_must_be_the_same(tmp_path, file):
  state = sources.state()
  wrong = state[FILES["encoder"]]["norm.bias"] + 1
  state[FILES[file]]["encoder.norm.bias"] = wrong
  state[FILES[file]]["encoder.nothing"] = wrong
  source = sources.write(tmp_path / "source", state)
  said = refusal(source, tmp_path, only=["tokenizer", "llm"])
  assert f"{FILES[file]}: encoder.norm.bias" in said
  assert f"not used: {FILES[file]}: encoder.nothing" in said


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
  state = sources.state()
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    state[sources.LLM][name] = state[sources.LLM][name][:-1]
  source = sources.write(tmp_path / "source", state)
  said = refusal(source, tmp_path, only=["llm"])
  assert "32009 rows" in said
  assert "32010" in said


def test_embedding_and_head_must_have_the_same_rows(tmp_path):
  state = sources.state()
  state[sources.LLM]["lm_head.weight"] = np.zeros((32000, 8), np.float32)
  source = sources.write(tmp_path / "source", state)
  said = refusal(source, tmp_path, only=["llm"])
  assert "lm_head.weight [32000, 8] instead of [32010, 8]" in said


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
  said = refusal(source, tmp_path, only=["llm"])
  assert next(iter(fields)) in said


def test_files_of_two_models_are_refused(tmp_path):
  state = sources.state()
  state[FILES["overlay"]] |= {
    "vit_proj.weight": np.zeros((9, 24), np.float32),
    "vit_proj.bias": np.zeros(9, np.float32),
  }
  source = sources.write(tmp_path / "source", state)
  said = refusal(source, tmp_path, only=["llm"])
  assert "vit_proj.bias [9] instead of [8]" in said


@pytest.mark.parametrize("wrong", [["unet"], [""], []])
def test_parts_that_there_are_not_are_refused(source, tmp_path, wrong):
  assert "encoder, tokenizer" in refusal(source, tmp_path, only=wrong)


# Interruptions --------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "full")])
def test_an_interrupted_import_leaves_nothing(
  source, tmp_path, monkeypatch, error
):
  save, before = checkpoints.save_part, set(tmp_path.iterdir())

  def stopped(directory, name, *args, **kwargs):
    if name == "tokenizer":
      raise error
    return save(directory, name, *args, **kwargs)

  monkeypatch.setattr(checkpoints, "save_part", stopped)
  with pytest.raises((KeyboardInterrupt, errors.CheckpointError)):
    imported(source, tmp_path / "model", only=SMALL)
  assert set(tmp_path.iterdir()) == before
  monkeypatch.undo()
  imported(source, tmp_path / "model", only=SMALL)
  assert checkpoints.parts_in(tmp_path / "model") == SMALL


def test_what_a_killed_import_left_is_cleaned_up(source, tmp_path):
  left = tmp_path / ".model.partial"
  (left / "llm").mkdir(parents=True)
  (left / "llm" / "part.json").write_text("{}")
  imported(source, tmp_path / "model", only=["lowres"])
  assert not left.exists()
  assert checkpoints.parts_in(tmp_path / "model") == ["lowres"]


def test_adding_parts_is_undone_when_it_is_interrupted(
  source, tmp_path, monkeypatch
):
  target = tmp_path / "model"
  imported(source, target, only=["lowres"])
  rename = pathlib.Path.rename

  def stopped(self, other):
    if self.parent.name == ".model.partial" and self.name == "tokenizer":
      raise KeyboardInterrupt
    return rename(self, other)

  monkeypatch.setattr(pathlib.Path, "rename", stopped)
  with pytest.raises(KeyboardInterrupt):
    imported(source, target, only=SMALL)
  assert checkpoints.parts_in(target) == ["lowres"]
