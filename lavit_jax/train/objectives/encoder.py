"""Stage `encoder`: image-text contrast, captions and masked patches.

It exists because no pretrained encoder can ship with the project: EVA-CLIP's
two training signals, at small size, and captions read off the patches (see
models/encoder/contrastive.py). A whitening term keeps the feature directions
comparable in variance; without it position and layout dominate the cosine that
the tokenizer is trained on, and colour and shape are lost in it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from lavit_jax.core import averages, errors, image_io
from lavit_jax.models import llama
from lavit_jax.models.encoder import contrastive, vision
from lavit_jax.train import losses, phases
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import abstract_params, precision
from lavit_jax.train.objectives.frozen import artifacts as artifacts_lib

_COUNTED_BY = {  # metric: the sum that counts what it is a mean over
  "contrast": "pairs",
  "retrieval": "pairs",
  "caption": "words",
  "pixel_mse": "images",
  "whitening": "images",
}


class EncoderObjective(base.Objective):
  """Trains a `vision.EvaVit` on images and captions.

  A phase has the settings `mask_share` and `contrast_weight`, `caption_weight`,
  `pixel_weight`, `whitening_weight`.
  """

  part = "encoder"
  best_metric = "loss"
  best_mode = "min"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    artifacts: artifacts_lib.Artifacts | None = None,
  ):
    super().__init__(config, artifacts)
    precision.applied(config)  # the stage reads no network
    if config.data.image_size != config.model.vit.image_size:
      raise errors.ConfigError(
        f"config.data.image_size={config.data.image_size}, but the encoder is"
        f" made for config.model.vit.image_size={config.model.vit.image_size}."
        " Set both to the same number of pixels."
      )
    text = self.artifacts.text_tokenizer(config, self.source)
    vocab = {"vocab_size": text.size}
    self.model_config = contrastive.ContrastiveConfig(
      vit=vision.ViTConfig(**config.model.vit),
      text=llama.LlamaConfig(**config.model.text.to_dict() | vocab),
      captioner=llama.LlamaConfig(**config.model.captioner.to_dict() | vocab),
      embed_dim=config.model.embed_dim,
    )
    self.model = contrastive.Contrastive(self.model_config)
    self._train_data, self._held_out_data = self.artifacts.image_batches(
      config, (self.source, self.held_out), text, config.data.text_length
    )

  def init(self, rng: jax.Array) -> tuple[base.Params, base.Extra]:
    """Draws the parameters of towers and heads; extra is empty."""
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

  def provenance(self) -> dict[str, str]:
    """Returns data and text tokenizer."""
    text = self.artifacts.text_provenance(self.config)
    return super().provenance() | text

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns images with captions."""
    return abstract_params.image_batch(
      self.config, self.config.data.text_length
    )

  def draws(
    self, phase: phases.Phase, batch: base.Batch, rng: jax.Array
  ) -> base.Draws:
    """Draws which patches are hidden from the ViT."""
    shape = (len(batch["image"]), self.model_config.vit.num_patches)
    return {"hidden": jax.random.uniform(rng, shape) < phase["mask_share"]}

  def nonlinear_sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> base.Sums:
    """Raises ConfigError: contrast within parts of a batch is another loss."""
    raise errors.ConfigError(
      f"config.accumulate={self.config.accumulate}: the encoder's contrast is"
      " among all images of a batch, so it cannot be run in parts. Set it to"
      " 1, and use a smaller config.batch_size or remat."
    )

  def sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> tuple[base.Sums, base.Stats]:
    """Computes each term of a whole batch; parts of it would not add up."""
    del phase, frozen, extra
    pixels, valid = image_io.normalize(batch["image"]), batch["valid"]
    out: Any = self.model.apply(
      {"params": params},
      pixels,
      batch["text"],
      batch["text_mask"],
      draws["hidden"],
    )
    pairs = valid * batch["text_mask"].any(-1)
    contrast, accuracy = losses.contrast_loss(
      out["image"], out["text"], out["scale"], pairs
    )
    target = vision.patchify(pixels, self.model_config.vit.patch_size)
    words = batch["text_mask"] * valid[:, None]
    return {
      "contrast": contrast,
      "retrieval": accuracy,
      "pairs": pairs.sum(),
      "pixel_mse": losses.pixel_loss(out["patches"], target, valid),
      "whitening": losses.whitening_loss(out["features"], valid),
      "images": valid.sum(),
      "caption": losses.caption_loss(out["caption"], batch["text"], words),
      "words": words.sum(),
    }, {}

  def combine(
    self, phase: phases.Phase, sums: base.Sums
  ) -> tuple[jax.Array, averages.Metrics]:
    """Weighs contrast, captions, pixels of every patch, and whitening."""
    loss = (
      phase["contrast_weight"] * sums["contrast"]
      + phase["caption_weight"] * sums["caption"]
      + phase["pixel_weight"] * sums["pixel_mse"]
      + phase["whitening_weight"] * sums["whitening"]
    )
    mean = lambda value, count: averages.mean(value * sums[count], sums[count])
    metrics: averages.Metrics = {
      name: mean(sums[name], count) for name, count in _COUNTED_BY.items()
    }
    return loss, metrics | {"loss": mean(loss, "images")}

  def held_out_metrics(
    self,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
  ) -> dict[str, Any]:
    """Computes the loss with no patch hidden, and retrieval within a batch."""
    phase = self.last_phase.with_settings(mask_share=0.0)
    rng = jax.random.key(0)
    return self.loss(phase, params, frozen, extra, batch, rng)[1][1]

  def export(
    self, params: base.Params, extra: base.Extra
  ) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns the ViT alone: towers and heads are for training only."""
    meta = {"vit": dataclasses.asdict(self.model_config.vit)}
    return {self.part: (params["vit"], meta)}
