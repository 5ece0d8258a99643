"""int8 weights: near the float ones in what they say, a quarter in size."""

import dataclasses
import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints, mapped_arrays
from lavit_jax.data import sequences
from lavit_jax.data.sources import shapes
from lavit_jax.infer.decoding import beam, decode, prompt_rows
from lavit_jax.infer.loading import parts, quantize, visual
from lavit_jax.models import llama

pytestmark = pytest.mark.slow

TINY = parts.resolve("tiny")
SMALL = llama.LlamaConfig(
  vocab_size=50,
  width=16,
  depth=3,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
  unroll=3,
)


def _flat(params):
  return flax.traverse_util.flatten_dict(params, sep="/")


def _random(config):
  init = jax.jit(llama.Llama(config).init)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return nn.unbox(init(jax.random.key(0), tokens)["params"])


@pytest.fixture(scope="module")
def tiny():
  """(model, params) of the shipped LLM, float32."""
  part = checkpoints.load_part(TINY, "llm")
  config = llama.LlamaConfig(**part.meta["llama"] | {"unroll": 1})
  return llama.Llama(config), part.params["llm"]


@pytest.fixture(scope="module")
def rounded(tiny):
  return quantize.quantize(*tiny)


@pytest.fixture(scope="module")
def small():
  return llama.Llama(SMALL), _random(SMALL)


@pytest.fixture(scope="module")
def texts():
  """48 held-out texts as a batch of ids."""
  text = vocabulary.TextTokenizer.load(TINY / "tokenizer.model")
  source = shapes.ShapesSource("held_out", size=48)
  rows = [sequences.text_ids(text, source.sentences(i)) for i in range(48)]
  return decode.left_pad([[*row, vocabulary.EOS_ID] for row in rows])


@pytest.fixture(scope="module")
def scenes():
  """Prompts of 32 held-out images, read as continuous tokens."""
  see = visual.VisualTokenizer(
    checkpoints.load_part(TINY, "encoder"),
    checkpoints.load_part(TINY, "tokenizer"),
  )
  language = parts.Language(TINY, see)
  source = shapes.ShapesSource("held_out", size=32)
  images = np.stack([source.image(i) for i in range(32)])
  tokens, valid = language.read(images)
  vocab = language.vocabulary
  rows = [
    [vocab.image_begin, row[kept], vocab.image_end]
    for row, kept in zip(tokens, valid, strict=True)
  ]
  return prompt_rows.padded(rows, language.model.config.width)


def _logits(model, params, texts):
  apply = jax.jit(lambda p: model.apply({"params": p}, **texts))
  logits = np.asarray(apply(params))[..., : model.config.vocab_size]
  return logits[texts["mask"]], logits


def _loss(logits, texts):
  logprobs = jax.nn.log_softmax(logits[:, :-1])
  chosen = texts["tokens"][:, 1:, None]
  found = jnp.take_along_axis(logprobs, chosen, axis=-1)[..., 0]
  return -float(found.mean(where=texts["mask"][:, :-1]))


@pytest.mark.parametrize(
  ("dtype", "limit"), [("float32", 0.04), ("bfloat16", 0.04)]
)
def test_logits_stay_near_those_of_float_weights(
  tiny, rounded, texts, dtype, limit
):
  """Measured: 0.020 (bfloat16 0.021), 98 % of the likeliest ids the same."""
  before, whole_before = _logits(*tiny, texts)
  model = llama.Llama(dataclasses.replace(rounded[0].config, dtype=dtype))
  after, whole_after = _logits(model, rounded[1], texts)
  assert np.abs(after - before).max() <= limit * np.abs(before).max()
  assert (after.argmax(-1) == before.argmax(-1)).mean() >= 0.95
  assert abs(_loss(whole_after, texts) - _loss(whole_before, texts)) <= 0.01
  assert (after != before).any()  # it is another model


def test_captions_of_scenes_are_nearly_all_the_same(tiny, rounded, scenes):
  """Measured: all 32."""
  how = dict(prompt=scenes, max_new_tokens=40, eos_id=vocabulary.EOS_ID)
  before, after = (
    np.asarray(decode.generate(*pair, **how).tokens) for pair in (tiny, rounded)
  )
  assert len(np.unique(before, axis=0)) >= 30  # 32 images, other words each
  assert (before == after).all(1).mean() >= 0.9


def test_beams_of_scenes_are_nearly_all_the_same(tiny, rounded, scenes):
  first = {name: x[:8] for name, x in scenes.items()}
  how = dict(prompt=first, num_beams=2, max_new_tokens=16)
  before, after = (
    beam.beam_search(*pair, **how, eos_id=vocabulary.EOS_ID)
    for pair in (tiny, rounded)
  )
  same = (np.asarray(before.tokens) == after.tokens).all(-1)
  assert same.mean() >= 0.75
  np.testing.assert_allclose(before.scores, after.scores, atol=0.01)


def test_every_weight_is_within_half_a_step_of_its_own_channel(tiny):
  """A layer, an output channel or a row that took another's scale fails."""
  _, rounded = quantize.quantize(*tiny)
  found, floats = _flat(rounded), _flat(tiny[1])
  assert {x.ndim for x in floats.values()} == {1, 2, 3}
  for path, array in floats.items():
    if "norm" in path:
      np.testing.assert_array_equal(found[path], array)
      continue
    ints = np.asarray(found[path], np.float32)
    name = path.removesuffix("kernel") + "scale"
    scale = found[name if path.endswith("kernel") else f"{path}_scale"]
    step = np.expand_dims(scale, 1)
    assert (np.abs(ints).max(1) == 127).all()
    assert (np.abs(ints * step - array) <= 0.501 * step).all()


def test_a_channel_of_zeros_stays_zero():
  params = jax.tree.map(np.array, _random(SMALL))
  params["layers"]["mlp"]["up"]["kernel"][1, :, 3] = 0
  _, rounded = quantize.quantize(llama.Llama(SMALL), params)
  up = rounded["layers"]["mlp"]["up"]
  assert (up["kernel"][1, :, 3] == 0).all()
  assert np.isfinite(up["scale"]).all()


def test_weights_take_a_quarter_of_float32(tiny, rounded):
  kinds = {
    path.rsplit("/")[-1]: array.dtype
    for path, array in _flat(rounded[1]).items()
  }
  assert kinds.pop("kernel") == kinds.pop("embedding") == jnp.int8
  assert kinds.pop("head") == jnp.int8
  assert set(kinds) == {"scale", "embedding_scale", "head_scale"}
  assert set(kinds.values()) == {jnp.dtype("float32")}
  before, after = (
    sum(x.nbytes for x in jax.tree.leaves(pair[1])) for pair in (tiny, rounded)
  )
  assert 0.25 < after / before < 0.26


def _assert_equal(left, right):
  left, right = _flat(left), _flat(right)
  assert {k: x.dtype for k, x in left.items()} == {
    k: x.dtype for k, x in right.items()
  }
  for path, array in left.items():
    np.testing.assert_array_equal(array, right[path])


def test_a_part_is_read_as_its_weights_would_be_quantized(rounded):
  part = quantize.load_part(TINY)
  _assert_equal(part.params["llm"], rounded[1])
  assert llama.Llama(llama.LlamaConfig(**part.meta["llama"])) == rounded[0]


def test_what_stays_float_has_the_dtype_asked_for(rounded):
  part = quantize.load_part(TINY, dtype="bfloat16")
  assert set(part.params) == {"llm", "merger", "projection"}
  ints = {path for path, x in _flat(rounded[1]).items() if x.dtype == jnp.int8}
  for path, array in _flat(part.params).items():
    place = path.removeprefix("llm/")
    if place in ints:
      assert array.dtype == jnp.int8
    elif (
      place.endswith("_scale")
      or "kernel".join(place.rsplit("scale", 1)) in ints
    ):
      assert array.dtype == jnp.float32
    else:
      assert array.dtype == jnp.bfloat16, path


def _save_mapped(folder, params, config):
  """A part as an import writes it: mapped arrays, in pieces of 1 kB."""
  arrays = {}
  for path, array in _flat({"llm": params}).items():
    name = folder / path.replace("/", ".")
    mapped = np.memmap(name, array.dtype, "w+", shape=array.shape)
    mapped[:] = array
    arrays[path] = mapped
  tree = flax.traverse_util.unflatten_dict(arrays, sep="/")
  meta = {"llama": dataclasses.asdict(config)}
  checkpoints.save_part(folder / "model", "llm", tree, meta)
  return folder / "model"


@pytest.fixture
def pieces(small, tmp_path, monkeypatch):
  monkeypatch.setattr(mapped_arrays, "CHUNK_BYTES", 1024)
  return _save_mapped(tmp_path, small[1], SMALL)


def test_an_imported_part_is_read_piece_by_piece(small, pieces):
  stored = checkpoints.StoredPart(pieces, "llm")
  several = 0
  for path, array in stored.arrays.items():
    whole = min(1, len(array.shape) - 1)
    seen = np.zeros(array.shape, int)
    for index, piece in stored.blocks(path, whole):
      assert piece.shape[whole] == array.shape[whole]
      np.testing.assert_array_equal(stored.read(path)[index], piece)
      seen[index] += 1
      several += piece.size < array.size
    assert (seen == 1).all()
  assert several > 10
  part = quantize.load_part(pieces)
  model, params = quantize.quantize(*small)
  _assert_equal(part.params["llm"], params)
  assert llama.LlamaConfig(**part.meta["llama"]) == model.config
  assert model.config == dataclasses.replace(SMALL, unroll=1)


def test_what_is_loaded_has_the_shapes_that_are_told(pieces):
  for directory in (TINY, pieces):
    arrays = checkpoints.StoredPart(directory, "llm").arrays
    told = quantize.loaded_shapes(arrays, "bfloat16")
    found = _flat(quantize.load_part(directory, dtype="bfloat16").params)
    assert {k: (x.shape, x.dtype) for k, x in told.items()} == {
      k: (x.shape, x.dtype) for k, x in found.items()
    }


@pytest.mark.parametrize("prepare", [lambda *x: x, llama.for_decoding])
def test_layers_are_cast_back_one_at_a_time(prepare, monkeypatch):
  """What a step needs beside weights and cache does not grow with depth."""
  monkeypatch.setattr(llama, "_LARGE", 0)  # as for weights that are large

  def working(depth):
    config = dataclasses.replace(
      SMALL, depth=depth, width=64, mlp_dim=256, unroll=depth
    )
    rounded = quantize.quantize(llama.Llama(config), _random(config))
    model, params = prepare(*rounded)

    def step(_, carry):
      ids, cache = carry
      logits, cache = decode.advance(model, params, ids, cache)
      return logits.argmax(-1).astype(jnp.int32), cache

    def steps(params, cache, count):
      start = jnp.zeros(1, jnp.int32), cache
      return jax.lax.fori_loop(0, count, step, start)

    arguments = params, llama.init_cache(config, 1, 8), 3
    compiled = jax.jit(steps, donate_argnums=1).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  layer = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256)
  assert working(2) > layer  # cast back, not multiplied as it is
  assert working(6) - working(2) < layer / 2


@pytest.mark.parametrize("mode", ["int4", "INT8", "", 8, None])
def test_an_unknown_mode_is_refused(small, mode):
  with pytest.raises(errors.UsageError, match=r"expected 'int8', or None"):
    quantize.quantize(*small, mode=mode)
  with pytest.raises(errors.UsageError, match="quantize="):
    quantize.load_part(TINY, mode=mode)


@pytest.mark.parametrize("dtype", ["int8", "float", "bf16", 3])
def test_a_dtype_that_is_no_float_is_refused(dtype):
  with pytest.raises(errors.UsageError, match="dtype="):
    quantize.load_part(TINY, dtype=dtype)


def test_parameters_that_do_not_fit_are_refused(small):
  model, params = small
  with pytest.raises(errors.UsageError, match=r'params\["llm"\]'):
    quantize.quantize(model, {"llm": params, "merger": {}})
  again = quantize.quantize(model, params)
  with pytest.raises(errors.UsageError, match="quantized already"):
    quantize.quantize(*again)


def test_weights_that_are_not_finite_are_refused(small):
  for bad in (np.nan, np.inf):
    params = jax.tree.map(np.array, small[1])
    params["layers"]["mlp"]["down"]["kernel"][2, 1, 1] = bad
    with pytest.raises(errors.CheckpointError, match="llm/layers/mlp/down"):
      quantize.quantize(small[0], params)


def test_a_damaged_part_is_refused(pieces):
  stored = checkpoints.StoredPart(pieces, "llm")
  for path in (pieces / "llm/weights").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(errors.CheckpointError, match="damaged"):
    list(stored.blocks("llm/head", 1))
  with pytest.raises(errors.CheckpointError, match="damaged"):
    quantize.load_part(pieces)
  shutil.rmtree(pieces / "llm")
  with pytest.raises(errors.CheckpointError, match="no part 'llm'"):
    quantize.load_part(pieces)
