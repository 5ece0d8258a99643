import dataclasses
import json
import pathlib
import shutil
import string

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reads PyTorch files")
pytest.importorskip("safetensors", reason="reads safetensors files")


from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints, fingerprints
from lavit_jax.infer.loading import made_of, parts
from lavit_jax.port import importing
from lavit_jax.port.tables import names
from tests import micro
from tests.port import imports, sources

FILES = sources.FILES
PARTS = ("encoder", "tokenizer", "lowres", "highres", "llm")
SMALL = ["encoder", "tokenizer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Returns (source, model directory) of the small checkpoint."""
  root = tmp_path_factory.mktemp("imported")
  source = sources.write(root / "source")
  imports.imported(source, root / "model")
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
def test_a_part_is_the_file_converted_by_the_table(model, part, table):
  wanted = sources.flatten(names.to_flax(table, sources.state()[FILES[part]]))
  imports.assert_equal(imports.params(model[1], part), wanted)


def test_the_language_model_comes_with_its_reading_branch(model):
  state = sources.state()
  llm = names.to_flax(names.LLM, state[sources.LLM])
  branch = names.to_flax(names.UNDERSTANDING, state[FILES["overlay"]])
  wanted = sources.flatten({"llm": llm, **branch})
  imports.assert_equal(imports.params(model[1], "llm"), wanted)


def test_sizes_are_inferred_from_the_files(model):
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


def test_the_text_tokenizer_and_small_files_are_copied(model):
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


def test_parts_state_the_parts_they_were_trained_with(model):
  directory = model[1]
  prints = {
    "encoder": fingerprints.of_part(directory, "encoder"),
    "tokenizer": fingerprints.of_tokenizer(directory),
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


def test_another_text_tokenizer_or_encoder_is_refused(model, tmp_path):
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


def test_the_language_model_is_not_read_back_for_fingerprints(
  source, tmp_path, monkeypatch
):
  read, stored = [], checkpoints.StoredPart
  monkeypatch.setattr(
    checkpoints,
    "StoredPart",
    lambda folder, name: read.append(name) or stored(folder, name),
  )
  imports.imported(source, tmp_path / "model")
  assert sorted(read) == ["encoder", "tokenizer"]
  read.clear()
  imports.imported(source, tmp_path / "other", only=["llm"])
  meta = checkpoints.read_meta(tmp_path / "other", "llm")
  assert set(meta["made_of"]) == {"text_tokenizer"}
  assert not read


def test_parts_are_added_to_a_model_that_lacks_them(source, tmp_path):
  target = tmp_path / "model"
  imports.imported(source, target, only=["lowres"])
  assert checkpoints.parts_in(target) == ["lowres"]
  imports.imported(source, target, only=["encoder"])
  assert checkpoints.parts_in(target) == ["encoder", "lowres"]
  with pytest.raises(errors.UsageError, match="already has lowres"):
    imports.imported(source, target, only=["tokenizer", "lowres"])
  assert checkpoints.parts_in(target) == ["encoder", "lowres"]


def test_a_destination_with_other_content_is_refused(source, tmp_path):
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "thesis.txt").write_text("mine")
  assert "not empty" in imports.refusal(source, tmp_path, only=["lowres"])
  (tmp_path / "file").write_text("mine")
  with pytest.raises(errors.UsageError, match="is a file"):
    imports.imported(source, tmp_path / "file", only=["lowres"])


def test_a_destination_with_brackets_is_refused_at_once(tmp_path):
  with pytest.raises(errors.CheckpointError, match=r"out\[1\] has \["):
    importing.run(tmp_path / "not read yet", tmp_path / "out[1]")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_cast_on_request(source, tmp_path, dtype):
  target = tmp_path / "model"
  imports.imported(source, target, only=["lowres"], dtype=dtype)
  tree = names.to_flax(names.LOWRES, sources.state()[FILES["lowres"]])
  kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
  wanted = {k: v.astype(kind) for k, v in sources.flatten(tree).items()}
  imports.assert_equal(imports.params(target, "lowres"), wanted)


def test_numbers_that_float16_cannot_hold_are_named(tmp_path):
  state = sources.state()
  state[FILES["lowres"]]["unet_proj.bias"][3] = 1e6
  source = sources.write(tmp_path / "source", state)
  message = imports.refusal(source, tmp_path, only=["lowres"], dtype="float16")
  assert "unet_proj.bias" in message
  assert "float16" in message


def test_half_precision_is_kept_and_mixed_dtypes_become_float32(tmp_path):
  tensors = {
    name: torch.from_numpy(value).to(torch.bfloat16)
    for name, value in sources.state()[FILES["encoder"]].items()
  }
  name = "blocks.1.mlp.fc1.bias"
  tensors[name] = tensors[name].to(torch.float16)
  state = sources.state() | {FILES["encoder"]: tensors}
  source = sources.write(tmp_path / "source", state)
  imports.imported(source, tmp_path / "model", only=["encoder"])
  found = imports.params(tmp_path / "model", "encoder")
  assert found["cls_token"].dtype == ml_dtypes.bfloat16
  assert found["blocks/mlp/fc1/bias"].dtype == np.float32
  np.testing.assert_array_equal(
    found["blocks/mlp/fc1/bias"][1], tensors[name].float().numpy()
  )
  port = checkpoints.read_meta(tmp_path / "model", "encoder")["port"]
  other = "blocks.0.mlp.fc1.bias"
  assert port["dtypes"] == {name: "float16", other: "bfloat16"}


@pytest.mark.parametrize("safetensors", [False, True])
def test_shards_and_optional_tensors_are_imported(model, tmp_path, safetensors):
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
  imports.shard(source, 3, safetensors)
  imports.imported(source, tmp_path / "model")
  for part in ("encoder", "tokenizer", "lowres", "highres"):
    imports.assert_equal(
      imports.params(tmp_path / "model", part), imports.params(model[1], part)
    )
  plain = imports.params(model[1], "tokenizer")
  wanted = {
    path: value
    for path, value in imports.params(model[1], "llm").items()
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
  imports.assert_equal(imports.params(tmp_path / "model", "llm"), wanted)


def test_shards_without_an_index_must_be_complete(model, source, tmp_path):
  index, weight_map = imports.shard(source, 3, safetensors=False)
  index.unlink()
  imports.imported(source, tmp_path / "whole", only=["llm"])
  imports.assert_equal(
    imports.params(tmp_path / "whole", "llm"), imports.params(model[1], "llm")
  )
  file = sorted(set(weight_map.values()))[2]
  (source / "language_model" / file).unlink()
  assert file in imports.refusal(source, tmp_path, only=["llm"])


def test_a_tensor_in_two_shards_must_be_the_same(model, source, tmp_path):
  _, weight_map = imports.shard(source, 2, safetensors=False)
  files = [source / "language_model" / f for f in set(weight_map.values())]
  first, second = (sources.load(file) for file in files)
  name, value = next(iter(first.items()))
  torch.save(second | {name: value}, files[1])
  imports.imported(source, tmp_path / "same", only=["llm"])
  imports.assert_equal(
    imports.params(tmp_path / "same", "llm"), imports.params(model[1], "llm")
  )
  torch.save(second | {name: value + 1}, files[1])
  message = imports.refusal(source, tmp_path, only=["llm"])
  assert name in message
  assert "different values" in message


def test_rows_beyond_the_vocabulary_are_padding(tmp_path):
  state = sources.state()
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    more = np.ones((30, 8), np.float32)
    state[sources.LLM][name] = np.concatenate([state[sources.LLM][name], more])
  rows = sources.ROWS + 30
  source = sources.write(tmp_path / "source", state, vocab_size=rows)
  imports.imported(source, tmp_path / "model", only=["llm"])
  meta = checkpoints.read_meta(tmp_path / "model", "llm")
  assert meta["llama"]["vocab_size"] == rows
  assert meta["vocabulary"] == {"text_size": 32000, "num_codes": 8}
  head = imports.params(tmp_path / "model", "llm")["llm/head"]
  assert head.shape[0] % 128 == 0
  assert head[rows - 1].all()
  assert not head[rows:].any()


def test_heads_come_from_the_option_or_a_file_or_are_sixteen(tmp_path):
  source = sources.write(tmp_path / "a" / "checkpoint", heads=None)
  message = imports.refusal(source, tmp_path, only=["encoder"])
  assert "16 attention heads" in message
  assert "--heads" in message
  heads = lambda name: checkpoints.read_meta(tmp_path / name, "encoder")["vit"][
    "num_heads"
  ]
  imports.imported(source, tmp_path / "given", only=["encoder"], heads=2)
  assert heads("given") == 2
  (tmp_path / "a" / "variant_config.json").write_text('{"heads": 6}')
  imports.imported(source, tmp_path / "beside", only=["encoder"])
  assert heads("beside") == 6


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
    imports.imported(source, tmp_path / "model", only=SMALL)
  assert set(tmp_path.iterdir()) == before
  monkeypatch.undo()
  imports.imported(source, tmp_path / "model", only=SMALL)
  assert checkpoints.parts_in(tmp_path / "model") == SMALL


def test_what_a_killed_import_left_is_cleaned_up(source, tmp_path):
  left = tmp_path / ".model.partial"
  (left / "llm").mkdir(parents=True)
  (left / "llm" / "part.json").write_text("{}")
  imports.imported(source, tmp_path / "model", only=["lowres"])
  assert not left.exists()
  assert checkpoints.parts_in(tmp_path / "model") == ["lowres"]


def test_adding_parts_is_undone_when_it_is_interrupted(
  source, tmp_path, monkeypatch
):
  target = tmp_path / "model"
  imports.imported(source, target, only=["lowres"])
  rename = pathlib.Path.rename

  def stopped(self, other):
    if self.parent.name == ".model.partial" and self.name == "tokenizer":
      raise KeyboardInterrupt
    return rename(self, other)

  monkeypatch.setattr(pathlib.Path, "rename", stopped)
  with pytest.raises(KeyboardInterrupt):
    imports.imported(source, target, only=SMALL)
  assert checkpoints.parts_in(target) == ["lowres"]
