"""Networks that train a small vision encoder from scratch, then are dropped.

LaVIT starts from EVA-CLIP, which is pretrained by masked image modelling and
image-text contrast. Its weights do not ship with this package, so the stage
`encoder` trains a small ViT with the same two losses, and with captions
predicted from its patch features, from which short trainings learn shapes
(CapPa, Tschannen et al., arXiv 2306.07915). Only the ViT is kept.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import layers, llama
from lavit_jax.models.encoder import vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
  """Sizes of the ViT, which is kept, and of text networks, which are not.

  Attributes:
    vit: the encoder.
    text: the text tower of the contrast.
    captioner: the decoder of captions, which reads patch features.
    embed_dim: E, width in which images and texts are compared.
  """

  vit: vision.ViTConfig
  text: llama.LlamaConfig
  captioner: llama.LlamaConfig
  embed_dim: int = 64


class Contrastive(nn.Module):
  """ViT, text tower, captioner, contrastive heads and a linear pixel head."""

  config: ContrastiveConfig

  def setup(self) -> None:
    config = self.config
    init = layers.LECUN_NORMAL
    self.vit = vision.EvaVit(config.vit)
    self.text = llama.Llama(config.text)
    self.captioner = llama.Llama(config.captioner)
    self.caption_norm = layers.LayerNorm(1e-6)
    self.caption_in = nn.Dense(
      config.captioner.width,
      dtype=jnp.dtype(config.captioner.dtype),
      kernel_init=layers.partitioned(init, ("embed", None)),
      bias_init=layers.partitioned(nn.initializers.zeros, ("norm",)),
    )
    self.image_norm = layers.LayerNorm(1e-6)
    self.image_head = nn.Dense(
      config.embed_dim,
      dtype=jnp.dtype(config.vit.dtype),
      use_bias=False,
      kernel_init=layers.partitioned(init, ("embed", "code_dim")),
    )
    self.text_head = nn.Dense(
      config.embed_dim,
      dtype=jnp.dtype(config.text.dtype),
      use_bias=False,
      kernel_init=layers.partitioned(init, ("embed", "code_dim")),
    )
    self.pixel_head = nn.Dense(
      3 * config.vit.patch_size**2,
      dtype=jnp.dtype(config.vit.dtype),
      kernel_init=layers.partitioned(init, ("embed", "patch")),
      bias_init=layers.partitioned(nn.initializers.zeros, ("patch",)),
    )
    self.log_scale = self.param(
      "log_scale",
      layers.partitioned(nn.initializers.constant(2.66), ()),
      (),
    )

  def __call__(
    self,
    pixels: jax.Array,
    tokens: jax.Array,
    text_mask: jax.Array,
    patch_mask: jax.Array,
  ) -> dict[str, jax.Array]:
    """Computes the inputs of all losses of the stage `encoder`.

    Args:
      pixels: float[B, H, W, 3], CLIP-normalised.
      tokens: int[B, T] caption tokens, right padded.
      text_mask: bool[B, T], True where there is a token.
      patch_mask: bool[B, N], True where the patch is hidden from the ViT.

    Returns:
      `image` and `text` float32[B, E] of unit norm, `features` float[B, N, D],
      predicted pixels `patches` float[B, N, P*P*3], `scale` float[] of the
      contrast, logits `caption` float32[B, T, V].
    """
    features = self.vit(pixels, with_cls=True, patch_mask=patch_mask)[:, 1:]
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
    """Returns logits of each token, from the patches and earlier tokens."""
    num = features.shape[1]
    patches = self.caption_in(self.caption_norm(features))
    text = self.captioner.embed(tokens[:, :-1])
    x = jnp.concatenate([patches, text], axis=1)  # [B, N + T - 1, W]
    x, _ = self.captioner.hidden(x, None, None, None, None)
    return self.captioner.logits(x[:, num - 1 :])
