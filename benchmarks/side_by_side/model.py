"""Makes the model that both sides run: random weights, ours and exported.

In the folder afterwards: `model/`, a model directory; `hf/`, what `lavit port
export --format huggingface` makes of it; `sizes.json`, what they were made of.
"""

import dataclasses
import json
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors, image_io, vocabulary
from lavit_jax.core.storage import checkpoints
from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.port import exporting
from side_by_side import cases

_SEED = 0
_IMAGES = 8  # over which the selector is set to keep a third
_DECISIVE = 4.0  # spread of log p(keep) - log p(drop) over patches
_MLP_RATIO = 4


def make(folder, sizes: cases.Sizes) -> dict[str, int]:
  """Makes what is missing in the folder; parameters of each part.

  Raises:
    errors.UsageError: the folder holds a model of other sizes.
  """
  folder = pathlib.Path(folder)
  path = folder / "sizes.json"
  wanted = dataclasses.asdict(sizes)
  if path.exists() and json.loads(path.read_text())["sizes"] != wanted:
    raise errors.UsageError(
      f"{folder} holds the model of another benchmark: {path} has other sizes."
      " Give another --workdir."
    )
  if not path.exists():
    counts = _save(folder / "model", sizes)
    shutil.rmtree(folder / "hf", ignore_errors=True)
    exporting.run(
      folder / "model", folder / "hf", format="huggingface", quiet=True
    )
    content = {"sizes": wanted, "parameters": counts}
    path.write_text(json.dumps(content, indent=1) + "\n")
  return json.loads(path.read_text())["parameters"]


def _save(model, sizes):
  """Writes the three parts and a text tokenizer; parameters of each."""
  visual = tokenizer_config(sizes)
  keys = jax.random.split(jax.random.key(_SEED), 3)
  encoder = _init(vision.EvaVit(visual.vit), keys[0], _pixels(sizes, 1))
  stage1 = _tokenizer(sizes, visual, keys[1], encoder["params"])
  config = llama_config(sizes)
  llm = _init(llama.Llama(config), keys[2], jnp.zeros((1, 2), jnp.int32))
  vocab = dataclasses.asdict(sizes.vocabulary)
  parts = {
    "encoder": (encoder["params"], {"vit": dataclasses.asdict(visual.vit)}),
    "tokenizer": (stage1, {"tokenizer": dataclasses.asdict(visual)}),
    "llm": (
      {"llm": llm["params"]},
      {"llama": dataclasses.asdict(config), "vocabulary": vocab},
    ),
  }
  for name, (params, meta) in parts.items():
    checkpoints.save_part(model, name, params, meta)
  # The export wants one; nothing here reads or writes text.
  weights = pathlib.Path(vocabulary.__file__).parent / "weights"
  shutil.copy(weights / "tiny" / "tokenizer.model", model / "tokenizer.model")
  return {
    name: checkpoints.count_params(params)
    for name, (params, _) in parts.items()
  }


def llama_config(sizes: cases.Sizes) -> llama.LlamaConfig:
  """The language model, with the fields that an import would give it."""
  return llama.LlamaConfig(
    vocab_size=sizes.vocabulary.size,
    width=sizes.width,
    depth=sizes.depth,
    num_heads=sizes.num_heads,
    num_kv_heads=sizes.num_heads,
    mlp_dim=sizes.mlp_dim,
  )


def tokenizer_config(sizes: cases.Sizes) -> tokenizer.TokenizerConfig:
  """Encoder and tokenizer; the decoder is named and not made."""
  width, hidden = sizes.vit_width, _MLP_RATIO * sizes.vit_width
  shared = {"width": width, "num_heads": sizes.vit_heads, "mlp_dim": hidden}
  vit = vision.ViTConfig(
    image_size=sizes.image_size,
    patch_size=sizes.patch_size,
    depth=sizes.vit_depth,
    **shared,
  )
  codes = {"code_dim": cases.CODE_DIM}
  return tokenizer.TokenizerConfig(
    vit=vit,
    selector=selector.SelectorConfig(width=width),
    merger=merger.MergerConfig(depth=sizes.merger_depth, **shared),
    quantizer=quantizer.QuantizerConfig(
      width=width, num_codes=sizes.num_codes, **codes
    ),
    decoder=decoder.DecoderConfig(
      depth=1,
      num_patches=vit.num_patches,
      out_dim=width,
      **shared,
      **codes,
    ),
    merger_form="reference",
  )


def _init(module, key, *args):
  return nn.meta.unbox(jax.jit(module.init)(key, *args))


def _pixels(sizes, batch):
  return jnp.asarray(image_io.normalize(cases.images(sizes, batch)))


def _tokenizer(sizes, config, key, encoder):
  """Variables whose selector keeps a third of the patches, some more."""
  features = jax.jit(tokenizer.encode_images, static_argnums=0)(
    config, encoder, _pixels(sizes, _IMAGES)
  )
  model = tokenizer.DynamicVisualTokenizer(config)
  mask = jnp.ones(features.shape[:2])
  variables = _init(model, key, features[:1], mask[:1])
  del variables["params"]["decoder"]
  net = selector.TokenSelector(config.selector)
  params = variables["params"]["selector"]
  log_probs = np.asarray(net.apply({"params": params}, features))
  margin = log_probs[..., 0] - log_probs[..., 1]
  scale = _DECISIVE / margin.std()
  highest = np.quantile(scale * margin, 1.0 - cases.SHARE_KEPT)
  last = params["fc3"]
  last["kernel"] = scale * last["kernel"]
  last["bias"] = jnp.asarray([-highest, 0.0], jnp.float32)
  return {
    "params": variables["params"],
    "codebook": {"codes": variables["codebook"]["codes"]},
  }
