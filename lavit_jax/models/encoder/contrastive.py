"""What trains a small vision encoder from nothing, and is then thrown away.

LaVIT starts from EVA-CLIP, which is pretrained by masked image modelling and
image-text contrast. No such weights can ship here, so the `encoder` stage
trains a small ViT on the same two signals, and on captions read off its patch
features, which makes short trainings see shapes (CapPa, Tschannen et al.,
2023). The heads below live in that stage alone.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lavit_jax.models import layers, llama
from lavit_jax.models.encoder import vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
  """The ViT that is kept, and the text networks and heads that are not."""

  vit: vision.ViTConfig
  text: llama.LlamaConfig
  captioner: llama.LlamaConfig
  embed_dim: int = 64


class Contrastive(nn.Module):
  """ViT, text tower, contrastive heads and a linear pixel head."""

  config: ContrastiveConfig

  def setup(self):
    config = self.config
    init = nn.initializers.lecun_normal()
    self.vit = vision.EvaVit(config.vit)
    self.text = llama.Llama(config.text)
    self.captioner = llama.Llama(config.captioner)
    self.caption_norm = layers.LayerNorm(1e-6)
    self.caption_in = nn.Dense(
      config.captioner.width,
      dtype=jnp.dtype(config.captioner.dtype),
      kernel_init=nn.with_logical_partitioning(init, ("embed", None)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
    )
    self.image_norm = layers.LayerNorm(1e-6)
    self.image_head = nn.Dense(
      config.embed_dim,
      dtype=jnp.dtype(config.vit.dtype),
      use_bias=False,
      kernel_init=nn.with_logical_partitioning(init, ("embed", "code_dim")),
    )
    self.text_head = nn.Dense(
      config.embed_dim,
      dtype=jnp.dtype(config.text.dtype),
      use_bias=False,
      kernel_init=nn.with_logical_partitioning(init, ("embed", "code_dim")),
    )
    self.pixel_head = nn.Dense(
      3 * config.vit.patch_size**2,
      dtype=jnp.dtype(config.vit.dtype),
      kernel_init=nn.with_logical_partitioning(init, ("embed", "patch")),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("patch",)),
    )
    self.log_scale = self.param(
      "log_scale",
      nn.with_logical_partitioning(nn.initializers.constant(2.66), ()),
      (),
    )

  def __call__(self, pixels, tokens, text_mask, patch_mask):
    """Both embeddings, features, predicted pixels, and the caption's logits.

    Args:
      pixels: float[B, H, W, 3], CLIP-normalised.
      tokens: int[B, T] caption tokens, right padded.
      text_mask: bool[B, T], True where there is a token.
      patch_mask: bool[B, N], True where the patch is hidden from the ViT.

    Returns:
      dict: `image` and `text` float32[B, E] of unit norm, `features`
      float[B, N, D], `patches` float[B, N, P*P*3], `scale` float[], `caption`
      float32[B, T, V].
    """
    both = self.vit(pixels, with_cls=True, patch_mask=patch_mask)
    features = both[:, 1:]
    image = self.image_head(self.image_norm(features.mean(1)))
    hidden = self.text(tokens, return_hidden=True)  # [B, T, D]
    last = jnp.maximum(text_mask.sum(-1) - 1, 0)
    text = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    text = self.text_head(text)
    return {
      "caption": self._caption(features, tokens),
      "image": layers.l2_normalize(image.astype(jnp.float32)),
      "text": layers.l2_normalize(text.astype(jnp.float32)),
      "features": features,
      "patches": self.pixel_head(features),
      "scale": jnp.exp(jnp.minimum(self.log_scale, jnp.log(100.0))),
    }

  def _caption(self, features, tokens):
    """Logits of every caption token, given the patches and those before it."""
    num = features.shape[1]
    patches = self.caption_in(self.caption_norm(features))
    words = self.captioner.embed(tokens[:, :-1])
    x = jnp.concatenate([patches, words], axis=1)  # [B, N + T - 1, W]
    x, _ = self.captioner.hidden(x, None, None, None, None)
    return self.captioner.logits(x[:, num - 1 :])
