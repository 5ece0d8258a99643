import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models.tokenizer import decoder, merger
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


@functools.cache
def build():
  """Apply, variables and vectors float[2, 6, 4] of a small decoder."""
  model = decoder.SemanticDecoder(CONFIG)
  vectors = jax.random.normal(jax.random.key(0), (2, 6, 4))
  init = jax.jit(model.init)
  variables = init(jax.random.key(1), vectors, jnp.ones((2, 6), bool))
  apply = jax.jit(model.apply, static_argnames="method")
  return apply, nn.meta.unbox(variables), vectors


@functools.cache
def golden_apply(kind, *sizes):
  model = kind(load.model_config().decoder, *sizes)
  return jax.jit(model.apply)


def padded(golden, case, capacity):
  """Recorded rows of all images, an image a row: vectors and valid."""
  rows, counts = (golden[f"in_{n}{case}"] for n in ("quantized", "token_nums"))
  vectors = np.zeros((len(counts), capacity, rows.shape[1]), np.float32)
  valid = np.arange(capacity) < counts[:, None]
  vectors[valid] = rows
  return vectors, valid


@pytest.mark.parametrize("case", ["", "_2"])
def test_lowres_decoder_matches_the_official_one(case):
  golden = load.arrays("decoder")
  apply = golden_apply(decoder.LowresDecoder, load.CONFIG["unet_proj"])
  out = apply({"params": load.variables("lowres")}, *padded(golden, case, 16))
  assert load.error(out, golden[f"out_lowres{case}"]) <= 1e-5


@pytest.mark.parametrize("case", ["", "_2"])
def test_highres_decoder_matches_the_official_one(case):
  golden = load.arrays("decoder")
  c = load.CONFIG
  widths = (c["unet_proj_1"], c["unet_proj_2"])
  apply = golden_apply(decoder.HighresDecoder, widths, c["pool_dim"])
  condition, pooled = apply(
    {"params": load.variables("highres")}, *padded(golden, case, 16)
  )
  assert load.error(condition, golden[f"out_prompt_embeds{case}"]) <= 1e-5
  assert load.error(pooled, golden[f"out_pooled{case}"]) <= 1e-5


def test_soft_equals_gathered_for_a_hard_mask():
  apply, variables, vectors = build()
  mask = jnp.array([[0.0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
  soft = apply(variables, vectors, mask, method="soft")
  gathered, valid, _ = merger.gather_kept(vectors, mask > 0, 6)
  hard = apply(variables, gathered, valid)
  np.testing.assert_allclose(soft, hard, atol=2e-6)
  # The claim is about positions: by raster place it would not hold.
  in_place = apply(variables, vectors, mask > 0)
  assert float(jnp.abs(in_place - hard)[0].max()) > 1e-3
  np.testing.assert_allclose(in_place[1], hard[1], atol=2e-6)


def test_padding_cannot_be_seen():
  apply, variables, vectors = build()
  valid = jnp.arange(6) < jnp.array([[2], [5]])
  changed = jnp.where(valid[..., None], vectors, 1e6)
  first = apply(variables, vectors, valid)
  np.testing.assert_array_equal(first, apply(variables, changed, valid))
  short = apply(variables, vectors[:, :5], valid[:, :5])
  np.testing.assert_allclose(first, short, atol=2e-6)


def test_gradient_reaches_the_mask_of_dropped_patches():
  apply, variables, vectors = build()
  mask = jnp.array([[0.0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])

  def loss(mask):
    out = apply(variables, vectors, mask, method="soft")
    return jnp.square(out - 1.0).sum()

  gradient = np.asarray(jax.grad(loss)(mask))
  assert np.isfinite(gradient).all()  # none kept in the second image
  assert (np.abs(gradient[0]) > 1e-7).all()


def test_an_image_without_codes_has_finite_gradients():
  apply, variables, vectors = build()
  valid = jnp.zeros((2, 6), bool)

  def loss(variables):
    return jnp.square(apply(variables, vectors * 0, valid) - 1.0).sum()

  gradient = jax.grad(loss)(variables)
  leaves = jax.tree.leaves(gradient)
  assert all(bool(jnp.isfinite(g).all()) for g in leaves)
  # Every padding row is seen, by its position.
  position = gradient["params"]["pos_embed"][0]
  assert float(jnp.abs(position).max(-1).min()) > 0.0


def test_too_many_codes_and_uneven_heads_are_refused():
  apply, variables, vectors = build()
  with pytest.raises(ValueError, match=r"12 codes an image.*6"):
    apply(variables, jnp.tile(vectors, (1, 2, 1)), jnp.ones((2, 12)))
  with pytest.raises(errors.ConfigError, match="num_heads=3"):
    dataclasses.replace(CONFIG, num_heads=3)
