"""The dynamic visual tokenizer: selector, merger, quantizer and decoder.

LaVIT, arXiv 2309.04669, section 3.1. The encoder is frozen and separate
(`encode_images`). Parameters are under `selector`, `merger`, `quantizer`,
`decoder` (and `llm_proj`). The codebook is not a parameter but the variable
`codes` of the collection "codebook":

  variables = {"params": params, "codebook": {"codes": codes}}
  model.apply(variables, features, keep, capacity, method="encode")
"""

import dataclasses
import difflib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import agreement, errors
from lavit_jax.models import layers
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
)

MERGER_FORMS = ("compact", "reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """Sizes of the encoder and of the tokenizer's four parts.

  Attributes:
    vit: the encoder.
    selector: see `selector`.
    merger: see `merger`.
    quantizer: see `quantizer`.
    decoder: see `decoder`.
    merger_form: how kept tokens are merged, except in training: "compact" for
      models trained here, "reference" for official weights.
    llm_width: width of the language model that reads merged tokens through
      `llm_proj`; 0: the tokenizer has no such projection.
  """

  vit: vision.ViTConfig
  selector: selector.SelectorConfig
  merger: merger.MergerConfig
  quantizer: quantizer.QuantizerConfig
  decoder: decoder.DecoderConfig
  merger_form: str = "compact"
  llm_width: int = 0

  def __post_init__(self):
    sizes = {
      "selector.width": (self.selector.width, self.vit.width),
      "merger.width": (self.merger.width, self.vit.width),
      "quantizer.width": (self.quantizer.width, self.vit.width),
      "decoder.out_dim": (self.decoder.out_dim, self.vit.width),
      "decoder.num_patches": (self.decoder.num_patches, self.num_patches),
      "decoder.code_dim": (self.decoder.code_dim, self.quantizer.code_dim),
    }
    for name, (size, expected) in sizes.items():
      if size != expected:
        raise errors.ConfigError(
          f"tokenizer.{name}={size}, but the tokenizer's other parts need"
          f" {expected}. Set tokenizer.{name}={expected}."
        )
    if self.merger_form not in MERGER_FORMS:
      raise errors.ConfigError(
        f"tokenizer.merger_form={self.merger_form!r}: expected one of"
        f" {MERGER_FORMS}."
      )

  @property
  def num_patches(self) -> int:
    """Returns N, the number of patches of an image."""
    return self.vit.num_patches

  @property
  def width(self) -> int:
    """Returns D, the width of the encoder's features."""
    return self.vit.width


_PARTS = {
  "vit": vision.ViTConfig,
  "selector": selector.SelectorConfig,
  "merger": merger.MergerConfig,
  "quantizer": quantizer.QuantizerConfig,
  "decoder": decoder.DecoderConfig,
}

LAVIT_7B = TokenizerConfig(
  vit=vision.EVA_VIT_G14,
  selector=selector.SelectorConfig(width=1408, dtype="bfloat16"),
  merger=merger.LAVIT_7B,
  quantizer=quantizer.LAVIT_7B,
  decoder=decoder.LAVIT_7B,
  merger_form="reference",
  llm_width=4096,
)
TINY = TokenizerConfig(
  vit=vision.TINY,
  selector=selector.SelectorConfig(width=96),
  merger=merger.TINY,
  quantizer=quantizer.TINY,
  decoder=decoder.TINY,
)


def config_from_dict(fields: dict) -> TokenizerConfig:
  """Builds a config; reverses `dataclasses.asdict`.

  Args:
    fields: of `TokenizerConfig`; those of its parts are dicts or configs.

  Raises:
    errors.ConfigError: an unknown field (the message names the nearest one),
      or a missing one.
  """
  fields = dict(fields)
  for name, part in _PARTS.items():
    if isinstance(fields.get(name), dict):
      fields[name] = _build(part, fields[name], f"tokenizer.{name}")
  return _build(TokenizerConfig, fields, "tokenizer")


def with_dtype(config: TokenizerConfig, dtype: str) -> TokenizerConfig:
  """Returns the config with another dtype of computation in all its parts."""
  parts = {
    name: dataclasses.replace(getattr(config, name), dtype=dtype)
    for name in _PARTS
    if getattr(config, name) is not None
  }
  return dataclasses.replace(config, **parts)


def _build(cls, fields, name):
  known = {field.name: field for field in dataclasses.fields(cls)}
  for unknown in sorted(set(fields) - set(known)):
    nearest = difflib.get_close_matches(unknown, known, 1, 0.0)[0]
    raise errors.ConfigError(
      f"{name} has no field {unknown!r}; did you mean {nearest!r}? It has"
      f" {sorted(known)}."
    )
  missing = [
    key
    for key, field in known.items()
    if field.default is dataclasses.MISSING and key not in fields
  ]
  if missing:
    raise errors.ConfigError(f"{name} lacks {missing}: give a value for each.")
  return cls(**fields)


def _random_codes(rng, num_codes, code_dim):
  return quantizer.init_stats(rng, num_codes, code_dim)["codes"]


def encode_images(
  config: TokenizerConfig, params: Any, pixels: jax.Array
) -> jax.Array:
  """Computes the encoder's features.

  Args:
    config: of the tokenizer.
    params: of the encoder, unboxed.
    pixels: float[B, H, W, 3], CLIP-normalised.

  Returns:
    float[B, N, D].
  """
  features = vision.EvaVit(config.vit).apply({"params": params}, pixels)
  return jnp.asarray(features)


# Fields of an encoder that its features do not depend on.
_NOT_OF_FEATURES = ("head_dim_out", "mask_token", "position_std")


def check_encoder(
  config: TokenizerConfig, vit: dict, directory: str = ""
) -> None:
  """Checks that an encoder is the one that a tokenizer was trained with.

  Args:
    config: of the tokenizer, with its encoder.
    vit: fields of the stored encoder, from its part.json.
    directory: the model directory, for the message.

  Raises:
    errors.CheckpointError: a field that features depend on differs.
  """
  stored = vision.ViTConfig(**vit)
  differences = agreement.fields(stored, config.vit, "vit.", _NOT_OF_FEATURES)
  if differences:
    listed = "; ".join(map(str, differences))
    raise errors.CheckpointError(
      f"The encoder of {directory or 'this model'} is not the one that its"
      f" tokenizer was trained with: {listed} (here: by the tokenizer). Their"
      " weights do not fit together: restore the encoder, or train the"
      " tokenizer again."
    )


class DynamicVisualTokenizer(nn.Module):
  """Maps the encoder's features to tokens and ids, and ids to features."""

  config: TokenizerConfig

  def setup(self) -> None:
    c = self.config
    self.selector = selector.TokenSelector(c.selector)
    self.merger = merger.TokenMerger(c.merger)
    self.quantizer = quantizer.VectorQuantizer(c.quantizer)
    self.decoder = decoder.SemanticDecoder(c.decoder)
    if self.is_initializing() or self.has_variable("codebook", "codes"):
      init = layers.partitioned(_random_codes, ("code", "code_dim"))
      shape = (c.quantizer.num_codes, c.quantizer.code_dim)
      self.codebook = self.variable(
        "codebook", "codes", lambda: init(self.make_rng("params"), *shape)
      )
    if c.llm_width:
      axes, dtype = (None, "embed"), c.merger.dtype
      self.llm_proj = layers.dense(c.llm_width, axes, dtype=dtype)

  def __call__(
    self, features: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Selects patches, and reconstructs features without quantization.

    Args:
      features: float[B, N, D].
      mask: float[B, N], 1 for kept patches.

    Returns:
      (log_probs float32[B, N, 2], x_rec float[B, N, D]).
    """
    log_probs = self.select(features)
    merged = self.merge(features, mask)
    x_rec = self.decode_soft(self.project(merged), mask)
    if self.is_initializing() and self.config.llm_width:
      self.tokens_for_llm(merged)
    return log_probs, x_rec

  def _codes(self):
    if not self.has_variable("codebook", "codes"):
      raise ValueError(
        "This method needs the codebook: apply the tokenizer to variables"
        ' {"params": ..., "codebook": {"codes": float[num_codes, code_dim]}}.'
      )
    return self.codebook.value

  def select(self, features: jax.Array) -> jax.Array:
    """Returns log p(keep), log p(drop) of each patch, float32[B, N, 2]."""
    return self.selector(features)

  def merge(
    self, features: jax.Array, mask: jax.Array, *, form: str = "soft"
  ) -> jax.Array:
    """Merges at all positions; see `merger.TokenMerger.__call__`."""
    return self.merger(features, mask, form=form)

  def merge_compact(
    self, features: jax.Array, keep: jax.Array, capacity: int
  ) -> merger.Gathered:
    """Merges kept patches by the config's `merger_form`.

    Args:
      features: float[B, N, D].
      keep: bool[B, N], True for kept patches.
      capacity: K, tokens per image.

    Returns:
      (tokens float[B, K, D], valid bool[B, K], index int32[B, K]).
    """
    form = self.config.merger_form
    return self.merger.merge_kept(features, keep, capacity, form=form)

  def project(self, tokens: jax.Array) -> jax.Array:
    """Maps merged tokens float[..., D] to unit vectors [..., code_dim]."""
    return layers.l2_normalize(self.quantizer(tokens))

  def tokens_for_llm(self, tokens: jax.Array) -> jax.Array:
    """Projects merged tokens float[..., D] to the language model's width."""
    return self.llm_proj(tokens)

  def encode(
    self, features: jax.Array, keep: jax.Array, capacity: int
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merges kept patches and finds their codes.

    Args:
      features: float[B, N, D].
      keep: bool[B, N], True for kept patches.
      capacity: K, tokens per image.

    Returns:
      (tokens float[B, K, D], ids int32[B, K], valid bool[B, K]); ids are 0
      where not valid.
    """
    tokens, valid, _ = self.merge_compact(features, keep, capacity)
    ids = quantizer.lookup(self.quantizer(tokens), self._codes())
    return tokens, jnp.where(valid, ids, 0), valid

  def decode(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
    """Maps code vectors [B, K, code_dim] to x_rec float[B, N, D]."""
    return self.decoder(vectors, valid)

  def decode_soft(self, vectors: jax.Array, mask: jax.Array) -> jax.Array:
    """Maps [B, N, code_dim] and a mask float[B, N] to x_rec [B, N, D]."""
    return self.decoder.soft(vectors, mask)

  def decode_codes(self, ids: jax.Array, valid: jax.Array) -> jax.Array:
    """Maps ids int[B, K], valid bool[B, K] to x_rec float[B, N, D]."""
    return self.decoder(jnp.take(self._codes(), ids, axis=0), valid)
