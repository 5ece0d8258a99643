"""What `memory.needs` says is what loading really takes."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.infer import memory
from lavit_jax.infer.loading import parts, quantize
from lavit_jax.infer.pixels import decoders
from lavit_jax.infer.presets import rules
from lavit_jax.models import llama
from tests.train import latent_micro

pytestmark = pytest.mark.optimized

TINY = parts.resolve("tiny")


def _held(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.fixture
def copy(tmp_path):
  """A copy of tiny to take parts from."""
  directory = tmp_path / "model"
  shutil.copytree(TINY, directory)
  for path in (directory, *directory.rglob("*")):
    path.chmod(0o755)
  return directory


@pytest.mark.parametrize(
  ("dtype", "mode"),
  [("float32", None), ("bfloat16", None), ("float32", "int8")],
)
def test_stated_weights_are_the_bytes_that_are_loaded(dtype, mode):
  loaded = {
    "encoder": checkpoints.load_part(TINY, "encoder", dtype=dtype),
    "tokenizer": checkpoints.load_part(TINY, "tokenizer"),
    "pixels": checkpoints.load_part(TINY, "pixels"),
    "llm": checkpoints.load_part(TINY, "llm", dtype=dtype)
    if mode is None
    else quantize.load_part(TINY, mode=mode, dtype=dtype),
  }
  held = {name: _held(part.params) for name, part in loaded.items()}
  for need in memory.needs(TINY, dtype=dtype, quantize=mode).values():
    assert need["weights"] == {name: held[name] for name in need["parts"]}
    assert need["weights_bytes"] == sum(held[name] for name in need["parts"])


def test_tasks_need_what_the_paper_runs_for_them():
  needed = memory.needs(TINY)
  assert list(needed) == [
    "tokenize",
    "reconstruct",
    "caption",
    "answer",
    "write_codes",
    "generate",
    "synthesize",
  ]
  assert all(need["possible"] and not need["note"] for need in needed.values())
  assert needed["tokenize"]["parts"] == ["encoder", "tokenizer"]
  assert needed["caption"]["parts"] == ["encoder", "tokenizer", "llm"]
  assert "pixels" in needed["generate"]["parts"]
  for need in needed.values():
    both = need["weights_bytes"] + need["cache_bytes"]
    assert need["total_bytes"] == both
  assert needed["tokenize"]["cache_bytes"] == 0
  json.dumps(needed)


def test_the_cache_is_that_of_prompt_words_beams_and_streams():
  """36 patches and 2 marks are 38 places, padded to 48; a word or code one."""
  meta = checkpoints.read_meta(TINY, "llm")
  config = llama.LlamaConfig(**meta["llama"])

  def cache(rows, slots, dtype="float32"):
    return _held(llama.init_cache(config, rows, slots, jnp.dtype(dtype)))

  needed = memory.needs(TINY)
  assert needed["caption"]["cache_bytes"] == cache(1, 48 + 64)
  assert needed["answer"]["cache_bytes"] == cache(1, 80 + 12)  # 38 + 32 words
  # Two streams; 32 words and [IMG]; as many codes as patches, and [/IMG].
  assert needed["generate"]["cache_bytes"] == cache(2, 48 + 37)
  assert needed["synthesize"]["cache_bytes"] == cache(2, 80 + 37)

  half = memory.needs(TINY, dtype="bfloat16", batch=4)
  assert half["caption"]["cache_bytes"] == cache(4, 48 + 64, "bfloat16")
  both = memory.needs(TINY, images=2, text_tokens=5)
  assert both["synthesize"]["cache_bytes"] == cache(2, 96 + 37)  # 76 + 5 + 1
  official = memory.needs(TINY, rules=rules.OFFICIAL)
  assert official["caption"]["cache_bytes"] == cache(2, 48 + 36)
  assert official["answer"]["cache_bytes"] == cache(5, 80 + 10)
  unguided = dataclasses.replace(
    rules.OURS, draw=rules.ImageGenerationConfig(max_new_tokens=20)
  )
  found = memory.needs(TINY, rules=unguided)
  assert found["generate"]["cache_bytes"] == cache(1, 48 + 20)


def test_no_weight_is_read(monkeypatch):
  def fail(*args, **kwargs):
    raise AssertionError("weights are read")

  for name in ("read", "blocks"):
    monkeypatch.setattr(checkpoints.StoredPart, name, fail)
  monkeypatch.setattr(checkpoints, "load_part", fail)
  assert memory.needs(TINY, quantize="int8")["caption"]["weights_bytes"] > 0


def test_what_is_missing_is_named_and_the_rest_counted(copy):
  shutil.rmtree(copy / "pixels")
  needed = memory.needs(copy)
  for task in ("reconstruct", "generate", "synthesize"):
    assert not needed[task]["possible"]
    assert needed[task]["missing"] == ["pixels"]
    assert "has no pixels" in needed[task]["note"]
  assert needed["caption"] == memory.needs(TINY)["caption"]
  assert "llm" in needed["generate"]["weights"]

  (copy / "tokenizer.model").unlink()
  assert memory.needs(copy)["answer"]["missing"] == ["tokenizer.model"]
  shutil.rmtree(copy / "tokenizer")
  needed = memory.needs(copy)
  assert needed["tokenize"]["missing"] == ["tokenizer"]
  assert needed["caption"]["cache_bytes"] == 0  # its length is not known


def test_the_pixel_decoder_there_is_counted_with_its_own_dtypes(copy, tmp_path):
  latent_micro.save_model(tmp_path / "micro", kinds=("highres",))
  for part in ("highres", "highres_pixels"):
    shutil.copytree(tmp_path / "micro" / part, copy / part)
  needed = memory.needs(copy, dtype="bfloat16")["generate"]
  assert needed["possible"]
  assert needed["parts"][-2:] == ["highres", "highres_pixels"]
  loaded = decoders.load(copy, "highres", "bfloat16").params
  assert loaded["unet"]["conv_in"]["kernel"].dtype == jnp.bfloat16
  assert loaded["vae"]["quant_conv"]["kernel"].dtype == jnp.float32
  assert _held(loaded["semantic"]) == needed["weights"]["highres"]
  del loaded["semantic"]
  assert _held(loaded) == needed["weights"]["highres_pixels"]
  small = memory.needs(copy, decoder="pixels")["generate"]
  assert small["parts"][-1] == "pixels"
  shutil.rmtree(copy / "highres_pixels")
  shutil.rmtree(copy / "pixels")
  needed = memory.needs(copy)
  assert needed["generate"]["note"] == "the model has no highres_pixels"
  assert needed["write_codes"]["possible"]
  lines = memory.lines(needed)
  assert [line for line in lines if line.startswith("generate: not possible")]


def test_a_language_model_that_cannot_read_images_says_so(copy):
  part = checkpoints.load_part(copy, "llm")
  meta = {name: part.meta[name] for name in ("llama", "vocabulary")}
  checkpoints.save_part(copy, "llm", {"llm": part.params["llm"]}, meta)
  needed = memory.needs(copy)
  assert needed["caption"]["missing"] == ["llm/merger", "llm/projection"]
  assert needed["generate"]["possible"]


def test_lines_tell_weights_and_cache():
  need = {
    "missing": [],
    "note": "",
    "weights_bytes": 14_230_000_000,
    "cache_bytes": 400_000_000,
  }
  lines = memory.lines(
    {
      "caption": need,
      "tokenize": need | {"weights_bytes": 4_640_000, "cache_bytes": 0},
      "draw": need | {"missing": ["pixels"], "note": "the model has no pixels"},
    }
  )
  assert lines == [
    "caption: 14.2 GB of weights + 0.4 GB cache",
    "tokenize: 4.6 MB of weights",
    "draw: not possible, the model has no pixels",
  ]


def test_bad_options_are_named():
  with pytest.raises(errors.UsageError, match="dtype='int8'"):
    memory.needs(TINY, dtype="int8")
  with pytest.raises(errors.UsageError, match="quantize='int4'"):
    memory.needs(TINY, quantize="int4")
