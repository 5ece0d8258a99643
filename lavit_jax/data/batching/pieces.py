"""Divides documents that are longer than a row into pieces that fit.

  all of it is learnt     split anywhere except within an image
  a dialogue              cut after the last answer that fits
  anything else           too long: a caption, an answer or a written image
                          needs what precedes it

Pieces are a pure function of the document and the limits.
"""

import dataclasses
from collections.abc import Sequence

from lavit_jax.data import sequences

DIVISIBLE = ("document", "text")  # tasks
Limits = tuple[int, int]  # positions and images of a row
Spans = Sequence[sequences.Span]


class TooLong(sequences.Unusable):
  """A document that fits no row and cannot be divided; says how long it is."""


def divide(
  spans: Spans, task: str, limits: Limits
) -> tuple[list[Spans], str | None]:
  """Returns the pieces of a document, each of which fits a row.

  Args:
    spans: the document, as `sequences.spans` returns it.
    task: of the example, one of examples.TASKS.
    limits: (positions, images) a row.

  Returns:
    (pieces, note): the arguments of `sequences.assemble`, one a piece; and how
    the document was divided, None if it was not.

  Raises:
    TooLong: it fits no row.
  """
  if _fits(spans, limits):
    return [spans], None
  positions, images = sequences.size(spans)
  excess = (
    f"{positions} positions, more than length={limits[0]}"
    if positions > limits[0]
    else f"{images} images read, more than slots={limits[1]}"
  )
  pieces = []
  if task in DIVISIBLE:
    all_learnt = all(span.part.weight for span in spans)
    pieces = _split(spans, *limits) if all_learnt else _cut(spans, limits)
  if not pieces:
    raise TooLong(excess)
  if len(pieces) > 1:
    return pieces, f"{excess}: split into {len(pieces)}"
  return pieces, f"{excess}: cut to {sequences.size(pieces[0])[0]}"


def _fits(spans, limits):
  positions, images = sequences.size(spans)
  return positions <= limits[0] and images <= limits[1]


def _split(spans, length, slots):
  """Returns pieces of at most length + 1 ids; [] if an image is longer.

  A piece begins with the last id of the one before it, if that is text: so
  every id is a target once, except for the first and for the one that follows
  an image at the end of a piece. In rows of 3 the ids a b c d e f g become
  a b c d and d e f g.
  """
  pieces, piece = [], []
  for span in spans:
    if span.ids is None:
      if not _joins(piece, span, length, slots):
        pieces.append(piece)
        piece = _last_id(piece)
      if not _joins(piece, span, length, slots):
        piece = []
      if not _joins(piece, span, length, slots):
        return []
      piece.append(span)
      continue
    ids = span.ids
    while len(ids) > (room := length + 1 - sum(s.count for s in piece)):
      if room:
        head = dataclasses.replace(span.part, end=False)  # its end is later
        piece.append(sequences.Span.of(head, ids[:room]))
        ids = ids[room:]
      pieces.append(piece)
      piece = _last_id(piece)
    piece.append(sequences.Span.of(span.part, ids))
  pieces.append(piece)
  return [tuple(p) for p in pieces if sum(s.count for s in p) > 1]


def _joins(piece, image, length, slots):
  """Whether an image fits after the spans of a piece."""
  return _fits([*piece, image], (length, slots))


def _last_id(piece):
  """Returns the last id of a piece as a new piece; [] after an image."""
  if not piece or piece[-1].ids is None:
    return []
  return [sequences.Span.of(piece[-1].part, piece[-1].ids[-1:])]


def _cut(spans, limits):
  """Returns the longest head of a dialogue that ends with an answer and fits.

  Returns a list of one piece, or [].
  """
  for stop in range(len(spans) - 1, 0, -1):
    last, following = spans[stop - 1], spans[stop]
    if not last.part.weight or following.part.weight:
      continue  # not the end of an answer
    if last.ids is not None:
      last = last.ended()
    head = (*spans[: stop - 1], last)
    if _fits(head, limits) and sequences.size(head)[0]:
      return [head]
  return []
