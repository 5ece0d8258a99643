import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import errors
from lavit_jax.models import merger
from tests.golden import load

CONFIG = merger.MergerConfig(width=16, depth=2, num_heads=2, mlp_dim=32)
MASKS = ("rand", "all", "one", "none")


def build(batch=2, num=6):
  model = merger.TokenMerger(CONFIG)
  features = jax.random.normal(jax.random.key(0), (batch, num, 16))
  mask = jnp.ones((batch, num))
  variables = nn.meta.unbox(model.init(jax.random.key(1), features, mask))
  return model, variables, features


def golden_model(weights):
  model = merger.TokenMerger(load.model_config().merger)
  tree = load.variables(weights)
  return model, {"params": tree.get("params", tree)["merger"]}


@pytest.mark.parametrize(
  ("weights", "prefix"), [("tokenizer", "out_"), ("understanding", "out_und_")]
)
def test_reference_form_matches_the_official_merger(weights, prefix):
  golden = load.arrays("merger")
  model, variables = golden_model(weights)
  apply = jax.jit(lambda x, m: model.apply(variables, x, m, form="reference"))
  for name in MASKS:
    out = apply(golden["in_features"], golden[f"in_mask_{name}"])
    assert load.error(out, golden[f"{prefix}{name}"]) <= 1e-5, name


def test_ln_vision_matches_the_official_one():
  golden = load.arrays("merger")
  model, variables = golden_model("tokenizer")
  out = model.apply(
    variables, golden["in_features"], method=lambda m, x: m.ln_vision(x)
  )
  assert load.error(out, golden["out_ln_vision"]) <= 1e-5


@pytest.mark.parametrize("name", ["rand", "all", "one"])
def test_compact_equals_all_positions_with_eps_zero(name):
  golden = load.arrays("merger")
  model, variables = golden_model("tokenizer")
  features, mask = golden["in_features"], golden[f"in_mask_{name}"]
  capacity = int(mask.sum(1).max())
  soft = model.apply(variables, features, mask, form="soft")
  expected, valid, _ = merger.gather_kept(soft, mask > 0, capacity)
  tokens, also_valid, index = model.apply(
    variables, features, mask > 0, capacity, method="compact"
  )
  np.testing.assert_array_equal(valid, also_valid)
  assert load.error(tokens, expected) <= 1e-5
  for row, (places, ok) in enumerate(zip(index, valid, strict=True)):
    np.testing.assert_array_equal(places[ok], np.flatnonzero(mask[row]))


def test_padding_of_the_capacity_changes_no_token():
  model, variables, features = build()
  keep = jnp.array([[0, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]], bool)

  def apply(k):
    return model.apply(variables, features, keep, k, method="compact")

  short, long = apply(3)[0], apply(6)[0]
  np.testing.assert_allclose(long[:, :3], short, atol=1e-6)
  assert float(jnp.abs(long[:, 3:]).max()) == 0.0
  # Too little room cuts the last in raster order.
  np.testing.assert_allclose(apply(2)[0], short[:, :2], atol=1e-6)


@pytest.mark.parametrize("form", ["soft", "compact"])
def test_kept_tokens_are_causal_among_themselves(form):
  model, variables, features = build(batch=1)
  keep = jnp.array([[1, 0, 1, 0, 1, 1]], bool)
  origin = model.apply(variables, features, method=lambda m, x: m.ln_vision(x))

  def second_token(x):
    """Of the kept stream; what cross-attention reads is held fixed."""

    def run(m, x):
      tokens, valid, _ = merger.gather_kept(x, keep, 4)
      sight = merger._Sight(
        origin=origin,
        among=jnp.tril(valid[:, None, None] & valid[:, None, :, None]),
        dropped=~keep[:, None, None, :],
        all_kept=keep.all(1),
      )
      if form == "soft":
        tokens, causal = x, jnp.tril(jnp.ones((6, 6)))
        sight = dataclasses.replace(
          sight,
          among=(keep[:, None, None] | jnp.eye(6, dtype=bool)) * causal,
          dropped=1.0 - keep[:, None, None].astype(jnp.float32),
          all_kept=None,
          eps=0.0,
        )
      out = m.norm(m.blocks(tokens, sight)[0])
      return jnp.square(out[0, 2 if form == "soft" else 1]).sum()

    # A squared LayerNorm output is almost constant: weigh the channels.
    return model.apply(variables, x * jnp.arange(1.0, 17.0), method=run)

  gradient = np.abs(jax.grad(second_token)(features))[0].max(-1)
  np.testing.assert_array_equal(gradient > 0, [1, 0, 1, 0, 0, 0])


def test_dropped_patches_reach_kept_tokens_and_kept_ones_stay_apart():
  model, variables, features = build(batch=1)
  keep = jnp.array([[1, 0, 1, 0, 1, 1]], bool)

  def first(features):
    out, _, _ = model.apply(variables, features, keep, 4, method="compact")
    return (out[0, 0] * jnp.arange(16.0)).sum()

  gradient = np.abs(jax.grad(first)(features))[0].max(-1)
  np.testing.assert_array_equal(gradient > 0, [1, 1, 0, 1, 0, 0])


def test_gradient_reaches_the_mask_of_dropped_patches():
  model, variables, features = build()
  mask = jnp.array([[1.0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0]])

  def loss(mask):
    out = model.apply(variables, features, mask, form="soft")
    kept = jax.lax.stop_gradient(mask)[..., None]
    return (out * kept * jnp.arange(16.0)).sum()

  gradient = jax.grad(loss)(mask)
  dropped = np.asarray(gradient)[np.asarray(mask) == 0]
  assert (np.abs(dropped) > 1e-6).all()


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_no_gradient_is_nan_with_none_or_all_kept(kept):
  model, variables, features = build()
  features = features.at[0, 2].set(0.0)
  mask = jnp.full((2, 6), kept)

  def soft(variables, mask):
    out = model.apply(variables, features, mask, form="soft")
    return jnp.square(out - 1.0).sum()

  def compact(variables):
    out, _, _ = model.apply(variables, features, mask > 0, 4, method="compact")
    return jnp.square(out - 1.0).sum()

  grads = (
    jax.grad(soft, (0, 1))(variables, mask),
    jax.grad(compact)(variables),
  )
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_gather_keeps_raster_order():
  x = jnp.arange(8.0).reshape(2, 4, 1)
  keep = jnp.array([[0, 1, 0, 1], [0, 0, 0, 1]], bool)
  rows, valid, index = merger.gather_kept(x, keep, 3)
  np.testing.assert_array_equal(rows[..., 0], [[1, 3, 0], [7, 0, 0]])
  np.testing.assert_array_equal(valid, [[1, 1, 0], [1, 0, 0]])
  np.testing.assert_array_equal(index, [[1, 3, 0], [3, 0, 0]])


def test_capacity_form_and_heads_are_checked():
  model, variables, features = build()
  with pytest.raises(ValueError, match=r"capacity=7.*1 \.\.\. 6"):
    merger.gather_kept(features, jnp.ones((2, 6), bool), 7)
  with pytest.raises(ValueError, match="form='hard'"):
    model.apply(variables, features, jnp.ones((2, 6)), form="hard")
  with pytest.raises(errors.ConfigError, match="num_heads=3"):
    dataclasses.replace(CONFIG, num_heads=3)
