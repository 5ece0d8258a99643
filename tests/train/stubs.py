"""Networks of a few products in place of a stage's own, row by row.

What a stage makes of its networks, its losses, draws and sums, is then a
program that compiles in a second.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import image_io
from lavit_jax.diffusion import denoising
from lavit_jax.models import layers
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import merger, quantizer
from tests.train import outlines

WIDTH = 8
CODES, DIM = 24, 6


def _boxed(**shapes):
  """Parameters with axes, as a module's `init` gives them."""
  rng = np.random.default_rng(3)
  draw = lambda shape: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)
  axes = ("embed", "mlp")
  return {
    name: nn.LogicallyPartitioned(draw(shape), axes[: len(shape)])
    for name, shape in shapes.items()
  }


class Tokenizer:
  """Has the methods of `tokenizer.DynamicVisualTokenizer` that a loss calls."""

  @staticmethod
  def init(grid):
    """Boxed parameters for so many patches."""
    return _boxed(
      selector=(WIDTH, 2),
      merger=(WIDTH, WIDTH),
      quantizer=(WIDTH, DIM),
      decoder=(DIM, WIDTH),
      place=(grid, WIDTH),
    )

  def apply(self, variables, *args, method):
    """As of a Linen module."""
    return getattr(self, method)(variables["params"], *args)

  def select(self, params, features):
    """Log probabilities float[B, N, 2]."""
    return jax.nn.log_softmax(features @ params["selector"])

  def merge(self, params, features, mask):
    """All positions; gradient reaches the mask."""
    around = (features * mask[..., None]).mean(1, keepdims=True)
    return (features + around) @ params["merger"]

  def merge_compact(self, params, features, keep, capacity):
    """Kept tokens, gathered."""
    merged = self.merge(params, features, keep.astype(jnp.float32))
    return merger.gather_kept(merged, keep, capacity)

  def project(self, params, tokens):
    """Unit vectors."""
    return layers.l2_normalize(tokens @ params["quantizer"])

  def decode_soft(self, params, vectors, mask):
    """Features of all patches from the kept vectors."""
    count = jnp.maximum(mask.sum(1), 1.0)[:, None, None]
    mean = (vectors * mask[..., None]).sum(1, keepdims=True) / count
    return mean @ params["decoder"] + params["place"]

  def decode(self, params, vectors, valid):
    """The same of gathered vectors."""
    return self.decode_soft(params, vectors, valid.astype(jnp.float32))


def tokenizer(**updates):
  """The objective of stage `tokenizer` with these networks."""
  objective = outlines.build("tokenizer", **updates)
  grid, patch = objective.model_config.num_patches, 8
  objective.model = Tokenizer()

  def features(encoder, image):
    x = vision.patchify(image_io.normalize(image), patch)
    return jax.lax.stop_gradient(x @ encoder["kernel"])

  objective._features = features
  frozen = {"encoder": {"kernel": jnp.zeros((3 * patch**2, WIDTH))}}
  objective.load_frozen = lambda: frozen
  codes = quantizer.init_stats(jax.random.key(0), CODES, DIM)
  extra = {"codebook": codes, "feature_mean": jnp.zeros((grid, WIDTH))}
  objective.init = lambda _: (Tokenizer.init(grid), extra)
  return objective


class _Apply:
  """A function of (parameters, ...) as a module."""

  def __init__(self, function):
    self.function = function

  def apply(self, variables, *args, **kwargs):
    """As of a Linen module."""
    return self.function(variables["params"], *args, **kwargs)


def _denoise(params, z, t, condition, drop=False):
  """Depends on all that it is given."""
  wide = lambda x: x.reshape(-1, *(1,) * (z.ndim - 1))
  condition = wide(jnp.where(drop, 0.0, condition.mean((1, 2))))
  return z * params["z"][0] + (condition + 1e-3 * wide(t)) * params["cond"][0]


def _denoise_latents(params, z, t, *, condition, **rest):
  for name in sorted(rest):
    if name != "condition_mask":
      mean = rest[name].reshape(len(z), -1).mean(1)
      condition = condition + mean[:, None, None]
  return _denoise(params, z, t, condition)


def with_small_unet(objective):
  """The objective of stage `latents`, its U-Net one of two numbers."""
  real = objective.init
  params = _boxed(z=(1,), cond=(1,))

  def init(rng):
    made, _ = real(rng)
    made = made | {"unet": params}
    return made, denoising.start_ema(made)

  objective.init = init
  objective.unet = _Latents(objective.unet)
  return objective


def pixels(**updates):
  """The objective of stage `pixels` with a U-Net of two numbers."""
  objective = outlines.build("pixels", **updates)
  objective.decoder = _Apply(_denoise)
  objective.features = lambda frozen, image: (
    image_io.normalize(image).reshape(len(image), 36, -1) * frozen["x"]
  )
  objective.load_frozen = lambda: {"x": jnp.zeros(())}
  params = _boxed(z=(1,), cond=(1,))
  extra = {"ema": params, "updates": jnp.zeros((), jnp.int32)}
  objective.init = lambda _: (params, extra)
  return objective


def _vae(params, x, method):
  if method == "decode":
    return x * params["up"][0]
  return x * params["down"][0], x * params["down"][1]


def autoencoder(**updates):
  """The objective of stage `autoencoder` with one of a few numbers."""
  objective = outlines.build("autoencoder", **updates)
  objective.vae = _Apply(_vae)
  params = _boxed(up=(1,), down=(2,))
  extra = {"mean": jnp.zeros(()), "square": jnp.ones(())}
  objective.init = lambda _: (params, extra)
  return objective


def _language(params, tokens, *, features, image_index, **rest):
  """Hidden states of a row; what is read is added where it enters."""
  del rest
  read = (features.mean((1, 2, 3)) * params["merger"]["w"][0])[:, None]
  llm = params["llm"]
  hidden = jnp.take(llm["embedding"], tokens, axis=0)
  return jnp.where(image_index >= 0, read, 1.0)[..., None] * hidden


class _Latents(_Apply):
  """In place of a U-Net: `config` and `init` stay."""

  def __init__(self, net):
    super().__init__(_denoise_latents)
    self.config, self.init = net.config, net.init


class _WithLora(_Apply):
  def apply(self, variables, *args, **kwargs):
    """The sum of the changes is added."""
    out = super().apply(variables, *args, **kwargs)
    low = jax.tree.leaves(variables.get("lora", {}))
    return out + sum(x.mean() for x in low)


def pretrain(*, lora=False, **updates):
  """The objective of stage `pretrain` with an LLM that looks ids up."""
  if lora:
    updates["model__lora"] = {"rank": 2, "alpha": 4.0}
    updates["optimizer__groups"] = {"lora": 1.0, "visual": 1.0}
    updates["phases__train__train"] = {"lora": "lora", "merger": "visual"}
  objective = outlines.build("pretrain", **updates)
  objective.model = _WithLora(_language)
  shape = (objective.vocabulary.padded_size, WIDTH)
  llm = _boxed(embedding=shape, head=shape)
  params = {"merger": _boxed(w=(1,)), "projection": _boxed(w=(1,))}
  frozen = {"encoder": {"kernel": jnp.zeros((3, 4))}}
  objective.load_frozen = lambda: frozen
  objective._features = lambda encoder, pixels: (
    (pixels / 255.0).mean(3) @ encoder["kernel"]
  )
  if lora:
    frozen["llm"] = nn.meta.unbox(llm)
    low = _boxed(a=(WIDTH, 2), b=(2, WIDTH))
    params["lora"] = {"query": low}
  else:
    params["llm"] = llm
  objective.init = lambda _: (params, {})
  return objective


def _contrast(params, pixels, text, text_mask, hidden):
  """What `contrastive.Contrastive` gives, row by row."""
  x = vision.patchify(pixels, 8)
  x = jnp.where(hidden[..., None], 0.0, x) @ params["vit"]  # [B, N, D]
  words = jnp.take(params["words"], text, axis=0) * text_mask[..., None]
  return {
    "caption": (x.mean(1, keepdims=True) + words) @ params["words"].T,
    "image": layers.l2_normalize(x.mean(1)),
    "text": layers.l2_normalize(words.sum(1) + 0.1),
    "features": x,
    "patches": x @ params["vit"].T,
    "scale": jnp.float32(5.0),
  }


def encoder(**updates):
  """The objective of stage `encoder` with towers of one product each."""
  objective = outlines.build("encoder", **updates)
  objective.model = _Apply(_contrast)
  params = _boxed(vit=(3 * 8**2, WIDTH), words=(outlines.TEXT, WIDTH))
  objective.init = lambda _: (params, {})
  return objective
