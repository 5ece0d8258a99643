"""Shapes of frozen networks and batches, to lay them out before they are read.

A function named after a network returns its boxed, abstract parameters, as
`jax.eval_shape` of its `init` does, with floats in the dtype they are kept in.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder
from lavit_jax.models.tokenizer import tokenizer as tokenizer_lib
from lavit_jax.train.objectives.frozen import latent_parts

Shapes = TypeVar("Shapes", bound=Callable[..., Any])
Boxed: TypeAlias = Any  # nested dicts of boxed `jax.ShapeDtypeStruct`


def arrays(
  shapes: Mapping[str, tuple[tuple[int, ...], Any]],
) -> dict[str, jax.ShapeDtypeStruct]:
  """Maps {name: (shape, NumPy dtype)} to the abstract arrays that JAX sees."""
  return {
    name: jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))
    for name, (shape, dtype) in shapes.items()
  }


def image_batch(
  config: ml_collections.ConfigDict, text_length: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns a global batch of `Artifacts.image_batches`.

  Args:
    config: of the run.
    text_length: tokens of a caption; None for images alone.
  """
  count, side = config.batch_size, config.data.image_size
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {
    "image": ((count, side, side, 3), np.uint8),
    "valid": ((count,), np.float32),
    "index": ((count,), np.int64),
  }
  if text_length is not None:
    shapes["text"] = ((count, text_length), np.int32)
    shapes["text_mask"] = ((count, text_length), bool)
  return arrays(shapes)


def boxed(
  init: Callable[..., Any], *inputs: Any, dtype: str = "float32"
) -> Boxed:
  """Returns the shapes of `init(rng, *zeros)`, floats in `dtype`.

  Args:
    init: of a module.
    *inputs: shapes of its inputs; a pair (shape, dtype) where not float32.
    dtype: of the floats.
  """

  def make():
    zeros = [
      jnp.zeros(*x) if isinstance(x[0], tuple) else jnp.zeros(x) for x in inputs
    ]
    return init(jax.random.key(0), *zeros)

  def cast(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    kept = jnp.dtype(dtype) if floating else x.dtype
    return jax.ShapeDtypeStruct(x.shape, kept)

  return jax.tree.map(cast, jax.eval_shape(make))


def _once(shapes: Shapes) -> Shapes:
  """Has a network traced once: a run asks for the same shapes many times."""
  traced: Any = functools.lru_cache(maxsize=32)(shapes)

  @functools.wraps(shapes)
  def copied(*args: Any, **kwargs: Any) -> Boxed:
    # Callers may change the dicts that they get.
    return jax.tree.map(lambda x: x, traced(*args, **kwargs))

  return cast(Shapes, copied)


@_once
def encoder(config: vision.ViTConfig, dtype: str = "float32") -> Boxed:
  """Returns the parameters of a `vision.EvaVit`."""
  image = (1, config.image_size, config.image_size, 3)
  return boxed(vision.EvaVit(config).init, image, dtype=dtype)["params"]


@_once
def tokenizer(config: tokenizer_lib.TokenizerConfig) -> Boxed:
  """Returns `params` and `codebook` of a `DynamicVisualTokenizer`."""
  mask = (1, config.num_patches)
  model = tokenizer_lib.DynamicVisualTokenizer(config)
  return boxed(model.init, (*mask, config.width), mask)


@_once
def llm(config: llama.LlamaConfig, dtype: str = "float32") -> Boxed:
  """Returns the parameters of a `llama.Llama`."""
  tokens = ((1, 8), jnp.int32)
  return boxed(llama.Llama(config).init, tokens, dtype=dtype)["params"]


@_once
def conditioner(
  model: decoder.LowresDecoder | decoder.HighresDecoder, dtype: str = "float32"
) -> Boxed:
  """Returns the parameters of a semantic decoder with its projections."""
  mask = (1, model.config.num_patches)
  vectors = (*mask, model.config.code_dim)
  return boxed(model.init, vectors, (mask, bool), dtype=dtype)["params"]


@_once
def autoencoder(model: vae.AutoencoderKL) -> Boxed:
  """Returns the parameters of a `vae.AutoencoderKL`."""
  side = model.config.scale
  return boxed(model.init, (1, side, side, 3))["params"]


@_once
def denoiser(model: unet.UNet, dtype: str = "float32") -> Boxed:
  """Returns the parameters of a `unet.UNet`."""
  return boxed(lambda rng: latent_parts.init_unet(model, rng), dtype=dtype)
