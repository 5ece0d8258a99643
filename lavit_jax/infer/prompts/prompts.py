"""Turns prompts of text and images into rows and padded arrays."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors, image_io, vocabulary
from lavit_jax.data import sequences
from lavit_jax.infer import batches
from lavit_jax.infer.decoding import prompt_rows
from lavit_jax.infer.loading import parts, visual
from lavit_jax.infer.presets import official

_MULTIPLE = 16  # prompts are padded to it, so that few shapes compile


class Prompter:
  """Turns prompts into rows and padded arrays for one model.

  Attributes:
    visual: its visual tokenizer.
    language: its LLM.
    text: its text tokenizer.
    max_batch: images or prompts at once.
  """

  def __init__(
    self,
    tokenizer: visual.VisualTokenizer,
    language: parts.Language,
    text: vocabulary.TextTokenizer,
    max_batch: int,
  ):
    """Keeps the parts of a model; see the attributes."""
    self.visual = tokenizer
    self.language = language
    self.text = text
    self.max_batch = max_batch

  def parse(self, prompt: Any, parity: bool = False) -> list:
    """Returns the parts of one prompt: str, and images uint8[size, size, 3].

    Args:
      prompt: a str, or a sequence of str (text) and images in any form that
        `image_io.load` takes.
      parity: read images as the official code does.

    Raises:
      errors.UsageError: the prompt is empty.
      image_io.ImageError: a part is neither text nor an image.
    """
    alone = isinstance(prompt, str | bytes | os.PathLike)
    if alone or not isinstance(prompt, Sequence):
      prompt = [prompt]
    if not prompt:
      raise errors.UsageError(
        "An empty prompt: give at least one text or one image."
      )
    size = self.visual.image_size
    return [p if isinstance(p, str) else sized(p, size, parity) for p in prompt]

  def rows(
    self,
    parsed: Sequence[list],
    *,
    form: str,
    seeds: np.ndarray | None = None,
    parity: bool = False,
    end: Sequence[int] = (),
  ) -> list[list]:
    """Returns rows of ids and continuous tokens (`prompt_rows`).

    Args:
      parsed: prompts from `parse`.
      form: how images enter, "continuous" or "codes".
      seeds: int[n], to sample the patches that are kept in the images of each
        prompt; None is deterministic.
      parity: codes have no [IMG] and [/IMG]; "</s>" in a text is the token.
      end: ids after the last part.

    Raises:
      errors.UsageError: a row has no tokens.
    """
    vocab = self.language.vocabulary
    images = [p for row in parsed for p in row if not isinstance(p, str)]
    if seeds is not None:
      counts = [sum(not isinstance(p, str) for p in row) for row in parsed]
      seeds = np.repeat(seeds, counts)
    tokens: list[Any] = []
    if images and form == "continuous":
      read, valid = self.language.read(np.stack(images), seeds, self.max_batch)
      tokens = [row[kept] for row, kept in zip(read, valid, strict=True)]
    elif images:
      tokens = [vocab.to_ids(codes) for codes in self._codes(images, seeds)]
    unmarked = parity and form == "codes"
    rows = prompt_rows.rows_of(
      parsed,
      iter(tokens),
      encode=functools.partial(
        _official_ids if parity else sequences.text_ids, self.text
      ),
      marks=None if unmarked else ([vocab.image_begin], [vocab.image_end]),
      end=end,
    )
    if not all(rows):
      raise errors.UsageError(
        "A prompt has no tokens: its text is empty. Write something, or give"
        " an image."
      )
    return rows

  def _codes(self, images, seeds):
    codes = []
    for chunk, count, start in batches.chunks(images, self.max_batch):
      seed = None if seeds is None else batches.fill(seeds[start:], len(chunk))
      rows = self.visual.tokenize(np.stack(chunk), seed=seed, count=count)
      codes += [row["codes"] for row in rows]
    return codes

  def padded(
    self,
    rows: Sequence[Sequence],
    max_new_tokens: int,
    multiple: int = _MULTIPLE,
  ) -> dict[str, np.ndarray]:
    """Returns rows as padded arrays, see `prompt_rows.padded`.

    Args:
      rows: from `rows`.
      max_new_tokens: that may follow.
      multiple: the length is rounded up to it.

    Raises:
      errors.UsageError: prompt and new tokens exceed the model's length.
    """
    config = self.language.model.config
    longest = max(map(prompt_rows.length_of, rows))
    if longest + max_new_tokens > config.max_len:
      raise errors.UsageError(
        f"The prompt is {longest} tokens long and {max_new_tokens} more may"
        f" follow, but this model reads at most {config.max_len} in all."
        " Shorten the text, give fewer images, or lower max_new_tokens."
      )
    return prompt_rows.padded(rows, config.width, multiple=multiple)


def _official_ids(text, part, before) -> list[int]:
  """Returns the ids of one text; the text before it does not matter."""
  del before
  return official.encode(text, part)


def sized(image: Any, size: int, parity: bool = False) -> np.ndarray:
  """Loads an image in any form of `image_io.load`: uint8[size, size, 3]."""
  return image_io.to_uint8(image_io.load(image, plain=parity), size)
