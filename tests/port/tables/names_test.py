import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models import llama, unified
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import decoder, tokenizer
from lavit_jax.port.tables import names
from tests.golden import load

MANIFEST = json.loads((load.ROOT / "manifest.json").read_text())
TABLES = {
  "encoder": ("visual_tokenizer/eva_vitg_psz14.bin", names.ENCODER),
  "tokenizer": ("visual_tokenizer/tokenizer_encoder.bin", names.TOKENIZER),
  "understanding": ("language_model/visual_weight.bin", names.UNDERSTANDING),
  "lowres": ("visual_tokenizer/tokenizer_decoder.bin", names.LOWRES),
  "highres": ("visual_tokenizer/highres_tokenizer_decoder.bin", names.HIGHRES),
  "llm": ("language_model/pytorch_model-*.bin", names.LLM),
}


def official_shapes(file):
  """Returns the shape of every tensor of an official full-size file."""
  shapes = {}
  for name, (depth, shape) in MANIFEST[file].items():
    for i in range(depth or 1):
      shapes[name.replace("{i}", str(i))] = tuple(shape)
  return shapes


def abstract(module, *args, **kwargs):
  """Returns the abstract variables of a module."""
  make = lambda: module.init(jax.random.key(0), *args, **kwargs)
  return nn.meta.unbox(jax.eval_shape(make))


@pytest.fixture(scope="module")
def full_size():
  """Returns abstract trees of the full-size presets, by the keys of TABLES."""
  config = tokenizer.LAVIT_7B
  features = jnp.zeros((1, 256, 1408))
  joined = abstract(
    tokenizer.DynamicVisualTokenizer(config), features, jnp.ones((1, 256))
  )
  unified_model = unified.UnifiedModel(llama.LLAMA2_7B, config, 256)
  row = jnp.zeros((1, 8), jnp.int32)
  understanding = abstract(
    unified_model,
    row,
    features=features[None],
    keep=jnp.ones((1, 1, 256), bool),
    image_index=row,
    token_index=row,
    positions=row,
    segments=row,
  )["params"]
  codes = jnp.zeros((1, 256, 32)), jnp.ones((1, 256), bool)
  trees = {
    "encoder": abstract(vision.EvaVit(config.vit), jnp.zeros((1, 224, 224, 3)))[
      "params"
    ],
    "lowres": abstract(decoder.LowresDecoder(config.decoder), *codes)["params"],
    "highres": abstract(decoder.HighresDecoder(config.decoder), *codes)[
      "params"
    ],
  }
  trees["llm"] = understanding.pop("llm")
  trees["understanding"] = understanding
  trees["decoder"] = joined["params"].pop("decoder")
  return trees | {"tokenizer": joined}


@pytest.mark.parametrize("part", TABLES)
def test_full_size_shapes_are_those_of_the_official_release(full_size, part):
  file, table = TABLES[part]
  tensors = names.to_official(table, full_size[part], vocab_size=48386)
  shapes = {name: value.shape for name, value in tensors.items()}
  assert shapes == official_shapes(file)


@pytest.mark.parametrize("part", ["lowres", "highres"])
def test_the_tokenizer_takes_the_decoder_of_either_file(full_size, part):
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  assert shapes(full_size["decoder"]) == shapes(full_size[part]["decoder"])


@pytest.mark.parametrize("part", TABLES)
def test_every_name_and_path_occurs_once(part):
  _, table = TABLES[part]
  for side in ("official", "path"):
    found = [getattr(row, side) for row in table]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
  "part", ["encoder", "tokenizer", "understanding", "lowres", "highres"]
)
def test_conversion_there_and_back_changes_nothing(part):
  _, table = TABLES[part]
  weights = load.official(part)
  back = names.to_official(table, names.to_flax(table, weights))
  assert set(back) == set(weights)
  for name, value in weights.items():
    np.testing.assert_array_equal(back[name], value, err_msg=name)


def llm_weights(depth=2):
  """Returns random official LLM tensors: 5 ids, width 4, hidden width 6."""
  rng = np.random.default_rng(0)
  shapes = {
    row.official: (4, 4) if "self_attn" in row.official else (4,)
    for row in names.LLM
  }
  shapes |= dict.fromkeys(
    ("model.embed_tokens.weight", "lm_head.weight"), (5, 4)
  )
  for name in ("gate_proj", "up_proj", "down_proj"):
    down = name == "down_proj"
    shape = (4, 6) if down else (6, 4)
    shapes["model.layers.{i}.mlp." + name + ".weight"] = shape
  return {
    name.replace("{i}", str(i)): rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
    for i in range(depth if "{i}" in name else 1)
  }


def test_vocabulary_rows_are_padded_and_cut_again():
  weights = llm_weights()
  ours = names.to_flax(names.LLM, weights)
  assert ours["embedding"].shape == ours["head"].shape == (128, 4)
  assert not ours["head"][5:].any()
  assert ours["layers"]["mlp"]["up"]["kernel"].shape == (2, 4, 6)
  back = names.to_official(names.LLM, ours, vocab_size=5)
  assert {k: v.shape for k, v in back.items()} == {
    k: v.shape for k, v in weights.items()
  }
  np.testing.assert_array_equal(
    back["model.layers.1.mlp.up_proj.weight"],
    weights["model.layers.1.mlp.up_proj.weight"],
  )


def test_tensors_that_nothing_needs_are_ignored():
  weights = llm_weights()
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  ours = names.to_flax(names.LLM, weights | {name: np.ones(2)})
  assert "layers" in ours
  weights = load.official("tokenizer")
  names.to_flax(names.TOKENIZER, weights | {"encoder.cls_token": np.ones(2)})


def test_all_missing_and_unknown_names_are_listed():
  weights = llm_weights()
  del weights["model.norm.weight"], weights["model.layers.0.mlp.up_proj.weight"]
  weights["model.norm.bias"] = np.ones(4)
  with pytest.raises(errors.CheckpointError) as error:
    names.to_flax(names.LLM, weights)
  for name in (
    "model.norm.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.bias",
  ):
    assert f"'{name}'" in str(error.value)


def test_a_tree_of_another_module_is_refused():
  ours = names.to_flax(names.LLM, llm_weights())
  ours["extra"] = ours.pop("norm")
  with pytest.raises(errors.CheckpointError, match=r"norm/scale.*extra/scale"):
    names.to_official(names.LLM, ours)
