import collections
import dataclasses

import numpy as np
import pytest
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.infer.pixels import latent_space
from lavit_jax.models import llama
from lavit_jax.models.tokenizer import decoder, tokenizer
from lavit_jax.port.formats import tensors
from lavit_jax.port.reading import plan
from lavit_jax.port.tables import names, sizes
from tests.port.tables import names_test

HEADS = 16
ROWS = 48386
TABLES = names_test.TABLES


def shapes(part):
  """Returns the official full-size shapes of a file."""
  return names_test.official_shapes(TABLES[part][0])


def unread(part):
  """Returns tensors of these shapes that fail when they are read."""
  dtype = np.dtype(np.float16)
  return {
    name: tensors.Tensor(name, part, shape, dtype, pytest.fail)
    for name, shape in shapes(part).items()
  }


def plain(config):
  """Returns a config without choices of computation: dtype, recomputation."""
  fields = dataclasses.asdict(config)
  for part in (fields, *(v for v in fields.values() if isinstance(v, dict))):
    for name in ("dtype", "remat", "unroll"):
      part.pop(name, None)
  return fields


@pytest.fixture(scope="module")
def config():
  """Returns the tokenizer's sizes, inferred from the release's shapes."""
  vit = sizes.vit(shapes("encoder"), HEADS, with_head=True)
  low = sizes.semantic_decoder(shapes("lowres"), names.LOWRES, HEADS)
  return sizes.visual_tokenizer(shapes("tokenizer"), vit, HEADS, low)


def test_sizes_of_the_release_are_those_of_the_full_size_presets(config):
  assert plain(config) == plain(tokenizer.LAVIT_7B)
  assert sizes.num_codes(shapes("tokenizer")) == 16384
  low = sizes.lowres_meta(shapes("lowres"), HEADS)
  high = sizes.highres_meta(shapes("highres"), HEADS)
  assert low["condition_dim"] == 768
  assert high["condition_dims"] == [768, 1280]
  assert high["pooled_dim"] == 1280
  for meta in (low, high):
    found = decoder.DecoderConfig(**meta["decoder"])
    assert plain(found) == plain(decoder.LAVIT_7B)


@pytest.fixture(scope="module")
def trees(config):
  """Returns abstract trees of these sizes, by part."""
  found = sizes.abstract_tokenizer(config)
  found["params"].pop("decoder")
  low = sizes.lowres_meta(shapes("lowres"), HEADS)
  high = sizes.highres_meta(shapes("highres"), HEADS)
  return {
    "encoder": sizes.abstract_encoder(config.vit),
    "tokenizer": found,
    "understanding": {
      "merger": found["params"]["merger"],
      "projection": found["params"]["llm_proj"],
    },
    "lowres": sizes.abstract_decoder(latent_space.semantic("lowres", low)),
    "highres": sizes.abstract_decoder(latent_space.semantic("highres", high)),
    "llm": sizes.abstract_llama(llama.LLAMA2_7B),
  }


@pytest.mark.parametrize("part", TABLES)
def test_every_tensor_of_the_release_is_planned_exactly_once(trees, part):
  """Names and shapes agree, and no tensor is read."""
  found, problems = unread(part), plan.Problems(part)
  rows = ROWS if part == "llm" else None
  arrays = plan.arrays_of(
    TABLES[part][1], found, trees[part], problems, label=part, vocab_size=rows
  )
  problems.check()
  used = collections.Counter(t.name for a in arrays for t in a.sources)
  assert used == collections.Counter(found.keys())
  flat = traverse_util.flatten_dict(trees[part], sep="/")
  assert {a.path: a.shape for a in arrays} == {
    path: leaf.shape for path, leaf in flat.items()
  }
  assert len(arrays) == len(flat)


def test_sizes_are_inferred_by_majority():
  odd = shapes("encoder")
  odd["cls_token"] = (1, 1, 1407)
  assert sizes.vit(odd, HEADS, with_head=True).width == 1408


def test_a_size_that_nothing_shows_is_unknown():
  fewer = shapes("encoder")
  del fewer["pos_embed"]
  with pytest.raises(sizes.UnknownSize, match="pos_embed"):
    sizes.vit(fewer, HEADS, with_head=True)


def test_heads_must_divide_the_width():
  sizes.check_heads(1408, 16, "--heads")
  for heads in (0, -4, 15):
    with pytest.raises(errors.UsageError, match="do not divide"):
      sizes.check_heads(1408, heads, "--heads")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("blocks.{i}.attn.q_bias", 0.0),
    ("blocks.{i}.norm1.weight", 1.0),
    ("blocks.{i}.norm1.bias", 0.0),
    ("head.weight", 0.0),
    ("blocks.{i}.mlp.fc1.weight", None),
    ("pos_embed", None),
    ("cls_token", None),
  ],
)
def test_only_neutral_values_replace_missing_tensors(name, value):
  row = next(row for row in names.ENCODER if row.official == name)
  assert plan.neutral(row) == value
