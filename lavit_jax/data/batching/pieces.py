"""Documents longer than a row: divided into pieces that fit.

  all of it is learnt     split anywhere but within an image
  a dialogue              cut behind the last answer that fits
  anything else           too long: a caption, an answer or a drawing needs
                          what stands before it

Pieces are a pure function of the document and the limits.
"""

import dataclasses

from lavit_jax.data import sequences

_DIVISIBLE = ("document", "text")  # tasks


class TooLong(sequences.Unusable):
  """A document that fits no row and cannot be divided; says how long it is."""


def divide(spans, task, limits):
  """Pieces of a document, each of which fits a row.

  Args:
    spans: the document, as `sequences.spans` gives it.
    task: of the example, one of examples.TASKS.
    limits: (positions, images) a row.

  Returns:
    (pieces, done): list of what `sequences.assemble` takes, and None or what
    was done to the document, a str.

  Raises:
    TooLong: it fits no row.
  """
  if _fits(spans, limits):
    return [spans], None
  positions, images = sequences.size(spans)
  said = (
    f"{positions} positions, more than length={limits[0]}"
    if positions > limits[0]
    else f"{images} images read, more than slots={limits[1]}"
  )
  pieces = []
  if task in _DIVISIBLE:
    whole = all(span.part.weight for span in spans)
    pieces = _split(spans, *limits) if whole else _cut(spans, limits)
  if not pieces:
    raise TooLong(said)
  if len(pieces) > 1:
    return pieces, f"{said}: split into {len(pieces)}"
  return pieces, f"{said}: cut to {sequences.size(pieces[0])[0]}"


def _fits(spans, limits):
  positions, images = sequences.size(spans)
  return positions <= limits[0] and images <= limits[1]


def _split(spans, length, slots):
  """Pieces of at most length + 1 ids; [] if an image is longer than that.

  A piece begins with the last id of the one before it, if that is text: so
  every id is a target once, except for the first and for what follows an
  image that ends a piece. In rows of 3 the ids a b c d e f g become a b c d
  and d e f g.
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
        head = dataclasses.replace(span.part, end=False)  # it goes on
        piece.append(sequences.Span.of(head, ids[:room]))
        ids = ids[room:]
      pieces.append(piece)
      piece = _last_id(piece)
    piece.append(sequences.Span.of(span.part, ids))
  pieces.append(piece)
  return [tuple(p) for p in pieces if sum(s.count for s in p) > 1]


def _joins(piece, image, length, slots):
  """Whether an image fits behind what a piece holds."""
  return _fits([*piece, image], (length, slots))


def _last_id(piece):
  """The last id of a piece as a piece of its own; [] behind an image."""
  if not piece or piece[-1].ids is None:
    return []
  return [sequences.Span.of(piece[-1].part, piece[-1].ids[-1:])]


def _cut(spans, limits):
  """The longest head of a dialogue that ends with an answer and fits, or []."""
  for stop in range(len(spans) - 1, 0, -1):
    last, following = spans[stop - 1], spans[stop]
    if not last.part.weight or following.part.weight:
      continue  # not the end of what is learnt
    if last.ids is not None:
      last = last.ended()
    head = (*spans[: stop - 1], last)
    if _fits(head, limits) and sequences.size(head)[0]:
      return [head]
  return []
