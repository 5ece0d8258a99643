"""What trains a small vision encoder from nothing, and is then thrown away.

LaVIT starts from EVA-CLIP, which is pretrained by masked image modelling and
image-text contrast. No such weights can ship here, so the `encoder` stage
trains a small ViT on the same two signals; the heads below live in that stage
alone.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lavit_jax.models import layers, llama, vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
  """The ViT that is kept, and the text tower and heads that are not."""

  vit: vision.ViTConfig
  text: llama.LlamaConfig
  embed_dim: int = 64


class Contrastive(nn.Module):
  """ViT, text tower, contrastive heads and a linear pixel head."""

  config: ContrastiveConfig

  def setup(self):
    config = self.config
    init = nn.initializers.lecun_normal()
    self.vit = vision.EvaVit(config.vit)
    self.text = llama.Llama(config.text)
    self.image_norm = layers.LayerNorm(1e-6)
    self.image_head = nn.Dense(
      config.embed_dim,
      use_bias=False,
      kernel_init=nn.with_logical_partitioning(init, ("embed", "code_dim")),
    )
    self.text_head = nn.Dense(
      config.embed_dim,
      use_bias=False,
      kernel_init=nn.with_logical_partitioning(init, ("embed", "code_dim")),
    )
    self.pixel_head = nn.Dense(
      3 * config.vit.patch_size**2,
      kernel_init=nn.with_logical_partitioning(init, ("embed", "patch")),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("patch",)),
    )
    self.log_scale = self.param(
      "log_scale",
      nn.with_logical_partitioning(nn.initializers.constant(2.66), ()),
      (),
    )

  def __call__(self, pixels, tokens, text_mask, patch_mask):
    """Both embeddings, the features, and the patches' predicted pixels.

    Args:
      pixels: float[B, H, W, 3], CLIP-normalised.
      tokens: int[B, T] caption tokens, right padded.
      text_mask: bool[B, T], True where there is a token.
      patch_mask: bool[B, N], True where the patch is hidden from the ViT.

    Returns:
      dict: `image` float[B, E] and `text` float[B, E] of unit norm, `features`
      float[B, N, D], `patches` float[B, N, P*P*3], `scale` float[].
    """
    both = self.vit(pixels, with_cls=True, patch_mask=patch_mask)
    features = both[:, 1:]
    image = self.image_head(self.image_norm(both[:, 0]))
    hidden = self.text(tokens, return_hidden=True)  # [B, T, D]
    last = jnp.maximum(text_mask.sum(-1) - 1, 0)
    text = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return {
      "image": layers.l2_normalize(image),
      "text": layers.l2_normalize(self.text_head(text)),
      "features": features,
      "patches": self.pixel_head(features),
      "scale": jnp.exp(jnp.minimum(self.log_scale, jnp.log(100.0))),
    }
