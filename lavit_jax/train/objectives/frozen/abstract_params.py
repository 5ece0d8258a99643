"""Networks as shapes with logical axes: what is laid out before it is read.

Every function gives the boxed, abstract parameters of one frozen network, as
`jax.eval_shape` of its `init` does, its floats in the dtype they are kept in.
"""

import jax
import jax.numpy as jnp

from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder, tokenizer
from lavit_jax.train.objectives.frozen import latent_parts


def boxed(init, *inputs, dtype="float32"):
  """What `init(rng, *zeros)` would give, floats in `dtype`.

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


def encoder(config: vision.ViTConfig, dtype="float32"):
  """Parameters of a `vision.EvaVit`."""
  side = config.image_size
  made = boxed(vision.EvaVit(config).init, (1, side, side, 3), dtype=dtype)
  return made["params"]


def words(config: tokenizer.TokenizerConfig):
  """`params` and `codebook` of a `tokenizer.DynamicVisualTokenizer`."""
  shape = (1, config.num_patches)
  model = tokenizer.DynamicVisualTokenizer(config)
  return boxed(model.init, (*shape, config.width), shape)


def llm(config: llama.LlamaConfig, dtype="float32"):
  """Parameters of a `llama.Llama`."""
  made = boxed(llama.Llama(config).init, ((1, 8), jnp.int32), dtype=dtype)
  return made["params"]


def conditioner(
  model: decoder.LowresDecoder | decoder.HighresDecoder, dtype="float32"
):
  """Parameters of a semantic decoder with its projections."""
  config = model.config
  shape = (1, config.num_patches)
  vectors = (*shape, config.code_dim)
  return boxed(model.init, vectors, (shape, bool), dtype=dtype)["params"]


def autoencoder(model: vae.AutoencoderKL):
  """Parameters of a `vae.AutoencoderKL`."""
  side = model.config.scale
  return boxed(model.init, (1, side, side, 3))["params"]


def denoiser(model: unet.UNet, dtype="float32"):
  """Parameters of a `unet.UNet`."""
  return boxed(lambda rng: latent_parts.init_unet(model, rng), dtype=dtype)
