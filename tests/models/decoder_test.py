import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import errors
from lavit_jax.models import decoder, merger
from tests.golden import load

CONFIG = decoder.DecoderConfig(
  width=16,
  depth=2,
  num_heads=2,
  mlp_dim=32,
  num_patches=6,
  code_dim=4,
  out_dim=8,
)


def build():
  model = decoder.SemanticDecoder(CONFIG)
  vectors = jax.random.normal(jax.random.key(0), (2, 6, 4))
  valid = jnp.ones((2, 6), bool)
  variables = nn.meta.unbox(model.init(jax.random.key(1), vectors, valid))
  return model, variables, vectors


def padded(golden, case, capacity):
  """Recorded rows of all pictures, a picture a row: vectors and valid."""
  rows, counts = (golden[f"in_{n}{case}"] for n in ("quantized", "token_nums"))
  vectors = np.zeros((len(counts), capacity, rows.shape[1]), np.float32)
  valid = np.arange(capacity) < counts[:, None]
  vectors[valid] = rows
  return vectors, valid


@pytest.mark.parametrize("case", ["", "_2"])
def test_lowres_decoder_matches_the_official_one(case):
  golden = load.arrays("decoder")
  config = load.model_config().decoder
  model = decoder.LowresDecoder(config, load.CONFIG["unet_proj"])
  out = model.apply(
    {"params": load.variables("lowres")}, *padded(golden, case, 16)
  )
  assert load.error(out, golden[f"out_lowres{case}"]) <= 1e-5


@pytest.mark.parametrize("case", ["", "_2"])
def test_highres_decoder_matches_the_official_one(case):
  golden = load.arrays("decoder")
  c = load.CONFIG
  model = decoder.HighresDecoder(
    load.model_config().decoder,
    (c["unet_proj_1"], c["unet_proj_2"]),
    c["pool_dim"],
  )
  condition, pooled = model.apply(
    {"params": load.variables("highres")}, *padded(golden, case, 16)
  )
  assert load.error(condition, golden[f"out_prompt_embeds{case}"]) <= 1e-5
  assert load.error(pooled, golden[f"out_pooled{case}"]) <= 1e-5


def test_soft_equals_gathered_for_a_hard_mask():
  model, variables, vectors = build()
  mask = jnp.array([[0.0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
  soft = model.apply(variables, vectors, mask, method="soft")
  gathered, valid, _ = merger.gather_kept(vectors, mask > 0, 6)
  hard = model.apply(variables, gathered, valid)
  np.testing.assert_allclose(soft, hard, atol=2e-6)
  # The claim is about positions: by raster place it would not hold.
  in_place = model.apply(variables, vectors, mask > 0)
  assert float(jnp.abs(in_place - hard)[0].max()) > 1e-3
  np.testing.assert_allclose(in_place[1], hard[1], atol=2e-6)


def test_padding_cannot_be_seen():
  model, variables, vectors = build()
  valid = jnp.arange(6) < jnp.array([[2], [5]])
  changed = jnp.where(valid[..., None], vectors, 1e6)
  first = model.apply(variables, vectors, valid)
  np.testing.assert_array_equal(first, model.apply(variables, changed, valid))
  short = model.apply(variables, vectors[:, :5], valid[:, :5])
  np.testing.assert_allclose(first, short, atol=2e-6)


def test_gradient_reaches_the_mask_of_dropped_patches():
  model, variables, vectors = build()
  mask = jnp.array([[0.0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])

  def loss(mask):
    out = model.apply(variables, vectors, mask, method="soft")
    return jnp.square(out - 1.0).sum()

  gradient = np.asarray(jax.grad(loss)(mask))
  assert np.isfinite(gradient).all()  # none kept in the second picture
  assert (np.abs(gradient[0]) > 1e-7).all()


def test_a_picture_without_codes_has_finite_gradients():
  model, variables, vectors = build()
  valid = jnp.zeros((2, 6), bool)
  loss = lambda v: jnp.square(model.apply(v, vectors * 0, valid)).sum()
  gradients = jax.tree.leaves(jax.grad(loss)(variables))
  assert all(bool(jnp.isfinite(g).all()) for g in gradients)
  # All padding rows are seen alike, with their positions.
  position = jax.grad(loss)(variables)["params"]["pos_embed"]
  assert float(jnp.abs(position).min(axis=-1).max()) > 0.0


def test_too_many_codes_and_uneven_heads_are_refused():
  model, variables, vectors = build()
  with pytest.raises(ValueError, match=r"12 codes a picture.*6"):
    model.apply(variables, jnp.tile(vectors, (1, 2, 1)), jnp.ones((2, 12)))
  with pytest.raises(errors.ConfigError, match="num_heads=3"):
    dataclasses.replace(CONFIG, num_heads=3)
