import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models import layers
from lavit_jax.models.tokenizer import merger
from tests.golden import load

CONFIG = merger.MergerConfig(width=16, depth=2, num_heads=2, mlp_dim=32)
MASKS = ("rand", "all", "one", "none")


def jitted(model):
  return jax.jit(model.apply, static_argnames=("method", "form", "capacity"))


@functools.cache
def build():
  """Apply, variables and features float[2, 6, 16] of a small merger."""
  model = merger.TokenMerger(CONFIG)
  features = jax.random.normal(jax.random.key(0), (2, 6, 16))
  init = jax.jit(model.init)
  variables = init(jax.random.key(1), features, jnp.ones((2, 6)))
  return jitted(model), nn.meta.unbox(variables), features


@functools.cache
def golden_apply():
  return jitted(merger.TokenMerger(load.model_config().merger))


def golden_variables(weights):
  tree = load.variables(weights)
  return {"params": tree.get("params", tree)["merger"]}


@pytest.mark.parametrize(
  ("weights", "prefix"), [("tokenizer", "out_"), ("understanding", "out_und_")]
)
def test_reference_form_matches_the_official_merger(weights, prefix):
  golden = load.arrays("merger")
  apply, variables = golden_apply(), golden_variables(weights)
  features = golden["in_features"]
  for name in MASKS:
    out = apply(variables, features, golden[f"in_mask_{name}"])
    assert load.error(out, golden[f"{prefix}{name}"]) <= 1e-5, name


def test_ln_vision_matches_the_official_one():
  golden = load.arrays("merger")
  variables = golden_variables("tokenizer")["params"]["ln_vision"]
  out = layers.LayerNorm(1e-5).apply(
    {"params": variables}, golden["in_features"]
  )
  assert load.error(out, golden["out_ln_vision"]) <= 1e-5


@pytest.mark.parametrize("name", ["rand", "all", "one"])
def test_compact_equals_all_positions_with_eps_zero(name):
  golden = load.arrays("merger")
  apply, variables = golden_apply(), golden_variables("tokenizer")
  features, mask = golden["in_features"], golden[f"in_mask_{name}"]
  capacity = int(mask.sum(1).max())
  soft = apply(variables, features, mask, form="soft")
  expected, valid, _ = merger.gather_kept(soft, mask > 0, capacity)
  tokens, also_valid, index = apply(
    variables, features, mask > 0, capacity=capacity, method="compact"
  )
  np.testing.assert_array_equal(valid, also_valid)
  assert load.error(tokens, expected) <= 1e-5
  for row, (places, ok) in enumerate(zip(index, valid, strict=True)):
    np.testing.assert_array_equal(places[ok], np.flatnonzero(mask[row]))


def test_padding_of_the_capacity_changes_no_token():
  apply, variables, features = build()
  keep = jnp.array([[0, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]], bool)
  short, long, cut = (
    apply(variables, features, keep, capacity=k, method="compact")[0]
    for k in (3, 6, 2)
  )
  np.testing.assert_allclose(long[:, :3], short, atol=1e-6)
  assert float(jnp.abs(long[:, 3:]).max()) == 0.0
  # Too little room cuts the last in raster order.
  np.testing.assert_allclose(cut, short[:, :2], atol=1e-6)


@pytest.mark.parametrize("form", ["soft", "compact"])
def test_a_token_attends_to_earlier_kept_and_all_dropped_patches(form):
  apply, variables, features = build()
  keep = jnp.array([[1, 0, 1, 0, 1, 1]] * 2, bool)

  def second_token(features):  # of the kept ones: patch 2
    if form == "soft":
      out = apply(variables, features, keep, form="soft")[:, 2]
    else:
      out = apply(variables, features, keep, capacity=4, method="compact")
      out = out[0][:, 1]
    return (out * jnp.arange(16.0)).sum()

  gradient = np.abs(jax.grad(second_token)(features)).max(-1)
  # Kept patches are no keys of the cross-attention, so what reaches the token
  # from them came through the kept stream: patches 4 and 5 come later.
  np.testing.assert_array_equal(gradient > 0, [[1, 1, 1, 1, 0, 0]] * 2)


def test_gradient_reaches_the_mask_of_dropped_patches():
  apply, variables, features = build()
  mask = jnp.array([[1.0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0]])

  def loss(mask):
    out = apply(variables, features, mask, form="soft")
    kept = jax.lax.stop_gradient(mask)[..., None]
    return (out * kept * jnp.arange(16.0)).sum()

  gradient = jax.grad(loss)(mask)
  dropped = np.asarray(gradient)[np.asarray(mask) == 0]
  assert (np.abs(dropped) > 1e-6).all()


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_no_gradient_is_nan_with_none_or_all_kept(kept):
  apply, variables, features = build()
  features = features.at[0, 2].set(0.0)
  mask = jnp.full((2, 6), kept)

  def soft(variables, mask):
    out = apply(variables, features, mask, form="soft")
    return jnp.square(out - 1.0).sum()

  def compact(variables):
    out, _, _ = apply(
      variables, features, mask > 0, capacity=4, method="compact"
    )
    return jnp.square(out - 1.0).sum()

  gradients = jax.jit(
    lambda variables, mask: (
      jax.grad(soft, (0, 1))(variables, mask),
      jax.grad(compact)(variables),
    )
  )
  both = gradients(variables, mask)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(both))


def test_gather_keeps_raster_order():
  x = jnp.arange(8.0).reshape(2, 4, 1)
  keep = jnp.array([[0, 1, 0, 1], [0, 0, 0, 1]], bool)
  rows, valid, index = merger.gather_kept(x, keep, 3)
  np.testing.assert_array_equal(rows[..., 0], [[1, 3, 0], [7, 0, 0]])
  np.testing.assert_array_equal(valid, [[1, 1, 0], [1, 0, 0]])
  np.testing.assert_array_equal(index, [[1, 3, 0], [3, 0, 0]])


def test_capacity_form_and_heads_are_checked():
  apply, variables, features = build()
  with pytest.raises(ValueError, match=r"capacity=7.*1 \.\.\. 6"):
    merger.gather_kept(features, jnp.ones((2, 6), bool), 7)
  with pytest.raises(ValueError, match="form='hard'"):
    apply(variables, features, jnp.ones((2, 6)), form="hard")
  with pytest.raises(errors.ConfigError, match="num_heads=3"):
    dataclasses.replace(CONFIG, num_heads=3)
