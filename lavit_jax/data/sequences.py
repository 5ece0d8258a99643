"""Examples to token sequences: LaVIT's unified form (paper, section 3.2).

  image read:     [IMG] continuous tokens [/IMG]   (targets are its codes)
  image written:  [IMG] code ids [/IMG]
  text:             pieces; </s> ends a document whose last part is text

There is no <s>. An image that ends a document is ended by [/IMG] alone.

Within a dialogue </s> is the target at the last token of each answer
(`examples.TextPart.end`), but never a token that is read: what stands before
a later question is what a prompt of the same texts gives (`infer/prompts`,
where a text cannot hold </s>), and the question itself is not learnt. Both
make a text's ids by `text_ids`, which knows nothing of who speaks, nor of what
follows: where a prompt ends, what is generated begins as it does in training.
"""

import dataclasses

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core import vocabulary as vocabulary_lib
from lavit_jax.data import examples


class Unusable(Exception):
  """An example that cannot become a sequence; says why, is skipped."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
  """One document of n positions; position j predicts token j + 1.

  Where an answer within a dialogue ends, </s> is predicted in its place.

  tokens, targets: int32[n]; weights: float32[n], the loss weight of targets;
  slot: int32[n], which of `images` a position reads, -1 for none;
  order: int32[n], which of its merged tokens (0, 1, …; 0 elsewhere);
  images: the image indices that are read, in reading order, each once.
  """

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  slot: np.ndarray
  order: np.ndarray
  images: tuple

  def __len__(self):
    return len(self.tokens)


def text_ids(tokenizer, text, before=""):
  """Ids of one text part: " red" gives what "red" gives.

  SentencePiece puts a space before a text by itself, so the one that joins
  a part to its predecessor is dropped. Where other white space stands between
  them none is put: "- one" behind "List:\\n" has the ids that it has in
  "List:\\n- one", unless a piece there lies across the boundary. So whatever
  is learnt of them, the ids of the first texts never depend on those behind.

  Args:
    tokenizer: a vocabulary.TextTokenizer.
    text: of the part.
    before: the text right before it, "" if none or an image stands there.
  """
  alone = tokenizer.encode(text.removeprefix(" "))
  spaced = text[:1] == " " and not text[1:2].isspace()
  white = before[-1:].isspace() or (text[:1].isspace() and not spaced)
  if not before or not white:
    return alone
  head = tokenizer.encode(before.removeprefix(" "))
  both = tokenizer.encode((before + text).removeprefix(" "))
  return both[len(head) :] if both[: len(head)] == head else alone


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
  """A part with its number of ids; `ids` int32[count], None for an image."""

  part: examples.TextPart | examples.ImagePart
  ids: np.ndarray | None
  count: int

  @classmethod
  def of(cls, part, ids):
    """The span of a text part with these ids."""
    return cls(part, np.asarray(ids, np.int32), len(ids))

  def ended(self):
    """The same with </s> behind it."""
    return Span.of(self.part, np.append(self.ids, vocabulary_lib.EOS_ID))


def spans(example, cache, tokenizer):
  """The parts of an example with their lengths, </s> included.

  Needs the counts of the cache only: neither an image nor its codes.

  Args:
    example: an examples.Example.
    cache: the source's CodeCache; None if the example has no image.
    tokenizer: a vocabulary.TextTokenizer.

  Returns:
    tuple of Span.

  Raises:
    Unusable: an image could not be tokenised, a text cannot be or is empty
      (a document's empty texts are passed over), or nothing is to be learnt.
  """
  out, before = [], ""
  for part in example.parts:
    if isinstance(part, examples.TextPart):
      try:
        ids = text_ids(tokenizer, part.text, before)
      except vocabulary_lib.BadText as error:
        raise Unusable(str(error)) from error
      before = part.text or before
      if ids:
        out.append(Span.of(part, ids))
      elif example.task != "document":
        raise Unusable("has an empty text")
    else:
      out.append(Span(part, None, _count(example, part, cache) + 2))
      before = ""
  if out and out[-1].ids is not None:
    out[-1] = out[-1].ended()
  if not out:
    raise Unusable("is empty")
  if not any([s.part.weight for s in out for _ in range(s.count)][1:]):
    raise Unusable("holds nothing to learn: no part has a weight")
  return tuple(out)


def size(parts):
  """(positions, images read) of the Sequence that `assemble` will make."""
  read = {s.part.image for s in parts if s.ids is None and not s.part.write}
  return sum(s.count for s in parts) - 1, len(read)


def assemble(parts, cache, vocabulary):
  """Makes the Sequence of `spans`; reads the codes, not the images."""
  ids, weights, slot, order, images, ends = [], [], [], [], [], []
  for span in parts:
    slots, orders = [-1] * span.count, [0] * span.count
    if span.ids is not None:
      new = span.ids.tolist()
      if span.part.end:
        ends.append((len(ids) + span.count - 1, span.part.weight))
    else:
      codes = vocabulary.to_ids(cache.codes(span.part.image)).tolist()
      new = [vocabulary.image_begin, *codes, vocabulary.image_end]
      if not span.part.write:
        if span.part.image not in images:
          images.append(span.part.image)
        slots[1:-1] = [images.index(span.part.image)] * len(codes)
        orders[1:-1] = range(len(codes))
    ids += new
    slot += slots
    order += orders
    weights += [span.part.weight] * span.count
  targets, weights = ids[1:], weights[1:]
  for place, weight in ends:
    if place < len(targets):  # the very last id is </s> already
      targets[place], weights[place] = vocabulary_lib.EOS_ID, weight
  return Sequence(
    tokens=np.array(ids[:-1], np.int32),
    targets=np.array(targets, np.int32),
    weights=np.array(weights, np.float32),
    slot=np.array(slot[:-1], np.int32),
    order=np.array(order[:-1], np.int32),
    images=tuple(images),
  )


def build(example, cache, tokenizer, vocabulary):
  """Makes the Sequence of one example: `assemble` of its `spans`.

  An image followed by "red": [IMG] c0 c1 [/IMG] ▁red </s> becomes the five
  tokens [IMG] c0 c1 [/IMG] ▁red with the targets c0 c1 [/IMG] ▁red </s>,
  slot -1 0 0 -1 -1 and order 0 0 1 0 0.
  """
  return assemble(spans(example, cache, tokenizer), cache, vocabulary)


def _count(example, part, cache):
  """Number of codes of an image; errors.DataError without a cache."""
  if cache is None:
    raise errors.DataError(
      f"Example {example.key} has an image, but its source has no code cache."
      " Run `lavit tokenize --data … --out DIR` and give DIR as its cache."
    )
  count = int(cache.counts[part.image])
  if count < 1:
    raise Unusable(f"image {part.image} could not be tokenised")
  return count
