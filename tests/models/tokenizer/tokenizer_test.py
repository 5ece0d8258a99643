import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models.tokenizer import selector, tokenizer
from tests.golden import load

N = 16


@pytest.fixture(scope="module")
def official():
  """Model, variables, and the features and keep mask of recorded images."""
  config = load.model_config()
  golden = load.arrays("tokenize")
  model = tokenizer.DynamicVisualTokenizer(config)
  variables = load.variables("tokenizer")
  features = tokenizer.encode_images(
    config, load.variables("encoder"), load.pixels(golden["in_pixels"])
  )
  apply = jax.jit(model.apply, static_argnames=("method", "capacity"))
  log_probs = apply(variables, features, method="select")
  keep = selector.mask_from_noise(log_probs, golden["in_gumbel"]) > 0
  return apply, variables, features, keep, golden


def test_ids_of_recorded_images_are_the_official_ones(official):
  apply, variables, features, keep, golden = official
  _, ids, valid = apply(variables, features, keep, capacity=N, method="encode")
  np.testing.assert_array_equal(valid.sum(1), golden["out_lengths"])
  ours = np.where(valid, ids + 32002, -1)
  np.testing.assert_array_equal(ours, golden["out_ids"])
  codes = np.asarray(variables["codebook"]["codes"])[np.asarray(ids)]
  np.testing.assert_array_equal(codes[valid], golden["out_quantized"])


def test_tokens_for_the_llm_are_the_official_ones(official):
  apply, variables, features, keep, golden = official
  weights = load.variables("understanding")
  params = variables["params"] | {
    "merger": weights["merger"],
    "llm_proj": weights["projection"],
  }
  tokens, valid, _ = apply(
    {"params": params}, features, keep, capacity=N, method="merge_compact"
  )
  embeds = apply({"params": params}, tokens, method="tokens_for_llm")
  embeds = jnp.where(valid[..., None], embeds, 0.0)
  assert load.error(embeds, golden["out_embeds"]) <= 1e-5
  np.testing.assert_array_equal(valid.sum(1), golden["out_embeds_lengths"])


def small(**changes):
  """A tokenizer of width 8 over 4 patches."""
  sizes = {"width": 8, "num_heads": 2, "mlp_dim": 16, "depth": 1}
  fields = {
    "vit": {"image_size": 8, "patch_size": 4} | sizes,
    "selector": {"width": 8},
    "merger": dict(sizes),
    "quantizer": {"width": 8, "num_codes": 6, "code_dim": 4},
    "decoder": {"num_patches": 4, "code_dim": 4, "out_dim": 8} | sizes,
  }
  return fields | changes


def test_soft_training_form_equals_the_use_of_the_codes():
  model = tokenizer.DynamicVisualTokenizer(tokenizer.config_from_dict(small()))
  features = jax.random.normal(jax.random.key(0), (2, 4, 8))
  mask = jnp.array([[1.0, 0, 1, 0], [0, 1, 1, 1]])
  init = jax.jit(model.init)
  variables = nn.meta.unbox(init(jax.random.key(1), features, mask))
  merged = model.apply(variables, features, mask, method="merge")
  z = model.apply(variables, merged, method="project")
  np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1.0, rtol=1e-5)
  codes = variables["codebook"]["codes"]
  nearest = codes[(z @ codes.T).argmax(-1)]  # unit codes: highest cosine
  soft = model.apply(variables, nearest, mask, method="decode_soft")
  _, ids, valid = model.apply(variables, features, mask > 0, 3, method="encode")
  hard = model.apply(variables, ids, valid, method="decode_codes")
  np.testing.assert_allclose(soft, hard, atol=2e-6)


def test_encoding_without_a_codebook_is_refused():
  config = tokenizer.config_from_dict(small())
  model = tokenizer.DynamicVisualTokenizer(config)
  features = jnp.ones((1, 4, 8))
  init = jax.jit(model.init)
  variables = nn.meta.unbox(init(jax.random.key(1), features, jnp.ones((1, 4))))
  assert variables["codebook"]["codes"].shape == (6, 4)
  with pytest.raises(ValueError, match="codebook"):
    model.apply(
      {"params": variables["params"]},
      features,
      jnp.ones((1, 4), bool),
      4,
      method="encode",
    )


def test_config_comes_back_from_its_dict():
  for config in (tokenizer.TINY, tokenizer.LAVIT_7B):
    fields = dataclasses.asdict(config)
    assert tokenizer.config_from_dict(fields) == config


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"selector": {"widht": 8}}, r"tokenizer\.selector.*'widht'.*'width'"),
    ({"llm_with": 8}, r"'llm_with'.*'llm_width'"),
    ({"selector": {}}, r"tokenizer\.selector lacks \['width'\]"),
    ({"selector": {"width": 12}}, r"tokenizer\.selector\.width=12.*need 8"),
    ({"merger_form": "soft"}, r"merger_form='soft'.*compact"),
  ],
)
def test_configs_that_do_not_fit_are_refused(changes, words):
  with pytest.raises(errors.ConfigError, match=words):
    tokenizer.config_from_dict(small(**changes))


_ENCODER = {
  "image_size": 96,
  "patch_size": 16,
  "width": 48,
  "depth": 4,
  "num_heads": 2,
  "mlp_dim": 96,
}


def test_an_encoder_is_held_to_what_its_tokenizer_was_trained_on():
  config = tokenizer.TINY
  fields = dataclasses.asdict(config.vit)
  free = {"dtype": "bfloat16", "remat": "full", "unroll": 2}
  free |= {"mask_token": False, "head_dim_out": 7, "position_std": 1.0}
  tokenizer.check_encoder(config, fields | free)
  assert set(fields) == {*free, *_ENCODER}  # a new field is of either kind
  for name, value in _ENCODER.items():
    said = rf"vit\.{name} is {value} there, {fields[name]} here"
    with pytest.raises(errors.CheckpointError, match=said):
      tokenizer.check_encoder(config, fields | {name: value}, "DIR")
