import os
import pathlib
import pickle
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors, vocabulary
from lavit_jax.infer.decoding import decode, scoring
from lavit_jax.models import llama
from lavit_jax.port.tables import names

_WARPED = pathlib.Path(__file__).parents[2] / "golden/llm_small.npz"
_NO_EOS = 49  # an id these tests never let the model write
CONFIG = llama.LlamaConfig(
  vocab_size=50,
  width=16,
  depth=2,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
)
MODEL = llama.Llama(CONFIG)
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
NEW = 6


@pytest.fixture(scope="module")
def params():
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(MODEL.init)(jax.random.key(0), tokens)["params"]
  params = nn.unbox(params)
  # Without training all continuations look alike: spread the logits.
  return params | {"head": params["head"] * 40}


def _generate(params, rows=PROMPTS, model=MODEL, **kwargs):
  prompt = kwargs.pop("prompt", None) or decode.left_pad(rows, length=5)
  kwargs = {"max_new_tokens": NEW, "eos_id": _NO_EOS} | kwargs
  suppress = np.zeros(50, bool)
  suppress[_NO_EOS] = kwargs["eos_id"] == _NO_EOS
  kwargs.setdefault("suppress", suppress)
  return decode.generate(model, params, prompt=prompt, **kwargs)


_forward = jax.jit(lambda p, t: MODEL.apply({"params": p}, t))


def _logprobs(params, ids):
  """Plain log-probabilities float[V] after one sequence, without a cache."""
  padded = jnp.asarray([list(ids) + [0] * (16 - len(ids))])
  return jax.nn.log_softmax(_forward(params, padded)[0, len(ids) - 1, :50])


def _greedy(params, row, guidance=1.0, uncond=(), steps=NEW):
  """Greedy decoding by whole forward passes: (ids, sum of log-probs)."""
  ids, total = [], 0.0
  for _ in range(steps):
    plain = scores = _logprobs(params, [*row, *ids])
    if guidance != 1:
      other = _logprobs(params, [*uncond, *ids])
      scores = guidance * (plain - other) + other
    ids.append(int(scores.at[_NO_EOS].set(-jnp.inf).argmax()))
    total += float(plain[ids[-1]])
  return ids, total


def test_left_pad_puts_prompts_at_the_end():
  batch = decode.left_pad([[5, 6, 7], [8]], multiple=4, pad_id=1)
  np.testing.assert_array_equal(batch["tokens"], [[1, 5, 6, 7], [1, 1, 1, 8]])
  np.testing.assert_array_equal(batch["mask"], [[0, 1, 1, 1], [0, 0, 0, 1]])
  with pytest.raises(errors.UsageError, match="1 to 2"):
    decode.left_pad([[5, 6, 7]], length=2)
  with pytest.raises(errors.UsageError, match="0 to 1"):
    decode.left_pad([[5], []])


def test_cached_greedy_decoding_equals_whole_forward_passes(params):
  out = _generate(params)
  for i, row in enumerate(PROMPTS):
    ids, total = _greedy(params, row)
    assert list(out.tokens[i]) == ids
    np.testing.assert_allclose(out.sum_logprobs[i], total, rtol=1e-3)
  assert len({tuple(np.asarray(row)) for row in out.tokens}) == 3
  np.testing.assert_array_equal(out.lengths, [NEW] * 3)
  assert not out.done.any()


def test_guidance_equals_two_streams_by_hand(params):
  uncond = decode.left_pad([[20]])
  out = _generate(params, guidance_scale=3.0, uncond=uncond)
  for i, row in enumerate(PROMPTS):
    ids, total = _greedy(params, row, guidance=3.0, uncond=[20])
    assert list(out.tokens[i]) == ids
    np.testing.assert_allclose(out.sum_logprobs[i], total, rtol=1e-3)
  assert not np.array_equal(out.tokens, _generate(params).tokens)


def test_guidance_of_one_is_no_guidance(params):
  uncond = decode.left_pad([[20]])
  # One row is guided, so the guided program runs; the others are at 1.
  scales = jnp.array([3.0, 1.0, 1.0])
  out = _generate(params, guidance_scale=scales, uncond=uncond)
  np.testing.assert_array_equal(out.tokens[1:], _generate(params).tokens[1:])
  assert list(out.tokens[0]) == _greedy(params, PROMPTS[0], 3.0, [20])[0]


def test_a_batch_of_prompts_equals_each_alone(params):
  keys = jax.random.split(jax.random.key(4), 3)
  whole = _generate(params, rng=keys, temperature=0.8, top_k=20)
  for i, row in enumerate(PROMPTS):
    alone = _generate(
      params, [row], rng=keys[i : i + 1], temperature=0.8, top_k=20
    )
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[i])


def test_a_row_ends_at_its_eos_and_is_padded(params):
  ids, _ = _greedy(params, PROMPTS[0])
  eos = ids[2]
  stop = ids.index(eos)
  out = _generate(params, eos_id=eos, pad_id=1)
  assert list(out.tokens[0]) == ids[: stop + 1] + [1] * (NEW - stop - 1)
  assert out.lengths[0] == stop + 1
  assert out.done[0]
  _, total = _greedy(params, PROMPTS[0], steps=stop + 1)
  np.testing.assert_allclose(out.sum_logprobs[0], total, rtol=1e-3)


def test_no_eos_before_min_new_tokens(params):
  eos = _greedy(params, PROMPTS[0])[0][2]
  out = _generate(params, eos_id=eos, min_new_tokens=5)
  assert eos not in list(out.tokens[0, :5])
  assert out.lengths[0] >= 5
  early = _generate(params, eos_id=eos)
  assert early.lengths[0] <= 3


def test_suppressed_ids_are_never_written(params):
  suppress = np.ones(50, bool)
  suppress[[30, 31, 32]] = False
  for rng in (None, jax.random.key(0)):
    out = _generate(params, suppress=suppress, rng=rng)
    assert set(np.unique(out.tokens)) <= {30, 31, 32}
  free = _generate(params)
  assert not set(np.unique(free.tokens)) <= {30, 31, 32}


def test_sampling_follows_the_seed_and_temperature_zero_is_greedy(params):
  draw = lambda seed, **kwargs: np.asarray(
    _generate(params, rng=jax.random.key(seed), temperature=3.0, **kwargs)[0]
  )
  np.testing.assert_array_equal(draw(0), draw(0))
  assert not np.array_equal(draw(0), draw(1))
  cold = _generate(params, rng=jax.random.key(0), temperature=0.0)
  np.testing.assert_array_equal(cold.tokens, _generate(params).tokens)


def test_continuous_prompts_equal_their_ids(params):
  prompt = decode.left_pad(PROMPTS, length=5)
  use = prompt["mask"] & (prompt["tokens"] % 2 == 0)
  mixed = {
    "tokens": np.where(use, 3, prompt["tokens"]),
    "mask": prompt["mask"],
    "embeds": params["embedding"][prompt["tokens"]],
    "use_embeds": use,
  }
  uncond = decode.left_pad([[20]])
  kwargs = {"guidance_scale": 3.0, "uncond": uncond}
  np.testing.assert_array_equal(
    _generate(params, prompt=mixed, **kwargs).tokens,
    _generate(params, **kwargs).tokens,
  )


def _scatter(scores, ids, vocab):
  out = np.full((len(ids), vocab), -np.inf, np.float32)
  np.put_along_axis(out, np.asarray(ids), np.asarray(scores), axis=1)
  return out


@pytest.mark.parametrize(
  ("name", "temperature", "top_k", "top_p"),
  [
    ("topk50", 1.0, 50, None),
    ("topp09", 1.0, 0, 0.9),
    ("t07_k50_p09", 0.7, 50, 0.9),
  ],
)
def test_filters_are_the_official_ones(name, temperature, top_k, top_p):
  with np.load(_WARPED) as file:
    logits, expected = file["in_warp_logits"], file[f"out_warp_{name}"]
  ours = scoring.candidates(jnp.asarray(logits) / temperature, top_k, top_p)
  ours = _scatter(*ours, logits.shape[1])
  np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))
  kept = np.isfinite(expected)
  np.testing.assert_allclose(ours[kept], expected[kept], rtol=1e-6)


def test_the_likeliest_id_survives_any_top_p():
  scores = jnp.array([[0.0, 9.0, 1.0]])
  kept, ids = scoring.candidates(scores, 0, 1e-9)
  assert ids[0, 0] == 1
  assert np.isfinite(kept).sum() == 1


def test_draws_have_the_frequencies_of_the_filtered_softmax():
  scores = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
  keys = jax.random.split(jax.random.key(0), 4000)
  rows = jnp.tile(scores, (4000, 1))
  for top_k, top_p, expected in (
    (0, None, [0.4, 0.3, 0.2, 0.1]),
    (3, None, [4 / 9, 3 / 9, 2 / 9, 0]),
    (0, 0.6, [4 / 7, 3 / 7, 0, 0]),
  ):
    ids = np.asarray(scoring.sample(keys, 0, rows, top_k, top_p))
    share = np.bincount(ids, minlength=4) / 4000
    np.testing.assert_allclose(share, expected, atol=0.04)
    assert not share[np.array(expected) == 0].any()


class _Counted(llama.Llama):
  """Counts how often Python traces the model."""

  traces = 0

  def __call__(self, *args, **kwargs):
    _Counted.traces += 1
    return super().__call__(*args, **kwargs)


def test_one_compile_serves_every_prompt_of_a_shape(params):
  model = _Counted(CONFIG)
  kwargs = {"model": model, "uncond": decode.left_pad([[20]]), "top_k": 5}
  run = lambda rows, **more: _generate(
    params, rows, rng=jax.random.key(0), **kwargs, **more
  )
  run(PROMPTS, guidance_scale=2.0)
  first = _Counted.traces
  assert first > 0
  run([[3], [4, 5], [6]], guidance_scale=4.0, temperature=0.5, eos_id=7)
  run(PROMPTS, guidance_scale=1.5, min_new_tokens=3, pad_id=1)
  assert _Counted.traces == first
  run(PROMPTS, guidance_scale=2.0, max_new_tokens=NEW + 1)
  assert _Counted.traces > first  # the counter does count


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    (
      {"guidance_scale": 2.0, "uncond": decode.left_pad([[1], [2]])},
      "uncond has 2 rows",
    ),
  ],
)
def test_arguments_that_do_not_fit_are_refused(params, changes, message):
  with pytest.raises(errors.UsageError, match=message):
    _generate(params, **changes)


class _Tensors(pickle.Unpickler):
  """Reads the tensors of a torch zip file and admits nothing else."""

  def __init__(self, archive, name):
    super().__init__(archive.open(name))
    self._archive, self._folder = archive, name.removesuffix("data.pkl")

  def find_class(self, module, name):
    known = {
      ("collections", "OrderedDict"): dict,
      ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
      ("torch", "FloatStorage"): np.float32,
    }
    if (module, name) not in known:
      raise pickle.UnpicklingError(f"{module}.{name} is no tensor")
    return known[module, name]

  def persistent_load(self, saved):
    _, dtype, key, *_ = saved
    data = self._archive.read(f"{self._folder}data/{key}")
    return np.frombuffer(data, dtype)

  @staticmethod
  def _tensor(storage, offset, shape, stride, *unused):
    stride = [4 * step for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, stride)


@pytest.fixture(scope="module")
def official():
  if "LAVIT_SHARED" not in os.environ:
    pytest.skip("LAVIT_SHARED is not set: golden text-to-image tokens")
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden/a"
  path = root / "checkpoint/language_model/pytorch_model.bin"
  with zipfile.ZipFile(path) as archive:
    name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
    tensors = _Tensors(archive, name).load()
  params = jax.tree.map(jnp.asarray, names.to_flax(names.LLM, tensors))
  config = llama.LlamaConfig(
    vocab_size=48386,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=86,
  )
  with np.load(root / "t2i_tokens.npz") as file:
    return llama.Llama(config), params, dict(file)


@pytest.mark.shared
@pytest.mark.parametrize(
  ("case", "guidance"),
  [("", 4.0), ("_single", 4.0), ("_neg", 4.0), ("_nocfg", 1.0)],
)
def test_greedy_image_tokens_are_the_official_ones(official, case, guidance):
  model, params, data = official
  vocab = vocabulary.Vocabulary(32000, 16384)
  mask = data[f"out_attention_mask{case}"].astype(bool)
  uncond = decode.left_pad([[vocab.image_begin]])
  if case == "_neg":
    uncond = decode.left_pad(data["out_prompt_ids"][:, -3:].tolist())
  expected = data[f"out_sequences{case}"][:, 1:]
  out = decode.generate(
    model,
    params,
    prompt={
      "tokens": np.zeros(mask.shape, np.int32),
      "mask": mask,
      "embeds": data[f"out_inputs_embeds{case}"],
      "use_embeds": mask,
    },
    max_new_tokens=expected.shape[1],
    min_new_tokens=20,
    suppress=vocab.suppress_for_image(official=True),
    eos_id=vocab.image_end,
    pad_id=2,
    guidance_scale=guidance,
    uncond=uncond,
  )
  np.testing.assert_array_equal(out.tokens, expected)


@pytest.mark.shared
def test_guided_scores_are_the_official_ones(official):
  model, params, data = official
  vocab = vocabulary.Vocabulary(32000, 16384)
  mask = data["out_attention_mask"].astype(bool)
  tokens = data["out_sequences"][:, 1:]
  lone = np.zeros_like(mask)
  lone[:, -1] = True  # the unconditional stream: [IMG] alone
  ids = np.full((4, mask.shape[1]), vocab.image_begin)
  embeds = np.concatenate([data["out_inputs_embeds"]] * 2)
  prompt = {
    "tokens": ids,
    "mask": np.concatenate([mask, lone]),
    "embeds": embeds,
    "use_embeds": np.concatenate([mask, np.zeros_like(mask)]),
  }
  scalars = {"eos_id": vocab.image_end, "min_new_tokens": 20}
  suppress = vocab.suppress_for_image(official=True)
  prefill = jax.jit(decode.prefill, static_argnums=(0, 3))
  advance = jax.jit(decode.advance, static_argnums=0)
  logits, cache = prefill(model, params, prompt, 5)
  for step in range(5):
    plain = jax.nn.log_softmax(logits[:2])
    scores = scoring.guide(plain, logits[2:], 4.0)
    scores = scoring.process(scores, step, scalars, suppress)
    ours = np.asarray(scores)[:, data["in_cols"]]
    theirs = data["out_scores5"][step]
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))
    kept = np.isfinite(theirs)
    error = np.abs(ours[kept] - theirs[kept]).max()
    assert error <= 1e-4 * np.abs(theirs[kept]).max()
    ids = np.concatenate([tokens[:, step]] * 2)
    logits, cache = advance(model, params, jnp.asarray(ids), cache)
