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

from lavit_jax import errors, images
from lavit_jax.models import contrastive, llama, vision
from lavit_jax.train.objectives import base


class EncoderObjective(base.Objective):
  """Trains a `vision.EvaVit` from pictures and captions."""

  part = "encoder"
  best_metric = "loss"
  best_mode = "min"

  def __init__(self, config, where=None):
    super().__init__(config, where)
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
    """Pictures with captions."""
    return self.image_shapes(self.config.data.text_length)

  def weight(self, batch):
    """ConfigError: contrast within parts of a batch is another loss."""
    raise errors.ConfigError(
      f"config.accumulate={self.config.accumulate}: the encoder's contrast is"
      " among all pictures of a batch, so it cannot be run in parts. Set it to"
      " 1, and a smaller config.batch_size or remat."
    )

  def loss(self, phase, params, frozen, state, batch, rng):
    """Contrast + captions + pixels of every patch, hidden too + whitening."""
    del frozen
    vit = self.model_config.vit
    pixels = images.normalize(batch["image"])
    shape = (pixels.shape[0], vit.num_patches)
    hidden = jax.random.uniform(rng, shape) < phase["mask_share"]
    out = self.model.apply(
      {"params": params},
      pixels,
      batch["text"],
      batch["text_mask"],
      hidden,
    )
    valid = batch["valid"]
    contrast, accuracy = contrast_loss(out, valid)
    target = vision.patchify(pixels, vit.patch_size)
    error = jnp.square(out["patches"] - target).mean((1, 2))
    pixel = (error * valid).sum() / jnp.maximum(valid.sum(), 1.0)
    white = whitening_loss(out["features"])
    caption = caption_loss(out["caption"], batch)
    loss = (
      phase["contrast_weight"] * contrast
      + phase["caption_weight"] * caption
      + phase["pixel_weight"] * pixel
      + phase["whitening_weight"] * white
    )
    metrics = {
      "caption": caption,
      "contrast": contrast,
      "retrieval": accuracy,
      "pixel_mse": pixel,
      "whitening": white,
    }
    return loss, (state, metrics)

  def held_out_metrics(self, params, frozen, state, batch):
    """The loss with nothing hidden, and retrieval within a batch."""
    phase = dict(self.last_phase) | {"mask_share": 0.0}
    rng = jax.random.key(0)
    loss, (_, metrics) = self.loss(phase, params, frozen, state, batch, rng)
    return metrics | {"loss": loss}

  def export(self, params, state):
    """The ViT alone; towers and heads have served."""
    return params["vit"], {"vit": dataclasses.asdict(self.model_config.vit)}


def contrast_loss(out, valid):
  """Symmetric InfoNCE over the global batch; returns loss and accuracy."""
  logits = out["scale"] * out["image"] @ out["text"].T  # [B, B]
  logits = jnp.where(valid[None, :] > 0, logits, -1e9)
  labels = jnp.arange(logits.shape[0])
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  both = cross_entropy(logits, labels) + cross_entropy(logits.T, labels)
  count = jnp.maximum(valid.sum(), 1.0)
  hits = (jnp.argmax(logits, axis=1) == labels) * valid
  return (0.5 * both * valid).sum() / count, hits.sum() / count


def caption_loss(logits, batch):
  """Mean nll of the caption tokens."""
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["text"])
  weights = batch["text_mask"] * batch["valid"][:, None]
  return (nll * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def whitening_loss(features):
  """How far float[B, N, D] features are from white round each position's mean.

  Mean squared entry of (covariance - identity) over batch and patches, plus
  the squared channel means (VICReg's variance and covariance terms, Bardes et
  al. 2022, with both sides of the variance).
  """
  width = features.shape[-1]
  centred = features - features.mean(0, keepdims=True)
  flat = centred.reshape(-1, width).astype(jnp.float32)
  covariance = flat.T @ flat / flat.shape[0]
  excess = jnp.square(covariance - jnp.eye(width)).sum() / width
  return excess + jnp.square(features.mean((0, 1))).mean()
