"""The dynamic visual tokenizer: selector, merger, quantizer and decoder.

The encoder is apart, as it is frozen (`encode_images`). Parameters lie under
`selector`, `merger`, `quantizer`, `decoder` (and `llm_proj`); the codebook is
no parameter but the variable `codes` of the collection "codebook":

  variables = {"params": params, "codebook": {"codes": codes}}
  model.apply(variables, features, keep, capacity, method="encode")
"""

import dataclasses
import difflib

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
  """The encoder and the four parts.

  Attributes:
    merger_form: which form makes tokens outside training: "compact" for
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
    wanted = {
      "selector.width": (self.selector.width, self.vit.width),
      "merger.width": (self.merger.width, self.vit.width),
      "quantizer.width": (self.quantizer.width, self.vit.width),
      "decoder.out_dim": (self.decoder.out_dim, self.vit.width),
      "decoder.num_patches": (self.decoder.num_patches, self.num_patches),
      "decoder.code_dim": (self.decoder.code_dim, self.quantizer.code_dim),
    }
    for name, (given, expected) in wanted.items():
      if given != expected:
        raise errors.ConfigError(
          f"tokenizer.{name}={given}, but the parts it joins need {expected}."
          f" Set tokenizer.{name}={expected}."
        )
    if self.merger_form not in MERGER_FORMS:
      raise errors.ConfigError(
        f"tokenizer.merger_form={self.merger_form!r}: expected one of"
        f" {MERGER_FORMS}."
      )

  @property
  def num_patches(self) -> int:
    """N, patches of an image."""
    return self.vit.num_patches

  @property
  def width(self) -> int:
    """D, the width of the encoder's features."""
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
  """The inverse of `dataclasses.asdict`; its parts may be dicts or configs.

  Raises:
    errors.ConfigError: an unknown or a missing field, with the nearest name.
  """
  fields = dict(fields)
  for name, part in _PARTS.items():
    if isinstance(fields.get(name), dict):
      fields[name] = _build(part, fields[name], f"tokenizer.{name}")
  return _build(TokenizerConfig, fields, "tokenizer")


def with_dtype(config: TokenizerConfig, dtype: str) -> TokenizerConfig:
  """The same network computing in another dtype, in all its parts."""
  parts = {
    name: dataclasses.replace(getattr(config, name), dtype=dtype)
    for name in _PARTS
    if getattr(config, name) is not None
  }
  return dataclasses.replace(config, **parts)


def _build(cls, fields, where):
  known = {field.name: field for field in dataclasses.fields(cls)}
  for name in sorted(set(fields) - set(known)):
    near = difflib.get_close_matches(name, known, 1, 0.0)[0]
    raise errors.ConfigError(
      f"{where} has no field {name!r}; did you mean {near!r}? It has"
      f" {sorted(known)}."
    )
  missing = [
    name
    for name, field in known.items()
    if field.default is dataclasses.MISSING and name not in fields
  ]
  if missing:
    raise errors.ConfigError(f"{where} lacks {missing}: give a value for each.")
  return cls(**fields)


def _random_codes(rng, num_codes, code_dim):
  return quantizer.init_stats(rng, num_codes, code_dim)["codes"]


def encode_images(config: TokenizerConfig, params, pixels: jax.Array):
  """Features float[B, N, D] of pixels float[B, H, W, 3] by the encoder."""
  return vision.EvaVit(config.vit).apply({"params": params}, pixels)


# Fields of an encoder that its features do not depend on.
_NOT_OF_FEATURES = ("head_dim_out", "mask_token", "position_std")


def check_encoder(config: TokenizerConfig, vit: dict, where="") -> None:
  """Whether an encoder is the one that a tokenizer was trained on.

  Args:
    config: of the tokenizer, with the encoder it knows.
    vit: fields of the encoder that is there, as its part.json has them.
    where: the model directory, for the message.

  Raises:
    errors.CheckpointError: a field that features depend on differs.
  """
  theirs = vision.ViTConfig(**vit)
  differ = agreement.fields(theirs, config.vit, "vit.", _NOT_OF_FEATURES)
  if differ:
    raise errors.CheckpointError(
      f"The encoder of {where or 'this model'} is another than its tokenizer"
      f" was trained on: {'; '.join(map(str, differ))}, by the tokenizer."
      " Their weights do not go together: put the encoder back, or train the"
      " tokenizer again."
    )


class DynamicVisualTokenizer(nn.Module):
  """Features of the encoder to tokens and ids, and ids back to features."""

  config: TokenizerConfig

  def setup(self):
    c = self.config
    self.selector = selector.TokenSelector(c.selector)
    self.merger = merger.TokenMerger(c.merger)
    self.quantizer = quantizer.VectorQuantizer(c.quantizer)
    self.decoder = decoder.SemanticDecoder(c.decoder)
    if self.is_initializing() or self.has_variable("codebook", "codes"):
      init = nn.with_logical_partitioning(_random_codes, ("code", "code_dim"))
      shape = (c.quantizer.num_codes, c.quantizer.code_dim)
      self.codebook = self.variable(
        "codebook", "codes", lambda: init(self.make_rng("params"), *shape)
      )
    if c.llm_width:
      axes, dtype = (None, "embed"), c.merger.dtype
      self.llm_proj = layers.dense(c.llm_width, axes, dtype=dtype)

  def __call__(self, features: jax.Array, mask: jax.Array):
    """Selection and reconstruction without codes, all positions.

    Args:
      features: float[B, N, D].
      mask: float[B, N].

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
        "This needs the codebook: apply the tokenizer to variables"
        ' {"params": ..., "codebook": {"codes": float[num_codes, code_dim]}}.'
      )
    return self.codebook.value

  def select(self, features: jax.Array) -> jax.Array:
    """Log p(keep), log p(drop) of each patch: float32[B, N, 2]."""
    return self.selector(features)

  def merge(self, features, mask, *, form: str = "soft") -> jax.Array:
    """All positions float[B, N, D], differentiable in the mask float[B, N]."""
    return self.merger(features, mask, form=form)

  def merge_compact(self, features, keep, capacity: int):
    """Kept tokens by the config's merger form, for a mask that is given.

    Args:
      features: float[B, N, D].
      keep: bool[B, N].
      capacity: K, tokens an image.

    Returns:
      (tokens float[B, K, D], valid bool[B, K], index int32[B, K]).
    """
    if self.config.merger_form == "compact":
      return self.merger.compact(features, keep, capacity)
    mask = keep.astype(jnp.float32)
    merged = self.merger(features, mask, form="reference")
    return merger.gather_kept(merged, keep.astype(bool), capacity)

  def project(self, tokens: jax.Array) -> jax.Array:
    """Unit vectors float32[..., code_dim] of merged tokens float[..., D]."""
    return layers.l2_normalize(self.quantizer(tokens))

  def tokens_for_llm(self, tokens: jax.Array) -> jax.Array:
    """Merged tokens float[..., D] as the language model reads them."""
    return self.llm_proj(tokens)

  def encode(self, features: jax.Array, keep: jax.Array, capacity: int):
    """Merged tokens and their codes.

    Returns:
      (tokens float[B, K, D], ids int32[B, K], valid bool[B, K]); ids are 0
      where not valid.
    """
    tokens, valid, _ = self.merge_compact(features, keep, capacity)
    ids = quantizer.lookup(self.quantizer(tokens), self._codes())
    return tokens, jnp.where(valid, ids, 0), valid

  def decode(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
    """x_rec float[B, N, D] of code vectors float[B, K, code_dim]."""
    return self.decoder(vectors, valid)

  def decode_soft(self, vectors: jax.Array, mask: jax.Array) -> jax.Array:
    """x_rec float[B, N, D] of float[B, N, code_dim] and mask float[B, N]."""
    return self.decoder.soft(vectors, mask)

  def decode_codes(self, ids: jax.Array, valid: jax.Array) -> jax.Array:
    """x_rec float[B, N, D] of ids int[B, K]."""
    return self.decoder(jnp.take(self._codes(), ids, axis=0), valid)
