"""Rows longer than a device: keys are gathered, order and segments kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import sharding
from lavit_jax.models import layers, llama
from lavit_jax.models.attention import mesh as mesh_lib

pytestmark = pytest.mark.slow

_MESHES = (
  {"context": 8},
  {"data": 2, "context": 4},
  {"fsdp": 2, "context": 2, "tensor": 2},
)


def _rows(length=64):
  """Ids and segments: documents of uneven length, padding at the end."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 100, (4, length)).astype(np.int32)
  segments = np.cumsum(rng.random((4, length)) < 0.1, axis=1) + 1
  segments[:, -5:] = 0
  return jnp.asarray(tokens), jnp.asarray(segments, jnp.int32)


def _model(groups=2):
  return llama.Llama(
    llama.LlamaConfig(
      vocab_size=100,
      width=32,
      depth=2,
      num_heads=4,
      num_kv_heads=groups,
      mlp_dim=32,
      remat="full",
    )
  )


def _loss_and_gradients(model, variables, tokens, segments):
  def loss(variables):
    out = model.apply(variables, tokens, segment_ids=segments)
    return jnp.sin(out[..., :100]).mean()

  return jax.jit(jax.value_and_grad(loss))(variables)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sizes", _MESHES, ids=str)
def test_a_split_sequence_equals_a_whole_one(sizes, packed):
  """Loss and gradients of a LLaMA over packed rows."""
  model = _model()
  tokens, segments = _rows()
  segments = segments if packed else None
  init = lambda: model.init(jax.random.key(0), tokens)
  variables = sharding.unbox(jax.jit(init)())
  one = _loss_and_gradients(model, variables, tokens, segments)
  mesh = sharding.make_mesh(sizes)
  with sharding.use(mesh):
    layout = sharding.param_shardings(jax.eval_shape(init), mesh)
    on_mesh = jax.device_put(variables, layout)
    many = _loss_and_gradients(model, on_mesh, tokens, segments)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    scale = max(np.abs(a).max(), 1e-3)
    np.testing.assert_allclose(b, a, atol=1e-4 * scale)


def test_the_split_form_is_the_one_that_runs(monkeypatch):
  """Only causal self-attention of rows that divide, and only on such meshes."""
  asked = []
  real = mesh_lib.einsums

  def spy(query, key, *rest):
    asked.append((query.shape, key.shape))
    return real(query, key, *rest)

  monkeypatch.setattr(mesh_lib, "einsums", spy)
  x = jnp.ones((2, 16, 4, 8))
  mask = jnp.ones((2, 1, 1, 16), bool)
  with sharding.use(sharding.make_mesh({"data": 2, "context": 4})):
    layers.attention(x, x, x, mask=mask, causal=True)
    layers.attention(x, x, x)
    layers.attention(x[:, :15], x[:, :15], x[:, :15], causal=True)
    assert not asked
    layers.attention(x, x, x, causal=True)
  assert asked == [((1, 4, 4, 8), (1, 16, 4, 8))]
  with sharding.use(sharding.make_mesh({"data": 2, "tensor": 4})):
    layers.attention(x, x, x, causal=True)
  assert asked[1:] == [((1, 16, 1, 8), (1, 16, 1, 8))]
  with sharding.use(sharding.make_mesh({}, jax.devices()[:1])):
    layers.attention(x, x, x, causal=True)
  assert len(asked) == 2


def test_a_later_token_changes_no_earlier_one_on_any_part():
  """Causality by gradient across the parts, inside and between segments."""
  config = dataclasses.replace(_model().config, depth=1)
  model = llama.Llama(config)
  tokens = jnp.zeros((1, 32), jnp.int32)
  segments = jnp.where(jnp.arange(32) < 20, 1, 2)[None]
  params = sharding.unbox(model.init(jax.random.key(0), tokens))
  embeds = jax.random.normal(jax.random.key(1), (1, 32, config.width))

  def at(embeds, place):
    out = model.apply(
      params,
      tokens,
      embeds=embeds,
      use_embeds=jnp.ones((1, 32), bool),
      segment_ids=segments,
      return_hidden=True,
    )
    return jnp.take(out[0], place, axis=0).sum()

  with sharding.use(sharding.make_mesh({"context": 8})):
    touched = jax.jit(jax.grad(at))
    for place, first in ((13, 0), (19, 0), (20, 20), (30, 20)):
      seen = np.abs(touched(embeds, place)[0]).sum(-1) > 0
      expected = (np.arange(32) >= first) & (np.arange(32) <= place)
      np.testing.assert_array_equal(seen, expected)
