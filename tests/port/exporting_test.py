import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="writes PyTorch files")
transformers = pytest.importorskip(
  "transformers", reason="reads what was exported"
)
pytest.importorskip("safetensors", reason="reads safetensors files")

from safetensors import torch as safe

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.infer import pipeline
from lavit_jax.models import llama
from lavit_jax.port import exporting, importing
from lavit_jax.port.formats import tensor_files
from lavit_jax.port.writing import official_files
from tests.golden import load
from tests.port import sources

FILES = sources.FILES


def imported(source, target, **kwargs):
  importing.run(source, target, quiet=True, **kwargs)
  return target


def exported(model, target, format):
  return exporting.run(model, target, format=format, quiet=True)


def assert_comes_back(source, target):
  """Checks every file of a source that is no pixel decoder, bit for bit."""
  for folder in ("visual_tokenizer", "language_model"):
    wanted = sorted(p.name for p in (source / folder).iterdir())
    assert sorted(p.name for p in (target / folder).iterdir()) == wanted
    for name in wanted:
      left, right = source / folder / name, target / folder / name
      if name.endswith(".bin"):
        sources.assert_same_state(sources.load(right), sources.load(left))
      else:
        assert left.read_bytes() == right.read_bytes(), name


def odd_state():
  """Returns tensors of mixed precision, with all optional tensors."""
  state = sources.state()
  half = {
    name: torch.from_numpy(value).to(torch.float16)
    for name, value in state[FILES["encoder"]].items()
  }
  half["norm.bias"] = half["norm.bias"].to(torch.bfloat16)
  state[FILES["encoder"]] = half
  llm = {
    name: torch.from_numpy(value).to(torch.bfloat16)
    for name, value in state[sources.LLM].items()
  }
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  llm[name] = torch.full((1,), 0.7)
  llm["model.layers.1.mlp.up_proj.weight"] = torch.randn(12, 8)
  state[sources.LLM] = llm
  tokenizer = state[FILES["tokenizer"]]
  tokenizer |= {f"encoder.{name}": value for name, value in half.items()}
  tokenizer["encoder.cls_token"] = half["cls_token"].float()
  state[FILES["overlay"]] = {
    "token_predictor.in_conv.0.bias": np.full(24, 3, np.float32),
    "causal_encoder.norm.weight": torch.full((24,), 2, dtype=torch.float16),
    "quantize.embedding.weight": np.ones((8, 6), np.float32),
    "encode_task_layer.0.bias": tokenizer["encode_task_layer.0.bias"],
    "encoder.cls_token": half["cls_token"],
  }
  return state


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """Returns (source, model) of a small checkpoint with every oddity."""
  root = tmp_path_factory.mktemp("small")
  source = sources.write(root / "source", odd_state(), heads=None)
  return source, imported(source, root / "model", heads=sources.HEADS)


def test_official_in_and_out_is_the_same_to_the_last_bit(small, tmp_path):
  source, model = small
  exported(model, tmp_path / "back", "official")
  assert_comes_back(source, tmp_path / "back")


def test_parts_imported_one_by_one_come_back_too(small, tmp_path):
  source, _ = small
  for parts in (["llm"], ["lowres", "tokenizer"], ["encoder", "highres"]):
    imported(source, tmp_path / "model", only=parts, heads=sources.HEADS)
  exported(tmp_path / "model", tmp_path / "back", "official")
  assert_comes_back(source, tmp_path / "back")


def test_weights_of_the_recorded_release_come_back(tmp_path):
  """Files of the official modules, with a language model of their width."""
  files = {
    FILES[name]: load.official(name)
    for name in ("encoder", "tokenizer", "lowres", "highres")
  }
  files[FILES["overlay"]] = load.official("understanding")
  config = llama.LlamaConfig(
    vocab_size=48386,
    width=32,
    depth=1,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=8,
  )
  files[sources.LLM] = sources.random_llama(config)
  source = sources.write(tmp_path / "source", files, heads=4, **_fields(config))
  imported(source, tmp_path / "model")
  exported(tmp_path / "model", tmp_path / "back", "official")
  assert_comes_back(source, tmp_path / "back")


def _fields(config):
  content = sources.llama_folder.config_json(config, "float32")
  return {key: content[key] for key in content if key != "architectures"}


def test_large_language_models_are_sharded_as_by_hugging_face(
  small, tmp_path, monkeypatch
):
  source, model = small
  monkeypatch.setattr(official_files, "_SHARD", 600_000)
  exported(model, tmp_path / "back", "official")
  folder = tmp_path / "back" / "language_model"
  index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
  files = sorted(set(index["weight_map"].values()))
  count = len(files)
  assert count > 1
  assert files == [
    f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin" for i in range(count)
  ]
  joined = {}
  for file in files:
    state = sources.load(folder / file)
    assert all(index["weight_map"][name] == file for name in state)
    joined |= state
  wanted = sources.load(source / sources.LLM)
  sources.assert_same_state(joined, wanted)
  size = sum(t.numel() * t.element_size() for t in wanted.values())
  assert index["metadata"]["total_size"] == size


def test_shards_are_filled_up_to_the_limit():
  spec = lambda name, n: tensor_files.Spec(name, (n,), np.dtype(np.float16))
  specs = [spec("a", 3), spec("b", 2), spec("c", 9), spec("d", 1)]
  files = tensor_files.shards(specs, 10, "model", ".bin")
  assert [[s.name for s in group] for group in files.values()] == [
    ["a", "b"],
    ["c"],
    ["d"],
  ]
  assert next(iter(files)) == "model-00001-of-00003.bin"
  assert list(tensor_files.shards(specs, 99, "model", ".bin")) == ["model.bin"]


@pytest.mark.parametrize("limit", [None, 300_000])
def test_transformers_computes_the_same_logits(
  tmp_path, monkeypatch, limit, small
):
  from lavit_jax.port.writing import hugging_face

  model = pipeline.resolve("tiny") if limit is None else small[1]
  if limit:
    monkeypatch.setattr(hugging_face, "_SHARD", limit)
  exported(model, tmp_path / "hf", "huggingface")
  shards = list((tmp_path / "hf" / "llm").glob("*.safetensors"))
  assert (len(shards) > 1) == (limit is not None)
  theirs, info = transformers.LlamaForCausalLM.from_pretrained(
    tmp_path / "hf" / "llm", output_loading_info=True, dtype=torch.float32
  )
  assert not any(info.values())
  part = checkpoints.load_part(model, "llm")
  config = llama.LlamaConfig(**part.meta["llama"])
  rng = np.random.default_rng(0)
  ids = rng.integers(0, config.vocab_size, (2, 12))
  ours = llama.Llama(config).apply(
    {"params": part.params["llm"]}, jnp.asarray(ids)
  )
  ours = ours[0] if isinstance(ours, tuple) else ours
  with torch.inference_mode():
    wanted = theirs(torch.from_numpy(ids)).logits.numpy()
  assert wanted.shape[-1] == config.vocab_size
  assert load.error(ours[..., : config.vocab_size], wanted) <= 1e-5


def test_the_exported_tokenizer_gives_the_same_ids(tmp_path):
  exported("tiny", tmp_path / "hf", "huggingface")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf" / "llm")
  ours = pipeline.LaVIT.load("tiny").text
  text = "a large red circle at the top left"
  assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(
    text
  )
  assert theirs.bos_token_id == 1
  assert theirs.eos_token_id == 2


def test_visual_files_of_a_model_trained_here_are_complete(tmp_path):
  exported("tiny", tmp_path / "hf", "huggingface")
  found = safe.load_file(tmp_path / "hf" / "visual_tokenizer.safetensors")
  model = pipeline.resolve("tiny")
  flat = lambda part: sources.flatten(
    checkpoints.load_part(model, part, dtype=None).params
  )
  size = lambda tree: sum(int(np.prod(x.shape)) for x in tree.values())
  llm = {k: v for k, v in flat("llm").items() if not k.startswith("llm/")}
  total = size(flat("encoder")) + size(flat("tokenizer")) + size(llm)
  assert sum(tensor.numel() for tensor in found.values()) == total
  tokenizer = flat("tokenizer")
  np.testing.assert_array_equal(
    found["tokenizer.quantize.embedding.weight"], tokenizer["codebook/codes"]
  )
  np.testing.assert_array_equal(
    found["decoder.blocks.1.mlp.fc1.weight"],
    np.asarray(tokenizer["params/decoder/blocks/mlp/fc1/kernel"])[1].T,
  )
  sizes = json.loads((tmp_path / "hf" / "visual_tokenizer.json").read_text())
  meta = checkpoints.read_meta(model, "tokenizer")
  assert sizes["tokenizer"]["tokenizer"] == meta["tokenizer"]
  assert all(
    any(name.startswith(prefix) for prefix in sizes["names"]) for name in found
  )


def test_visual_files_of_an_imported_model_are_the_official_tensors(
  small, tmp_path
):
  source, model = small
  exported(model, tmp_path / "hf", "huggingface")
  found = safe.load_file(tmp_path / "hf" / "visual_tokenizer.safetensors")
  for file in ("lowres", "highres"):
    wanted = sources.load(source / FILES[file])
    prefix = f"{file}."
    part = {
      name.removeprefix(prefix): value
      for name, value in found.items()
      if name.startswith(prefix)
    }
    sources.assert_same_state(part, wanted)


def test_a_model_with_another_text_vocabulary_is_refused(tmp_path):
  with pytest.raises(errors.CheckpointError, match=r"512 text.*huggingface"):
    exported("tiny", tmp_path / "back", "official")
  assert not any(tmp_path.iterdir())


def test_a_model_without_all_official_parts_is_refused(small, tmp_path):
  part = {"only": ["lowres"], "heads": sources.HEADS}
  imported(small[0], tmp_path / "model", **part)
  with pytest.raises(errors.CheckpointError, match="no encoder, tokenizer"):
    exported(tmp_path / "model", tmp_path / "back", "official")


def test_nothing_is_overwritten(small, tmp_path):
  (tmp_path / "back").mkdir()
  (tmp_path / "back" / "thesis.txt").write_text("mine")
  with pytest.raises(errors.UsageError, match="not an empty directory"):
    exported(small[1], tmp_path / "back", "official")


def test_an_interrupted_export_leaves_nothing(small, tmp_path, monkeypatch):
  def full(path, arrays):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tensor_files, "save_torch", full)
  with pytest.raises(errors.CheckpointError, match="could not be written"):
    exported(small[1], tmp_path / "back", "official")
  assert not any(tmp_path.iterdir())


def test_a_damaged_part_is_named(small, tmp_path):
  imported(small[0], tmp_path / "model", heads=sources.HEADS)
  weights = tmp_path / "model" / "lowres" / "weights"
  for path in weights.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.raises(errors.CheckpointError, match="lowres"):
    exported(tmp_path / "model", tmp_path / "back", "official")


def test_a_model_trained_here_fills_the_official_layout(tmp_path):
  """It has no norm and head in the encoder, no vit_proj and no kept files."""
  source = sources.write(tmp_path / "source")
  model = imported(source, tmp_path / "model")
  trained = tmp_path / "trained"
  for name in ("encoder", "tokenizer", "llm"):
    part = checkpoints.load_part(model, name, dtype=None)
    meta = {k: v for k, v in part.meta.items() if k not in ("port", "format")}
    if name == "encoder":
      del part.params["norm"], part.params["head"]
      meta["vit"]["head_dim_out"] = 0
    if name == "tokenizer":
      del part.params["params"]["llm_proj"]
      part.params["feature_mean"] = jnp.zeros((9, 24))
    checkpoints.save_part(trained, name, part.params, meta)
  (trained / "tokenizer.model").write_bytes(sources.WORDS)
  report = exported(trained, tmp_path / "back", "official")
  assert any("tokenizer_decoder.bin" in note for note in report["notes"])
  encoder = sources.load(tmp_path / "back" / FILES["encoder"])
  assert set(encoder) == set(sources.state()[FILES["encoder"]])
  assert (encoder["norm.weight"] == 1).all()
  tokenizer = sources.load(tmp_path / "back" / FILES["tokenizer"])
  wanted = sources.state()
  assert set(tokenizer) == set(wanted[FILES["tokenizer"]])
  np.testing.assert_array_equal(
    tokenizer["vit_proj.weight"], wanted[FILES["overlay"]]["vit_proj.weight"]
  )
  overlay = sources.load(tmp_path / "back" / FILES["overlay"])
  assert set(overlay) == set(wanted[FILES["overlay"]])
  path = tmp_path / "back" / "language_model"
  theirs = transformers.LlamaConfig.from_pretrained(path)
  assert theirs.vocab_size == sources.ROWS
  assert (path / "tokenizer_config.json").is_file()


def test_an_unknown_format_is_refused(small, tmp_path):
  with pytest.raises(errors.UsageError, match="official, huggingface"):
    exported(small[1], tmp_path / "back", "onnx")
