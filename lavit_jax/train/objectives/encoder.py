"""Stage `encoder`: image-text contrast, captions and masked patches.

Exists because no pretrained encoder can ship with the project: EVA-CLIP's two
training signals, at small size, and captions read off the patches (see
models/contrastive.py). A whitening term keeps the feature directions
comparable in variance; without it position and layout own the cosine that the
tokenizer is trained on, and colour and shape are lost in it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from lavit_jax.core import averages, errors, image_io
from lavit_jax.models import llama
from lavit_jax.models.encoder import contrastive, vision
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import precision


class EncoderObjective(base.Objective):
  """Trains a `vision.EvaVit` from images and captions."""

  part = "encoder"
  best_metric = "loss"
  best_mode = "min"

  def __init__(self, config, where=None):
    super().__init__(config, where)
    precision.applied(config)  # it reads no network
    tokenizer = self.text_tokenizer()
    words = {"vocab_size": tokenizer.size}
    self.model_config = contrastive.ContrastiveConfig(
      vit=vision.ViTConfig(**config.model.vit),
      text=llama.LlamaConfig(**config.model.text.to_dict() | words),
      captioner=llama.LlamaConfig(**config.model.captioner.to_dict() | words),
      embed_dim=config.model.embed_dim,
    )
    self.model = contrastive.Contrastive(self.model_config)
    self.use_images(text=tokenizer, text_length=config.data.text_length)

  def init(self, rng):
    """Boxed parameters of towers and heads; no other state."""
    vit = self.model_config.vit
    size = vit.image_size
    variables = self.model.init(
      rng,
      jnp.zeros((1, size, size, 3)),
      jnp.zeros((1, self.config.data.text_length), jnp.int32),
      jnp.ones((1, self.config.data.text_length), bool),
      jnp.zeros((1, vit.num_patches), bool),
    )
    return variables["params"], {}

  def made_of(self):
    """Data and text tokenizer."""
    return super().made_of() | self.text_made_of()

  def batch_shapes(self):
    """Images with captions."""
    return self.image_shapes(self.config.data.text_length)

  def draws(self, phase, batch, rng):
    """Which patches are hidden from the ViT."""
    shape = (len(batch["image"]), self.model_config.vit.num_patches)
    return {"hidden": jax.random.uniform(rng, shape) < phase["mask_share"]}

  def norms(self, phase, params, frozen, state, batch, draws):
    """ConfigError: contrast within parts of a batch is another loss."""
    raise errors.ConfigError(
      f"config.accumulate={self.config.accumulate}: the encoder's contrast is"
      " among all images of a batch, so it cannot be run in parts. Set it to"
      " 1, and a smaller config.batch_size or remat."
    )

  def sums(self, phase, params, frozen, state, batch, draws):
    """Each term of a whole batch; they do not add up over parts of it."""
    del phase, frozen, state
    pixels, valid = image_io.normalize(batch["image"]), batch["valid"]
    out = self.model.apply(
      {"params": params},
      pixels,
      batch["text"],
      batch["text_mask"],
      draws["hidden"],
    )
    pairs = valid * batch["text_mask"].any(-1)
    contrast, accuracy = contrast_loss(out, pairs)
    target = vision.patchify(pixels, self.model_config.vit.patch_size)
    words = batch["text_mask"] * valid[:, None]
    return {
      "contrast": contrast,
      "retrieval": accuracy,
      "pairs": pairs.sum(),
      "pixel_mse": pixel_loss(out["patches"], target, valid),
      "whitening": whitening_loss(out["features"], valid),
      "images": valid.sum(),
      "caption": caption_loss(out["caption"], batch["text"], words),
      "words": words.sum(),
    }, {}

  def combine(self, phase, sums):
    """Contrast + captions + pixels of every patch, hidden too + whitening."""
    loss = (
      phase["contrast_weight"] * sums["contrast"]
      + phase["caption_weight"] * sums["caption"]
      + phase["pixel_weight"] * sums["pixel_mse"]
      + phase["whitening_weight"] * sums["whitening"]
    )
    weighed = lambda value, by: averages.mean(value * sums[by], sums[by])
    counts = {
      "contrast": "pairs",
      "retrieval": "pairs",
      "caption": "words",
      "pixel_mse": "images",
      "whitening": "images",
    }
    metrics = {name: weighed(sums[name], by) for name, by in counts.items()}
    return loss, metrics | {"loss": weighed(loss, "images")}

  def held_out_metrics(self, params, frozen, state, batch):
    """The loss with nothing hidden, and retrieval within a batch."""
    phase = dict(self.last_phase) | {"mask_share": 0.0}
    rng = jax.random.key(0)
    return self.loss(phase, params, frozen, state, batch, rng)[1][1]

  def export(self, params, state):
    """The ViT alone; towers and heads have served."""
    return params["vit"], {"vit": dataclasses.asdict(self.model_config.vit)}


def contrast_loss(out, pairs):
  """Symmetric InfoNCE over the pairs of a global batch.

  Args:
    out: `image` and `text` float[B, E] of unit norm, `scale` float[].
    pairs: float[B], 1 where there is an image with a caption, else 0: what is
      no pair is no negative of another either.

  Returns:
    (loss float[], share of images whose own text is the nearest float[]).
  """
  logits = out["scale"] * out["image"] @ out["text"].T  # [B, B]
  both = (pairs[:, None] > 0) & (pairs[None, :] > 0)
  logits = jnp.where(both, logits, -1e9)
  labels = jnp.arange(logits.shape[0])
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  total = cross_entropy(logits, labels) + cross_entropy(logits.T, labels)
  hits = (jnp.argmax(logits, axis=1) == labels) * pairs
  ratio, count = averages.ratio, pairs.sum()
  return ratio((0.5 * total * pairs).sum(), count), ratio(hits.sum(), count)


def caption_loss(logits, text, weights):
  """Mean nll of float[B, T, V] for int[B, T], weighted by float[B, T]."""
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, text)
  return averages.ratio((nll * weights).sum(), weights.sum())


def pixel_loss(patches, target, valid):
  """Mean squared error of float[B, N, P], images weighted by float[B]."""
  error = jnp.square(patches - target).mean((1, 2))
  return averages.ratio((error * valid).sum(), valid.sum())


def whitening_loss(features, valid):
  """How far float[B, N, D] features are from white round each position's mean.

  Mean squared entry of (covariance - identity) over batch and patches, plus
  the squared channel means (VICReg's variance and covariance terms, Bardes et
  al. 2022, with both sides of the variance). Images of which float[B] is 0
  are left out.
  """
  width = features.shape[-1]
  features = features.astype(jnp.float32)
  weights = valid[:, None, None]
  count = jnp.maximum(valid.sum(), 1.0)
  usual = (features * weights).sum(0) / count  # [N, D]
  flat = ((features - usual) * jnp.sqrt(weights)).reshape(-1, width)
  covariance = flat.T @ flat / (count * features.shape[1])
  excess = jnp.square(covariance - jnp.eye(width)).sum() / width
  return excess + jnp.square(usual.mean(0)).mean()
