import dataclasses
import functools
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models import llama
from lavit_jax.models.attention import context
from lavit_jax.port.tables import names

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden/llm_small.npz"
CONFIG = llama.LlamaConfig(
  vocab_size=50,
  width=16,
  depth=2,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
)


def _init(config, seed=0):
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = jax.jit(llama.Llama(config).init)
  return nn.unbox(init(jax.random.key(seed), tokens)["params"])


@pytest.fixture(scope="module")
def params():
  return _init(CONFIG)


@pytest.fixture(scope="module")
def tokens():
  return jax.random.randint(jax.random.key(1), (2, 9), 3, 50)


@functools.partial(jax.jit, static_argnames=("config", "return_hidden"))
def _apply(params, tokens, config=CONFIG, **kwargs):
  return llama.Llama(config).apply({"params": params}, tokens, **kwargs)


@pytest.fixture(scope="module")
def golden():
  with np.load(_GOLDEN) as file:
    data = dict(file)
  config = llama.LlamaConfig(
    vocab_size=48386,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=86,
  )
  weights = {
    name.removeprefix("weights/"): value
    for name, value in data.items()
    if name.startswith("weights/model")
  }
  # The rows of embedding and head that the recording touches are kept.
  tables = (
    ("model.embed_tokens.weight", "embed_rows", "embed_ids"),
    ("lm_head.weight", "head_rows", "in_cols"),
  )
  for name, rows, ids in tables:
    weights[name] = np.zeros((48386, 32), np.float32)
    weights[name][data[ids]] = data[f"weights/{rows}"]
  params = jax.tree.map(jnp.asarray, names.to_flax(names.LLM, weights))
  return config, params, data


def _error(ours, theirs):
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_hidden_states_and_logits_are_the_official_ones(golden):
  config, params, data = golden
  hidden = _apply(params, data["in_ids"], config=config, return_hidden=True)
  assert _error(hidden, data["out_hidden_final"]) <= 1e-4
  logits = _apply(params, data["in_ids"], config=config)
  assert logits.shape == (2, 10, 48512)
  cols = logits[..., data["in_cols"]]
  assert _error(cols, data["out_logits_cols"]) <= 1e-4


def test_embeddings_padded_on_the_left_give_the_official_logits(golden):
  config, params, data = golden
  mask = data["in_attention_mask"].astype(bool)
  logits = _apply(
    params,
    jnp.zeros(mask.shape, jnp.int32),
    config=config,
    embeds=data["in_embeds"],
    use_embeds=mask,
    mask=mask,
  )
  cols = logits[..., data["in_cols"]] * mask[..., None]
  assert _error(cols, data["out_embeds_logits_cols"]) <= 1e-4


@pytest.mark.parametrize("steps", [(6, 1, 1, 1), (3, 3, 3)])
def test_a_cache_gives_the_logits_of_the_whole_row(params, tokens, steps):
  whole = _apply(params, tokens)
  cache = llama.init_cache(CONFIG, 2, 12)
  start, parts = 0, []
  for step in steps:
    part, cache = _apply(params, tokens[:, start : start + step], cache=cache)
    parts.append(part)
    start += step
  np.testing.assert_allclose(
    jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5
  )
  assert int(cache["index"]) == 9
  assert np.asarray(cache["valid"]).sum() == 18


def test_padding_on_the_left_changes_nothing(params, tokens):
  padded = jnp.pad(tokens[:1, :5], ((0, 0), (3, 0)), constant_values=7)
  mask = jnp.arange(8)[None] >= 3
  alone = _apply(params, tokens[:1, :5])
  np.testing.assert_allclose(
    _apply(params, padded, mask=mask)[:, 3:], alone, rtol=1e-4, atol=1e-5
  )
  cache = llama.init_cache(CONFIG, 1, 9)
  cached, cache = _apply(params, padded[:, :6], mask=mask[:, :6], cache=cache)
  last, _ = _apply(params, padded[:, 6:], cache=cache)
  both = jnp.concatenate([cached[:, 3:], last], 1)
  np.testing.assert_allclose(both, alone, rtol=1e-4, atol=1e-5)


def test_packed_documents_equal_separate_ones(params, tokens):
  segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
  packed = _apply(params, tokens[:1], segment_ids=segments)
  parts = [_apply(params, tokens[:1, :4]), _apply(params, tokens[:1, 4:])]
  np.testing.assert_allclose(
    packed, jnp.concatenate(parts, 1), rtol=1e-4, atol=1e-5
  )


def _sensitivity(params, tokens, position, **kwargs):
  """Gradient float[L, D] of the state at one position by all the inputs."""
  embeds = jax.random.normal(jax.random.key(3), (1, tokens.shape[1], 16))
  ones = jnp.ones((1, tokens.shape[1]), bool)

  def state(embeds):
    hidden = _apply(
      params,
      tokens[:1],
      embeds=embeds,
      use_embeds=ones,
      return_hidden=True,
      **kwargs,
    )
    return jnp.sin(hidden[0, position]).sum()

  return np.abs(jax.jit(jax.grad(state))(embeds)[0]).max(-1)


def test_no_gradient_comes_from_later_tokens(params, tokens):
  by_input = _sensitivity(params, tokens, 5)
  assert (by_input[:6] > 0).all()
  assert (by_input[6:] == 0).all()


def test_no_gradient_crosses_a_segment(params, tokens):
  segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
  by_input = _sensitivity(params, tokens, 6, segment_ids=segments)
  assert (by_input[4:7] > 0).all()
  assert (by_input[:4] == 0).all()
  assert (by_input[7:] == 0).all()


def test_positions_count_valid_tokens_and_restart_in_segments():
  mask = jnp.array([[0, 0, 1, 1, 1]], bool)
  segments = jnp.array([[1, 1, 2, 2, 2], [3, 3, 3, 0, 0]])
  np.testing.assert_array_equal(context.positions_of(mask), [[0, 0, 0, 1, 2]])
  np.testing.assert_array_equal(
    context.positions_of(None, segments), [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
  )


def test_a_continuous_input_replaces_the_id_and_nothing_else(params, tokens):
  use = jnp.zeros((2, 9), bool).at[:, 2:4].set(True)
  embeds = params["embedding"][tokens]
  other = tokens.at[:, 2:4].set(49)
  same = _apply(params, other, embeds=embeds, use_embeds=use)
  np.testing.assert_allclose(same, _apply(params, tokens), rtol=1e-5)
  wild = embeds.at[:, 5].set(9.0)  # not used there
  again = _apply(params, other, embeds=wild, use_embeds=use)
  np.testing.assert_array_equal(same, again)


def test_grouped_keys_equal_repeated_ones(params, tokens):
  full = dataclasses.replace(CONFIG, num_kv_heads=4)

  def repeat(kernel):  # [layers, D, 2 * 4] -> [layers, D, 4 * 4]
    kernel = kernel.reshape(2, 16, 2, 4)
    return jnp.repeat(kernel, 2, axis=2).reshape(2, 16, 16)

  attention = params["layers"]["attention"]
  repeated = {
    k: {"kernel": repeat(attention[k]["kernel"])} for k in ("key", "value")
  }
  layers = params["layers"] | {"attention": attention | repeated}
  np.testing.assert_allclose(
    _apply(params | {"layers": layers}, tokens, config=full),
    _apply(params, tokens),
    rtol=1e-4,
    atol=1e-5,
  )


def test_remat_and_unroll_change_no_gradient(params, tokens):
  def gradient(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    loss = lambda p: jnp.square(
      _apply(p, tokens, config=config, return_hidden=True)
    ).mean(where=jnp.arange(16) < 5)
    return jax.jit(jax.grad(loss))(params)

  plain = gradient()
  assert max(np.abs(x).max() for x in jax.tree.leaves(plain)) > 1e-3
  changed = [{"remat": name} for name in ("full", "dots", "most")]
  for changes in [*changed, {"unroll": 2}]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
      gradient(**changes),
      plain,
    )


def test_most_products_are_kept_but_for_the_projection(params, tokens):
  def kept(remat):  # floats of all layers, for the backward pass
    config = dataclasses.replace(CONFIG, remat=remat)
    loss = lambda p: _apply(p, tokens, config=config, return_hidden=True).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    equations = list(jaxpr.eqns)
    for e in equations:  # those of jitted functions behind the others
      if "jaxpr" in e.params and e.primitive.name != "scan":
        equations += getattr(e.params["jaxpr"], "eqns", ())
    forward = next(e for e in equations if e.primitive.name == "scan")
    shapes = [v.aval.shape for v in forward.outvars]
    return sum(math.prod(s) for s in shapes if s[:1] == (CONFIG.depth,))

  batch, length = tokens.shape
  rows = CONFIG.depth * batch * length
  assert kept("dots") - kept("most") == rows * CONFIG.width
  assert kept("most") > kept("full")


def test_the_program_does_not_grow_with_depth(tokens):
  def lines(depth):
    config = dataclasses.replace(CONFIG, depth=depth)
    model = llama.Llama(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return str(jax.make_jaxpr(model.apply)(shapes, tokens)).count("\n")

  assert lines(2) == lines(9)


def test_rows_past_the_vocabulary_are_never_likely(params, tokens):
  logits = _apply(params, tokens)
  assert logits.shape[-1] == CONFIG.padded_vocab == 128
  assert (logits[..., 50:] < -1e8).all()
  assert (np.abs(logits[..., :50]) < 1e3).all()


def test_full_size_preset_has_the_parameters_of_llama_2_7b():
  shapes = jax.eval_shape(
    llama.Llama(llama.LLAMA2_7B).init,
    jax.random.key(0),
    jnp.zeros((1, 2), jnp.int32),
  )
  count = sum(x.size for x in jax.tree.leaves(shapes))
  # 6,738,415,616 of Llama-2-7B with 32,000 rows, here 48,512 rows, twice.
  assert count == 6_738_415_616 + 2 * (48512 - 32000) * 4096


@pytest.mark.parametrize(
  ("changes", "message"),
  [({"num_heads": 3}, "width=16"), ({"num_kv_heads": 3}, "num_kv_heads=3")],
)
def test_heads_that_do_not_divide_are_refused(changes, message):
  with pytest.raises(errors.ConfigError, match=message):
    dataclasses.replace(CONFIG, **changes)
