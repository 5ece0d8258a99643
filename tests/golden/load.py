"""Recorded numbers of the official code, and its weights as our variables."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.port.tables import names

ROOT = pathlib.Path(__file__).parent
VARIANT = ROOT / "a"
CONFIG = json.loads((VARIANT / "variant_config.json").read_text())

_FILES = {
  "encoder": ("eva_vitg_psz14", names.ENCODER),
  "tokenizer": ("tokenizer_encoder", names.TOKENIZER),
  "understanding": ("visual_weight", names.UNDERSTANDING),
  "lowres": ("tokenizer_decoder", names.LOWRES),
  "highres": ("highres_tokenizer_decoder", names.HIGHRES),
}


def arrays(name: str) -> dict[str, np.ndarray]:
  """The arrays of one recorded file."""
  with np.load(VARIANT / f"{name}.npz") as file:
    return dict(file)


def official(name: str) -> dict[str, np.ndarray]:
  """The official tensors of one of `_FILES`, by official name."""
  return arrays(f"weights_{_FILES[name][0]}")


@functools.cache
def variables(name: str):
  """The same as our tree of arrays."""
  tree = names.to_flax(_FILES[name][1], official(name))
  return jax.tree.map(jnp.asarray, tree)


def model_config(llm_width: int = CONFIG["llm_hidden"]):
  """TokenizerConfig of the recorded variant."""
  c = CONFIG
  width, heads = c["width"], c["heads"]
  sizes = {
    "width": width,
    "num_heads": heads,
    "mlp_dim": int(width * c["mlp_ratio"]),
  }
  return tokenizer.TokenizerConfig(
    vit=vision.ViTConfig(
      image_size=c["img"],
      patch_size=c["patch"],
      depth=c["eva_layers"],
      head_dim_out=c["eva_head_dim"],
      **sizes,
    ),
    selector=selector.SelectorConfig(width=width),
    merger=merger.MergerConfig(depth=c["merger_layers"], **sizes),
    quantizer=quantizer.QuantizerConfig(
      width=width, num_codes=c["n_code"], code_dim=c["code_dim"]
    ),
    decoder=decoder.DecoderConfig(
      depth=c["dec_layers"],
      num_patches=(c["img"] // c["patch"]) ** 2,
      code_dim=c["code_dim"],
      out_dim=width,
      **sizes,
    ),
    merger_form="reference",
    llm_width=llm_width,
  )


def error(ours, theirs) -> float:
  """Largest difference over the largest value, the measure of parity."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def pixels(recorded: np.ndarray) -> jnp.ndarray:
  """Recorded NCHW images as NHWC."""
  return jnp.asarray(recorded.transpose(0, 2, 3, 1))
