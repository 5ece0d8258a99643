"""Small checkpoints in the official layout, with sizes of no recording."""

import dataclasses
import functools
import json

import numpy as np
import torch
from flax import traverse_util

from lavit_jax.infer.loading import parts
from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.port.formats import llama_folder, official_layout
from lavit_jax.port.tables import names, sizes

WORDS = (parts.resolve("tiny") / "tokenizer.model").read_bytes()
HEADS, CODES = 3, 8
ROWS = 32002 + CODES
WIDTH = 24
VIT = vision.ViTConfig(
  image_size=12,
  patch_size=4,
  width=WIDTH,
  depth=2,
  num_heads=HEADS,
  mlp_dim=20,
  head_dim_out=5,
)
MERGER = merger.MergerConfig(width=WIDTH, depth=3, num_heads=HEADS, mlp_dim=28)
DECODER = decoder.DecoderConfig(
  width=WIDTH,
  depth=1,
  num_heads=HEADS,
  mlp_dim=16,
  num_patches=9,
  code_dim=6,
  out_dim=WIDTH,
)
TOKENIZER = tokenizer.TokenizerConfig(
  vit=VIT,
  selector=selector.SelectorConfig(width=WIDTH),
  merger=MERGER,
  quantizer=quantizer.QuantizerConfig(width=WIDTH, num_codes=CODES, code_dim=6),
  decoder=DECODER,
  merger_form="reference",
  llm_width=8,
)
LLAMA = llama.LlamaConfig(
  vocab_size=ROWS,
  width=8,
  depth=2,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=12,
  norm_eps=1e-6,
  max_len=64,
)
LLM = "language_model/pytorch_model.bin"
FILES = official_layout.FILES


def random(table, tree, seed, vocab_size=None):
  """Returns random float32 tensors of a table, by official name."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=value.shape, scale=0.2).astype(np.float32)
    for name, value in names.to_official(table, tree, vocab_size).items()
  }


def random_llama(config=LLAMA, seed=6):
  """Returns random tensors of a LlamaForCausalLM."""
  tree = sizes.abstract_llama(config)
  return random(names.LLM, tree, seed, vocab_size=config.vocab_size)


@functools.cache
def _made():
  tree = sizes.abstract_tokenizer(TOKENIZER)
  tree["params"].pop("decoder")
  whole = random(names.TOKENIZER, tree, 2)
  again = random(names.TOKENIZER, tree, 5)
  overlay = {
    name: value
    for name, value in again.items()
    if name.startswith(("causal_encoder.", "vit_proj."))
  }
  lowres = sizes.abstract_decoder(decoder.LowresDecoder(DECODER, 10))
  deep = dataclasses.replace(DECODER, depth=2)
  highres = sizes.abstract_decoder(decoder.HighresDecoder(deep, (7, 11), 13))
  return {
    FILES["encoder"]: random(names.ENCODER, sizes.abstract_encoder(VIT), 1),
    FILES["tokenizer"]: whole,
    FILES["lowres"]: random(names.LOWRES, lowres, 3),
    FILES["highres"]: random(names.HIGHRES, highres, 4),
    FILES["overlay"]: overlay,
    LLM: random_llama(),
  }


def state():
  """Returns {file: {official name: array}} of a checkpoint, to be modified."""
  return {
    file: {name: value.copy() for name, value in tensors.items()}
    for file, tensors in _made().items()
  }


def save(path, tensors):
  """Writes tensors (numpy or torch) as torch.save does."""
  path.parent.mkdir(parents=True, exist_ok=True)
  as_torch = lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
  torch.save({name: as_torch(x) for name, x in tensors.items()}, path)


def config_json(config=LLAMA, **fields):
  """Returns the bytes of a config.json."""
  content = llama_folder.config_json(config, "float32") | fields
  return json.dumps(content).encode()


def write(folder, tensors=None, *, heads=HEADS, **config_fields):
  """Writes a checkpoint in the official layout and returns its folder."""
  for file, content in (state() if tensors is None else tensors).items():
    save(folder / file, content)
  language_model = folder / official_layout.LLM_FOLDER
  language_model.mkdir(parents=True, exist_ok=True)
  (language_model / "config.json").write_bytes(config_json(**config_fields))
  (language_model / "generation_config.json").write_text('{"eos_token_id": 2}')
  (language_model / official_layout.TOKENIZER_MODEL).write_bytes(WORDS)
  if heads:
    (folder / "variant_config.json").write_text(json.dumps({"heads": heads}))
  return folder


def write_llama(folder, config=LLAMA, tensors=None, **config_fields):
  """Writes a plain Hugging Face LLaMA folder and returns it."""
  save(folder / "pytorch_model.bin", tensors or random_llama(config))
  (folder / "config.json").write_bytes(config_json(config, **config_fields))
  (folder / official_layout.TOKENIZER_MODEL).write_bytes(WORDS)
  return folder


def flatten(tree):
  """Returns {path with slashes: leaf} of nested dicts."""
  return traverse_util.flatten_dict(tree, sep="/")


def load(path):
  """Returns the torch tensors of a .bin file."""
  return torch.load(path, weights_only=True)


def _bits(tensor):
  """Returns a tensor as integers, which are equal only bit for bit."""
  kinds = {2: torch.int16, 4: torch.int32}
  return tensor.contiguous().view(kinds[tensor.element_size()])


def assert_same_state(found, wanted):
  """Checks that two state_dicts have the same names, dtypes and bits."""
  assert set(found) == set(wanted)
  for name, value in wanted.items():
    assert found[name].dtype == value.dtype, name
    assert found[name].shape == value.shape, name
    assert torch.equal(_bits(found[name]), _bits(value)), name
