"""Prompts of ids and continuous tokens, as rows and as padded arrays."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import vocabulary
from lavit_jax.infer.decoding import decode


def rows_of(
  prompts: Sequence[Sequence],
  images: Iterator[Any],
  *,
  encode,
  marks: Sequence[int] | None,
  end: Sequence[int] = (),
) -> list[list]:
  """Each prompt as a row of ids and float[k, W] continuous tokens.

  Args:
    prompts: rows of parts, str or anything else for an image.
    images: gives for every image, in order, its float[k, W] or its ids.
    encode: maps a str, and the one right before it or "", to ids.
    marks: the ids before and after an image; None for none.
    end: ids after the last part.
  """
  before, after = marks or ((), ())
  rows = []
  for parts in prompts:
    row: list[Any] = []
    text = ""
    for part in parts:
      if isinstance(part, str):
        row += encode(part, text)
        text = part or text
        continue
      text = ""
      tokens = next(images)
      tokens = [tokens] if getattr(tokens, "ndim", 0) == 2 else list(tokens)
      row += [*before, *tokens, *after]
    rows.append([*row, *end])
  return rows


def length_of(row: Sequence) -> int:
  """Places that a row takes."""
  return sum(len(p) if getattr(p, "ndim", 0) == 2 else 1 for p in row)


def padded(
  rows: Sequence[Sequence],
  width: int,
  *,
  length: int | None = None,
  multiple: int = 1,
  pad_id: int = vocabulary.UNK_ID,
) -> dict[str, np.ndarray]:
  """Rows of ids and float[k, W] continuous tokens, padded on the left.

  Args:
    rows: see `rows_of`; none empty.
    width: W.
    length: of the result; by default the longest row.
    multiple: the length is rounded up to it.
    pad_id: the id at padding.

  Returns:
    dict(tokens int32[B, L], mask bool[B, L]) and, where any row has
    continuous tokens, embeds float32[B, L, W] and use_embeds bool[B, L].
  """
  ids, places = [], []
  for row in rows:
    line, where = [], []
    for part in row:
      if getattr(part, "ndim", 0) == 2:
        where.append((len(line), part))
        line += [vocabulary.UNK_ID] * len(part)  # replaced by the embeddings
      else:
        line.append(int(part))
    ids.append(line)
    places.append(where)
  prompt = decode.left_pad(ids, length, multiple, pad_id)
  if not any(places):
    return prompt
  shape = prompt["tokens"].shape
  embeds, use = np.zeros((*shape, width), np.float32), np.zeros(shape, bool)
  for i, where in enumerate(places):
    for start, part in where:
      start += shape[1] - len(ids[i])
      embeds[i, start : start + len(part)] = part
      use[i, start : start + len(part)] = True
  return prompt | {"embeds": embeds, "use_embeds": use}
