"""The language model with the continuous branch by which it reads images."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import layers, llama
from lavit_jax.models.tokenizer import merger, tokenizer


class UnifiedModel(nn.Module):
  """LLaMA with the token merger and the projection that train with it.

  LaVIT, arXiv 2309.04669, section 3.2. An image that the model reads enters as
  continuous merged tokens; one that it generates is made of codes.

  Attributes:
    llama_config: of the language model.
    tokenizer_config: of the tokenizer that the merger belongs to.
    capacity: K, merged tokens per image.
  """

  llama_config: llama.LlamaConfig
  tokenizer_config: tokenizer.TokenizerConfig
  capacity: int

  def setup(self) -> None:
    self.llm = llama.Llama(self.llama_config)
    self.merger = merger.TokenMerger(self.tokenizer_config.merger)
    init = layers.LECUN_NORMAL
    self.projection = nn.Dense(
      self.llama_config.width,
      dtype=jnp.dtype(self.tokenizer_config.merger.dtype),
      kernel_init=layers.partitioned(init, (None, "embed")),
      bias_init=layers.partitioned(nn.initializers.zeros, ("norm",)),
    )

  def read(
    self, features: jax.Array, keep: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the continuous tokens of images.

    Args:
      features: float[B, N, D] of the frozen encoder.
      keep: bool[B, N], True for kept patches.

    Returns:
      Projected tokens float[B, K, W], and valid bool[B, K]. K is the model's
      capacity; kept patches beyond it are cut.
    """
    tokens, valid, _ = self.merger.merge_kept(
      features, keep, self.capacity, form=self.tokenizer_config.merger_form
    )
    return self.projection(tokens), valid

  def __call__(
    self,
    tokens: jax.Array,
    *,
    features: jax.Array,
    keep: jax.Array,
    image_index: jax.Array,
    token_index: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
  ) -> jax.Array:
    """Computes the hidden states of packed rows.

    Args:
      tokens: int[B, L] ids.
      features: float[B, S, N, D] of the S images that a row reads.
      keep: bool[B, S, N], their kept patches.
      image_index: int[B, L], the image whose token a position reads, -1 for
        none.
      token_index: int[B, L], the number of that token among the image's.
      positions: int[B, L] within each document.
      segments: int[B, L], 0 for padding.

    Returns:
      float[B, L, W] after the last norm.
    """
    images = keep.shape[1]
    flat = lambda x: einops.rearrange(x, "b s ... -> (b s) ...")
    read, _ = self.read(flat(features), flat(keep))
    read = einops.rearrange(read, "(b s) k w -> b (s k) w", s=images)
    index = jnp.maximum(image_index, 0) * self.capacity + token_index
    index = jnp.minimum(index, images * self.capacity - 1)
    embeds = jnp.take_along_axis(read, index[..., None], axis=1)  # [B, L, W]
    return self.llm(
      tokens,
      embeds=embeds,
      use_embeds=image_index >= 0,
      positions=positions,
      segment_ids=segments,
      return_hidden=True,
    )
