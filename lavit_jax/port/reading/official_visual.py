"""The official encoder, tokenizer and semantic decoders."""

import dataclasses
import functools
from typing import Any

from lavit_jax.core import errors
from lavit_jax.infer.pixels import latent_space
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import tokenizer as tokenizer_lib
from lavit_jax.port.reading import official_files, plan
from lavit_jax.port.tables import names, sizes


class VisualReader:
  """Plans the visual parts. A part is None where a size of it is unknown.

  Attributes:
    vit: sizes of the encoder; None where they are unknown or not needed.
  """

  def __init__(self, files: official_files.OfficialFiles):
    """Infers the encoder's sizes.

    Args:
      files: opened; receives problems, notes and kept tensors.
    """
    self._files = files
    self.vit: vision.ViTConfig | None = files.size(
      "encoder", lambda s: sizes.vit(s, files.heads, with_head=True)
    )

  def encoder(self) -> plan.Part | None:
    """Plans the part `encoder`."""
    tree = meta = None
    if self.vit is not None:
      tree = sizes.abstract_encoder(self.vit)
      meta = {"vit": dataclasses.asdict(self.vit)}
    arrays = self._files.arrays("encoder", names.ENCODER, tree)
    return official_files.part_of("encoder", arrays, meta)

  def lowres(self) -> plan.Part | None:
    """Plans the part `lowres`."""
    return self._decoder("lowres", sizes.lowres_meta)

  def highres(self) -> plan.Part | None:
    """Plans the part `highres`."""
    return self._decoder("highres", sizes.highres_meta)

  def _decoder(self, name, infer):
    files, tree = self._files, None
    meta = files.size(name, lambda shapes: infer(shapes, files.heads))
    if meta is not None:
      tree = sizes.abstract_decoder(latent_space.semantic(name, meta))
    arrays = files.arrays(name, names.SEMANTIC_DECODERS[name], tree)
    return official_files.part_of(name, arrays, meta)

  def tokenizer(self) -> plan.Part | None:
    """Plans the part `tokenizer`."""
    files, meta = self._files, None
    if self.tokenizer_config is not None:
      meta = {"tokenizer": dataclasses.asdict(self.tokenizer_config)}
    arrays = files.arrays("tokenizer", names.TOKENIZER, self.tokenizer_tree)
    copies = files.encoder_copies("tokenizer", "tokenizer")
    return official_files.part_of(
      "tokenizer", arrays, meta, encoder_copies=copies
    )

  @functools.cached_property
  def tokenizer_config(self) -> tokenizer_lib.TokenizerConfig | None:
    """Sizes of the tokenizer; None where any is unknown.

    Raises:
      errors.CheckpointError: the files are of different models.
    """
    files = self._files
    decoder = self._decoder_config("lowres") or self._decoder_config("highres")
    if (vit := self.vit) is None:
      return None
    try:
      return files.size(
        "tokenizer",
        lambda s: sizes.visual_tokenizer(s, vit, files.heads, decoder),
      )
    except errors.ConfigError as e:
      raise errors.CheckpointError(
        f"The files of {files.folder} do not belong to one model: {e}"
      ) from e

  def _decoder_config(self, name):
    """Returns the sizes of a semantic decoder, if its file is there."""
    table, heads = names.SEMANTIC_DECODERS[name], self._files.heads
    return self._files.size(
      name, lambda shapes: sizes.semantic_decoder(shapes, table, heads)
    )

  @functools.cached_property
  def tokenizer_tree(self) -> dict[str, Any] | None:
    """Abstract variables of the tokenizer without its decoder, or None."""
    if self.tokenizer_config is None:
      return None
    return sizes.abstract_tokenizer(self.tokenizer_config, with_decoder=False)
