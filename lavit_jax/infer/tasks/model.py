"""A model directory opened for use; each part is read when first needed."""

import functools
import math
import os
from typing import Any

import numpy as np

from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints, files
from lavit_jax.infer import memory
from lavit_jax.infer.loading import parts, visual
from lavit_jax.infer.pixels import decoders, safety
from lavit_jax.infer.presets import rules
from lavit_jax.infer.prompts import prompts
from lavit_jax.infer.tasks import arguments


class LoadedModel:
  """The parts of a model directory.

  Attributes:
    directory: the model directory.
    parts: names of its parts, of `checkpoints.PARTS`.
    max_batch: images or prompts at once.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    dtype: str,
    quantize: str | None,
    manner: str | None,
    max_batch: int,
    check_safety: bool,
  ):
    """Opens a directory; the arguments are those of `LaVIT.load`."""
    self.directory = files.input_path(directory)
    self.parts = checkpoints.parts_in(directory)
    arguments.check_load(dtype, quantize, manner, max_batch)
    self.max_batch = max_batch
    self._dtype, self._quantize, self._preset = dtype, quantize, manner
    self._pixel_decoders: dict[str, Any] = {}
    self._check_safety = check_safety and safety.PART in self.parts

  @functools.cached_property
  def visual(self) -> visual.VisualTokenizer:
    """Encoder and visual tokenizer."""
    return parts.visual_tokenizer(self.directory, self._dtype)

  @functools.cached_property
  def text(self) -> vocabulary.TextTokenizer:
    """The SentencePiece model of the text half of the vocabulary."""
    return parts.text_tokenizer(self.directory)

  @functools.cached_property
  def rules(self) -> rules.GenerationPreset:
    """The preset: how this model generates where a call does not say."""
    if self._preset:
      return rules.BY_NAME[self._preset]
    return rules.rules_of(checkpoints.read_meta(self.directory, "llm"))

  @property
  def num_parameters(self) -> float:
    """Parameters of all parts; infinite where a part does not say."""
    metas = (checkpoints.read_meta(self.directory, name) for name in self.parts)
    return sum(meta.get("parameters") or math.inf for meta in metas)

  def info(self) -> dict[str, Any]:
    """Returns parts, sizes and the needs of each task; loads no weights."""
    described = {}
    for name in self.parts:
      meta = checkpoints.read_meta(self.directory, name)
      described[name] = {
        "parameters": meta.get("parameters"),
        "step": meta.get("step"),
        "metrics": meta.get("metrics", {}),
      }
    needs = memory.needs(
      self.directory, dtype=self._dtype, quantize=self._quantize
    )
    return {
      "directory": str(self.directory),
      "parts": described,
      "pixel_decoders": decoders.available(self.parts),
      "safety_checker": self._check_safety,
      "tasks": {task: need["possible"] for task, need in needs.items()},
      "memory": needs,
    }

  @functools.cached_property
  def _llm(self) -> parts.Language:
    return parts.Language(
      self.directory, self.visual, self._dtype, self._quantize
    )

  @functools.cached_property
  def _prompter(self) -> prompts.Prompter:
    return prompts.Prompter(self.visual, self._llm, self.text, self.max_batch)

  @functools.cached_property
  def _safety(self) -> safety.Checker:
    return safety.Checker(self.directory)

  def _pixel_decoder(self, kind: str | None):
    """Returns a pixel decoder of `decoders.NEEDS`; None: the default one."""
    kind = decoders.choose(self.parts, kind)
    if kind not in self._pixel_decoders:
      self._pixel_decoders[kind] = decoders.load(
        self.directory, kind, self._dtype
      )
    return self._pixel_decoders[kind]

  def _batch(
    self, images: arguments.Images, parity: bool = False
  ) -> tuple[np.ndarray, bool]:
    """Returns uint8[B, size, size, 3], and whether it is a single image."""
    single = not isinstance(images, list | tuple) and not (
      isinstance(images, np.ndarray) and images.ndim == 4
    )
    listed = [images] if single else list(images)  # type: ignore[arg-type]  # a sequence here
    if not listed:
      raise errors.UsageError("No image was given; give at least one.")
    size = self.visual.image_size
    return np.stack([prompts.sized(x, size, parity) for x in listed]), single
