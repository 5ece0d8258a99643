import dataclasses

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="reads PyTorch files")
pytest.importorskip("safetensors", reason="reads safetensors files")

from safetensors import torch as safe

from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints, fingerprints
from lavit_jax.models import llama
from lavit_jax.port import importing
from lavit_jax.port.tables import names
from lavit_jax.train import loop
from tests import micro
from tests.port import pixel_sources, sources

TEXT = 512  # pieces of sources.WORDS
LLAMA = dataclasses.replace(sources.LLAMA, vocab_size=TEXT)
ENCODER = sources.FILES["encoder"]


def imported(source, target, **kwargs):
  return importing.run(source, target, quiet=True, **kwargs)


def stored(model, part):
  return checkpoints.load_part(model, part, dtype=None)


# A plain LLaMA --------------------------------------------------------------


def test_a_llama_becomes_the_part_llm_alone(tmp_path):
  source = sources.write_llama(tmp_path / "llama", LLAMA)
  imported(source, tmp_path / "model", codes=40)
  part = stored(tmp_path / "model", "llm")
  assert set(part.params) == {"llm"}
  assert part.meta["vocabulary"] == {"text_size": TEXT, "num_codes": 40}
  config = llama.LlamaConfig(**part.meta["llama"])
  assert config == dataclasses.replace(LLAMA, vocab_size=TEXT + 42)
  wanted = sources.flatten(
    names.to_flax(names.LLM, sources.random_llama(LLAMA))
  )
  found = sources.flatten(part.params["llm"])
  assert set(found) == set(wanted)
  for path, value in wanted.items():
    ours = np.asarray(found[path])
    if path in ("embedding", "head"):
      assert ours.shape == (config.padded_vocab, 8)
      ours, value = ours[:TEXT], value[:TEXT]
    np.testing.assert_array_equal(ours, value, err_msg=path)
  path = tmp_path / "model" / "tokenizer.model"
  assert path.read_bytes() == sources.WORDS
  made_of = {"text_tokenizer": fingerprints.of_file(path)}
  assert part.meta["made_of"] == made_of


def test_new_rows_are_random_with_the_scale_of_the_old(tmp_path):
  tensors = sources.random_llama(LLAMA)
  tensors["lm_head.weight"] *= 5
  source = sources.write_llama(tmp_path / "llama", LLAMA, tensors)
  rows = {}
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    imported(source, tmp_path / name, codes=1000, seed=seed)
    rows[name] = stored(tmp_path / name, "llm").params["llm"]
  end = TEXT + 1002
  for path, old in (
    ("embedding", "model.embed_tokens.weight"),
    ("head", "lm_head.weight"),
  ):
    new = np.asarray(rows["a"][path][TEXT:end])
    assert new.std() == pytest.approx(tensors[old].std(), rel=0.05)
    assert abs(new.mean()) < 0.05 * new.std()
    assert len(np.unique(new, axis=0)) == len(new)
    assert not np.asarray(rows["a"][path][end:]).any()
    np.testing.assert_array_equal(rows["a"][path], rows["b"][path])
    assert not np.array_equal(rows["a"][path], rows["c"][path])
  unlike = np.asarray(rows["a"]["embedding"][TEXT:end]) * 5
  assert not np.allclose(unlike, rows["a"]["head"][TEXT:end])


def test_rows_beyond_the_text_pieces_are_ignored(tmp_path):
  config = dataclasses.replace(LLAMA, vocab_size=TEXT + 9)
  tensors = sources.random_llama(config)
  for name in ("lm_head.weight", "model.embed_tokens.weight"):
    tensors[name][TEXT:] = 77.0
  source = sources.write_llama(tmp_path / "llama", config, tensors)
  report = imported(source, tmp_path / "model", codes=3)
  assert any("9 rows" in note for note in report["notes"])
  head = np.asarray(stored(tmp_path / "model", "llm").params["llm"]["head"])
  assert head.max() < 70


def test_a_head_tied_to_the_embedding_starts_equal_to_it(tmp_path):
  tensors = sources.random_llama(LLAMA)
  del tensors["lm_head.weight"]
  source = sources.write_llama(
    tmp_path / "llama", LLAMA, tensors, tie_word_embeddings=True
  )
  imported(source, tmp_path / "model", codes=3)
  params = stored(tmp_path / "model", "llm").params["llm"]
  np.testing.assert_array_equal(
    params["head"][:TEXT], params["embedding"][:TEXT]
  )


def test_fewer_rows_than_text_pieces_are_refused(tmp_path):
  config = dataclasses.replace(LLAMA, vocab_size=TEXT - 1)
  source = sources.write_llama(tmp_path / "llama", config)
  with pytest.raises(errors.CheckpointError, match="511 rows"):
    imported(source, tmp_path / "model")


def test_an_incomplete_llama_folder_is_refused(tmp_path):
  source = sources.write_llama(tmp_path / "llama", LLAMA)
  with pytest.raises(errors.UsageError, match="nothing but the part llm"):
    imported(source, tmp_path / "model", only=["encoder"])
  (source / "tokenizer.model").unlink()
  with pytest.raises(errors.CheckpointError, match="SentencePiece"):
    imported(source, tmp_path / "model")
  (source / "config.json").write_text("{}")
  with pytest.raises(errors.CheckpointError, match="hidden_size"):
    imported(source, tmp_path / "model")
  (source / "config.json").write_text("{")
  with pytest.raises(errors.CheckpointError, match="not valid JSON"):
    imported(source, tmp_path / "model")
  assert not (tmp_path / "model").exists()


def test_missing_and_unused_tensors_of_a_llama_are_listed(tmp_path):
  tensors = sources.random_llama(LLAMA)
  tensors["model.norm.bias"] = tensors.pop("model.norm.weight")
  source = sources.write_llama(tmp_path / "llama", LLAMA, tensors)
  with pytest.raises(errors.CheckpointError) as caught:
    imported(source, tmp_path / "model")
  assert "missing: llama: model.norm.weight" in str(caught.value)
  assert "not used: llama: model.norm.bias" in str(caught.value)


def test_codes_are_for_a_plain_llama_only(tmp_path):
  source = sources.write(tmp_path / "source")
  with pytest.raises(errors.UsageError, match="--codes"):
    imported(source, tmp_path / "model", codes=8)


def test_pretraining_starts_from_an_imported_llama(micro_runs, tmp_path):
  """With a learning rate of 0, it ends with the LLM from which it started."""
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  words = root / "model" / "tokenizer.model"
  text = vocabulary.TextTokenizer.load(words).size
  cfg = micro.config("pretrain", root)
  codes = checkpoints.read_meta(root / "model", "tokenizer")["tokenizer"][
    "quantizer"
  ]["num_codes"]
  fields = cfg.model.llm.to_dict() | {"unroll": 1, "vocab_size": text}
  config = llama.LlamaConfig(**fields)
  source = sources.write_llama(tmp_path / "llama", config)
  (source / "tokenizer.model").write_bytes(words.read_bytes())
  imported(source, tmp_path / "start", codes=codes)
  cfg = micro.config(
    "pretrain",
    root,
    phases__train__lr=0.0,
    start_from=str(tmp_path / "start"),
  )
  loop.train(cfg, root / "run", quiet=True)
  started = checkpoints.load_part(tmp_path / "start", "llm").params["llm"]
  ended = checkpoints.load_part(root / "model", "llm").params["llm"]
  jax.tree.map(np.testing.assert_array_equal, ended, started)


# An EVA-CLIP encoder ----------------------------------------------------------


def encoder_file(tmp_path, form):
  """Writes the encoder in one of its published forms."""
  tensors = {
    name: torch.from_numpy(value)
    for name, value in sources.state()[ENCODER].items()
  }
  path = tmp_path / "eva.pt"
  if form == "bare":
    tensors = {
      name: value
      for name, value in tensors.items()
      if not name.startswith(("norm.", "head."))
    }
  if form == "norm only":
    tensors = {n: t for n, t in tensors.items() if not n.startswith("head.")}
  if form == "clip":
    tensors = {f"visual.{name}": value for name, value in tensors.items()}
    tensors |= {"logit_scale": torch.ones(()), "text.x": torch.ones(3)}
  if form in ("model", "module"):
    tensors = {form: tensors, "epoch": 3, "lr": [0.1]}
  if form == "safetensors":
    path = tmp_path / "eva.safetensors"
    safe.save_file(tensors, path)
  elif form == "old":
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
  else:
    torch.save(tensors, path)
  return path


@pytest.mark.parametrize(
  "form",
  [
    "plain",
    "bare",
    "norm only",
    "clip",
    "model",
    "module",
    "safetensors",
    "old",
  ],
)
def test_an_encoder_is_read_in_every_published_form(tmp_path, form):
  path = encoder_file(tmp_path, form)
  imported(path, tmp_path / "model", heads=sources.HEADS)
  part = stored(tmp_path / "model", "encoder")
  headless = form in ("bare", "norm only")
  wanted = names.to_flax(names.ENCODER, sources.state()[ENCODER])
  config = dataclasses.asdict(sources.VIT)
  if headless:
    del wanted["norm"], wanted["head"]
    config["head_dim_out"] = 0
  assert part.meta["vit"] == config
  wanted, found = sources.flatten(wanted), sources.flatten(part.params)
  assert set(found) == set(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_an_encoder_that_does_not_fit_is_refused(tmp_path):
  path = encoder_file(tmp_path, "plain")
  tensors = sources.load(path)
  with pytest.raises(errors.UsageError, match="do not divide the width 24"):
    imported(path, tmp_path / "model")  # 16 heads
  torch.save(tensors | {"visual.cls_token": tensors["cls_token"]}, path)
  with pytest.raises(
    errors.CheckpointError, match=r"with and without.*cls_tok"
  ):
    imported(path, tmp_path / "model", heads=3)
  tensors["attn.bias"] = tensors.pop("pos_embed")
  torch.save(tensors, path)
  with pytest.raises(errors.CheckpointError) as caught:
    imported(path, tmp_path / "model", heads=3)
  assert "not used: eva.pt: attn.bias" in str(caught.value)
  assert "pos_embed" in str(caught.value)
  tensors["pos_embed"] = torch.zeros(1, 8, 24)
  torch.save(tensors, path)
  with pytest.raises(errors.CheckpointError, match="square"):
    imported(path, tmp_path / "model", heads=3)
  assert not (tmp_path / "model").exists()


# Stable Diffusion -----------------------------------------------------------


@pytest.mark.parametrize("part", pixel_sources.FOLDERS)
def test_stable_diffusion_becomes_the_part_of_its_unet(tmp_path, part):
  source = pixel_sources.write(tmp_path / "sd", part)
  (source / "model_index.json").write_text("{}")
  (source / "text_encoder").mkdir()
  report = imported(source, tmp_path / "model")
  assert report["source"] == "diffusers"
  assert list(report["parts"]) == [part]
  found = stored(tmp_path / "model", part)
  assert set(found.params) == {"unet", "vae"}  # no unconditional embeddings
  assert found.meta["port"]["source"] == "diffusers"
  official = pixel_sources.write_official(tmp_path / "official", part)
  imported(official, tmp_path / "same", only=[part])
  same = stored(tmp_path / "same", part)
  same.params.pop("uncond", None)
  jax.tree.map(np.testing.assert_array_equal, found.params, same.params)
  kept = tmp_path / "model" / "official" / pixel_sources.FOLDERS[part]
  assert sorted(path.name for path in kept.iterdir()) == [
    "scheduler",
    "unet",
    "vae",
  ]


def test_stable_diffusion_gives_one_part_and_says_what_is_missing(tmp_path):
  source = pixel_sources.write(tmp_path / "sd", "lowres_pixels")
  with pytest.raises(
    errors.UsageError, match="nothing but the part lowres_pixels"
  ):
    imported(source, tmp_path / "model", only=["highres_pixels"])
  (source / "scheduler" / "scheduler_config.json").unlink()
  (source / "vae" / "config.json").unlink()
  with pytest.raises(errors.CheckpointError) as caught:
    imported(source, tmp_path / "model", only=["lowres_pixels"])
  for file in ("sd/scheduler/scheduler_config.json", "sd/vae/config.json"):
    assert file in str(caught.value)
  assert not (tmp_path / "model").exists()
