"""Every product of every network is computed in a dtype that its config says.

A layer without one takes that of its parameters, float32: a slow product in
the middle of a bfloat16 network.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lavit_jax.models import llama, unified
from lavit_jax.models.encoder import contrastive
from lavit_jax.models.pixels import pixel_decoder, vae
from lavit_jax.models.tokenizer import decoder, tokenizer
from tests.train import latent_micro

_WORDS = tokenizer.with_dtype(latent_micro.TOKENIZER, "bfloat16")
_LLM = llama.LlamaConfig(
  vocab_size=40,
  width=16,
  depth=1,
  num_heads=2,
  num_kv_heads=2,
  mlp_dim=16,
  dtype="bfloat16",
)
_GRID, _WIDTH = _WORDS.num_patches, _WORDS.width
_VAE = dataclasses.replace(
  latent_micro.VAE, dtype="bfloat16", force_upcast=False
)


def _contrastive():
  config = contrastive.ContrastiveConfig(
    vit=dataclasses.replace(_WORDS.vit, mask_token=True),
    text=_LLM,
    captioner=_LLM,
  )
  tokens = jnp.zeros((1, 5), jnp.int32)
  return contrastive.Contrastive(config), (
    jnp.zeros((1, 32, 32, 3)),
    tokens,
    tokens == 0,
    jnp.zeros((1, _GRID), bool),
  )


def _unified():
  model = unified.UnifiedModel(_LLM, _WORDS, 4)
  ids = jnp.zeros((1, 8), jnp.int32)
  return lambda key: model.init(
    key,
    ids,
    features=jnp.zeros((1, 1, _GRID, _WIDTH)),
    keep=jnp.ones((1, 1, _GRID), bool),
    image_index=ids,
    token_index=ids,
    positions=ids,
    segments=ids + 1,
  )


def _pixels():
  plain = dataclasses.replace(
    latent_micro.unet_config("lowres", dtype="bfloat16"),
    in_channels=56,
    out_channels=48,
    cross_dim=8,
  )
  config = pixel_decoder.PixelDecoderConfig(
    image_size=32,
    patch=4,
    num_patches=_GRID,
    feature_dim=_WIDTH,
    grid_channels=8,
    unet=plain,
  )
  return pixel_decoder.PixelDecoder(config), (
    jnp.zeros((1, 32, 32, 3)),
    jnp.zeros((1,), jnp.int32),
    jnp.zeros((1, _GRID, _WIDTH)),
  )


def _decoders(kind):
  sizes, codes = latent_micro.SIZES[kind], jnp.zeros((1, _GRID, 8))
  if kind == "lowres":
    made = decoder.LowresDecoder(_WORDS.decoder, *sizes["dims"])
  else:
    made = decoder.HighresDecoder(
      _WORDS.decoder, sizes["dims"], sizes["pooled"]
    )
  return made, (codes, jnp.ones((1, _GRID), bool))


_NETWORKS = {
  "contrastive": _contrastive,
  "unified": _unified,
  "tokenizer": lambda: (
    tokenizer.DynamicVisualTokenizer(dataclasses.replace(_WORDS, llm_width=16)),
    (jnp.zeros((1, _GRID, _WIDTH)), jnp.ones((1, _GRID))),
  ),
  "lowres": lambda: _decoders("lowres"),
  "highres": lambda: _decoders("highres"),
  "pixels": _pixels,
  "vae": lambda: (vae.AutoencoderKL(_VAE), (jnp.zeros((1, 8, 8, 3)),)),
}


@pytest.mark.parametrize("name", _NETWORKS)
def test_every_layer_has_a_dtype(name):
  made, seen = _NETWORKS[name](), []

  def note(call, args, kwargs, context):
    module = context.module
    if isinstance(module, (nn.Dense, nn.Conv, nn.DenseGeneral)):
      seen.append(("/".join(module.path), module.dtype))
    return call(*args, **kwargs)

  if isinstance(made, tuple):
    model, inputs = made
    made = lambda key: model.init(key, *inputs)
  with nn.intercept_methods(note):
    jax.eval_shape(made, jax.random.key(0))
  assert seen
  assert not [path for path, dtype in seen if dtype is None]


def test_read_tokens_have_the_dtype_of_the_merger():
  model = unified.UnifiedModel(_LLM, _WORDS, 4)
  variables = jax.eval_shape(_unified(), jax.random.key(0))
  read, _ = jax.eval_shape(
    lambda v: model.apply(
      v,
      jnp.zeros((1, _GRID, _WIDTH)),
      jnp.ones((1, _GRID), bool),
      method="read",
    ),
    variables,
  )
  assert read.dtype == jnp.bfloat16


def test_embeddings_are_compared_in_float32():
  model, inputs = _contrastive()
  out = jax.eval_shape(
    lambda key: model.init_with_output(key, *inputs)[0], jax.random.key(0)
  )
  assert out["image"].dtype == out["text"].dtype == jnp.float32
  assert out["patches"].dtype == out["features"].dtype == jnp.bfloat16
