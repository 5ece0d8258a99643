"""The LLM with the continuous branch by which it reads images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import llama
from lavit_jax.models.tokenizer import merger, tokenizer


class UnifiedModel(nn.Module):
  """LLaMA + the merger and projection that train with it (method.md, 4)."""

  llama_config: llama.LlamaConfig
  tokenizer_config: tokenizer.TokenizerConfig
  capacity: int

  def setup(self):
    self.llm = llama.Llama(self.llama_config)
    self.merger = merger.TokenMerger(self.tokenizer_config.merger)
    init = nn.initializers.lecun_normal()
    self.projection = nn.Dense(
      self.llama_config.width,
      dtype=jnp.dtype(self.tokenizer_config.merger.dtype),
      kernel_init=nn.with_logical_partitioning(init, (None, "embed")),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
    )

  def read(self, features: jax.Array, keep: jax.Array):
    """Continuous tokens of images.

    Args:
      features: float[B, N, D] of the frozen encoder.
      keep: bool[B, N], patches kept.

    Returns:
      (float[B, K, W] projected tokens, bool[B, K] which are tokens); K is the
      model's capacity, kept patches beyond it are cut.
    """
    form = self.tokenizer_config.merger_form
    if form == "reference":
      mask = keep.astype(features.dtype)
      merged = self.merger(features, mask, form="reference")
      tokens, valid, _ = merger.gather_kept(merged, keep, self.capacity)
    else:
      tokens, valid, _ = self.merger.compact(features, keep, self.capacity)
    return self.projection(tokens), valid

  def __call__(
    self, tokens, *, features, keep, slot, order, positions, segments
  ):
    """Hidden states of packed rows.

    Args:
      tokens: int[B, L] ids.
      features: float[B, S, N, D] of the images that are read.
      keep: bool[B, S, N] their kept patches.
      slot: int[B, L], which image of the row enters here, -1 for none.
      order: int[B, L], which kept token of it.
      positions: int[B, L] within each document.
      segments: int[B, L], 0 for padding.

    Returns:
      float[B, L, W] after the last norm.
    """
    batch, slots = keep.shape[:2]
    flat = lambda x: x.reshape(batch * slots, *x.shape[2:])
    read, _ = self.read(flat(features), flat(keep))  # [B*S, K, W]
    read = read.reshape(batch, slots * self.capacity, -1)
    index = jnp.maximum(slot, 0) * self.capacity + order
    index = jnp.minimum(index, slots * self.capacity - 1)
    embeds = jnp.take_along_axis(read, index[..., None], axis=1)  # [B, L, W]
    return self.llm(
      tokens,
      embeds=embeds,
      use_embeds=slot >= 0,
      positions=positions,
      segment_ids=segments,
      return_hidden=True,
    )
