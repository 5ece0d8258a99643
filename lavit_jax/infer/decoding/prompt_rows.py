"""Builds prompts of ids and continuous tokens: rows, then padded arrays."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import vocabulary
from lavit_jax.infer.decoding import decode


def rows_of(
  prompts: Sequence[Sequence],
  images: Iterator[Any],
  *,
  encode: Callable[[str, str], Sequence[int]],
  marks: tuple[Sequence[int], Sequence[int]] | None,
  end: Sequence[int] = (),
) -> list[list]:
  """Returns each prompt as a row of ids and float[k, W] continuous tokens.

  Args:
    prompts: lists of parts: a str is text, anything else an image.
    images: yields for each image, in order, float[k, W] or ids.
    encode: maps a text, and the text right before it or "", to ids.
    marks: the ids before and after an image; None: no ids.
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
  """Returns the number of positions of a row."""
  return sum(len(p) if getattr(p, "ndim", 0) == 2 else 1 for p in row)


def padded(
  rows: Sequence[Sequence],
  width: int,
  *,
  length: int | None = None,
  multiple: int = 1,
  pad_id: int = vocabulary.UNK_ID,
) -> dict[str, np.ndarray]:
  """Pads rows of ids and float[k, W] continuous tokens on the left.

  Args:
    rows: from `rows_of`; none is empty.
    width: W.
    length: of the result; by default the longest row.
    multiple: the length is rounded up to it.
    pad_id: the id at padding.

  Returns:
    dict(tokens int32[B, L], mask bool[B, L]) and, if any row has continuous
    tokens, embeds float32[B, L, W] and use_embeds bool[B, L].
  """
  ids: list[list[int]] = []
  inserts: list[list[tuple[int, Any]]] = []  # (position, continuous tokens)
  for row in rows:
    ids.append([])
    inserts.append([])
    for part in row:
      if getattr(part, "ndim", 0) == 2:
        inserts[-1].append((len(ids[-1]), part))
        ids[-1] += [vocabulary.UNK_ID] * len(part)  # replaced by embeddings
      else:
        ids[-1].append(int(part))
  prompt = decode.left_pad(ids, length, multiple, pad_id)
  if not any(inserts):
    return prompt
  shape = prompt["tokens"].shape
  embeds, use = np.zeros((*shape, width), np.float32), np.zeros(shape, bool)
  for i, row_inserts in enumerate(inserts):
    for start, part in row_inserts:
      start += shape[1] - len(ids[i])
      embeds[i, start : start + len(part)] = part
      use[i, start : start + len(part)] = True
  return prompt | {"embeds": embeds, "use_embeds": use}
