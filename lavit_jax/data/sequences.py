"""Turns examples into token sequences, LaVIT's unified form (section 3.2).

  image read:     [IMG] continuous tokens [/IMG]   (targets are its codes)
  image written:  [IMG] code ids [/IMG]
  text:             pieces; </s> ends a document whose last part is text

There is no <s>. An image that ends a document is ended by [/IMG] alone.

Within a dialogue </s> is the target at the last token of each answer
(`examples.TextPart.end`), but never an input: the tokens before a later
question are those of a prompt with the same texts (`infer/prompts`, where a
text cannot hold </s>), and the question itself is not learnt. Training and
prompts both take a text's ids from `text_ids`, which knows neither the speaker
nor what follows: where a prompt ends, generation starts as in training.
"""

import dataclasses
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core import vocabulary as vocabulary_lib
from lavit_jax.data import examples


class Codes(Protocol):
  """Code ids and keep masks of a source's images: what a CodeCache reads."""

  directory: Any
  meta: Any  # a caches.codes.Meta
  counts: np.ndarray  # int32[num_images], codes of each image; -1: bad image

  def __len__(self) -> int: ...

  @property
  def num_patches(self) -> int:
    """N, patches of an image."""

  def keep(self, i: int) -> np.ndarray:
    """Returns which patches of image i are kept, bool[N]."""

  def codes(self, i: int) -> np.ndarray:
    """Returns the code ids of image i, int32[k]."""


class Unusable(Exception):
  """An example that cannot become a sequence, and is skipped; says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
  """One document of n positions; position j predicts token j + 1.

  Where an answer within a dialogue ends, </s> is predicted instead.

  Attributes:
    tokens: int32[n], inputs.
    targets: int32[n].
    weights: float32[n], loss weight of each target.
    image_index: int32[n], index into `images` of the image whose continuous
      token is the input at this position; -1 for none.
    token_index: int32[n], which merged token of that image it is; 0 elsewhere.
    images: indices of the images that are read, in reading order, each once.
  """

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  image_index: np.ndarray
  token_index: np.ndarray
  images: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.tokens)


def text_ids(
  tokenizer: vocabulary_lib.TextTokenizer, text: str, before: str = ""
) -> list[int]:
  r"""Returns the ids of one text part: " red" has those of "red".

  SentencePiece puts a space before each text, so a space that joins a part to
  the one before it is dropped. Where other white space separates them, none is
  added: "- one" after "List:\n" has the ids that it has in "List:\n- one",
  unless a piece of that text spans the boundary. So the ids of the first texts
  never depend on those that follow, however texts are weighted.

  Args:
    tokenizer: a vocabulary.TextTokenizer.
    text: of the part.
    before: the text right before it; "" after an image and at the start.

  Raises:
    vocabulary.BadText: the text cannot be encoded.
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
  """A part with its ids.

  Attributes:
    part: the part.
    ids: int32[count]; None for an image, whose codes `assemble` reads.
    count: number of ids, of [IMG] and [/IMG] too.
  """

  part: examples.Part
  ids: np.ndarray | None
  count: int

  @classmethod
  def of(cls, part: examples.Part, ids: SequenceOf[int] | np.ndarray) -> "Span":
    """Returns the span of a text part with these ids."""
    return cls(part, np.asarray(ids, np.int32), len(ids))

  def ended(self) -> "Span":
    """Returns the span of the same text with </s> after it."""
    assert self.ids is not None
    ids = np.empty(self.count + 1, np.int32)
    ids[:-1], ids[-1] = self.ids, vocabulary_lib.EOS_ID
    return Span.of(self.part, ids)


def spans(
  example: examples.Example,
  cache: Codes | None,
  tokenizer: vocabulary_lib.TextTokenizer,
) -> tuple[Span, ...]:
  """Returns the parts of an example with their lengths, </s> included.

  Reads only the counts of the cache, neither images nor codes.

  Args:
    example: the example.
    cache: the source's CodeCache; None if the example has no image.
    tokenizer: a vocabulary.TextTokenizer.

  Raises:
    Unusable: an image could not be tokenised, a text is empty (a document's
      empty texts are left out) or cannot be encoded, or nothing has a weight.
    errors.DataError: the example has an image, but there is no cache.
  """
  out: list[Span] = []
  before = ""
  for part in example.parts:
    if isinstance(part, examples.ImagePart):
      count = _count(example, part, cache)
      if count > 0:
        out.append(Span(part, None, count + 2))
        before = ""
      elif not part.optional:
        raise Unusable(f"image {part.image} could not be tokenised")
      continue
    try:
      ids = text_ids(tokenizer, part.text, before)
    except vocabulary_lib.BadText as error:
      raise Unusable(str(error)) from error
    before = part.text or before
    if ids:
      out.append(Span.of(part, ids))
    elif example.task != "document":
      raise Unusable("has an empty text")
  if not out:
    raise Unusable("is empty")
  if out[-1].ids is not None:
    out[-1] = out[-1].ended()
  _check_learnt(out)
  return tuple(out)


def _check_learnt(parts):
  """Raises Unusable unless a target has a weight; the first id is no target."""
  if not any(s.part.weight and (s.count > 1 or i) for i, s in enumerate(parts)):
    raise Unusable("holds nothing to learn: no part has a weight")


def size(parts: SequenceOf[Span]) -> tuple[int, int]:
  """Returns (positions, images read) of the Sequence `assemble` will make."""
  read = {
    s.part.image
    for s in parts
    if isinstance(s.part, examples.ImagePart) and not s.part.write
  }
  return sum(s.count for s in parts) - 1, len(read)


def assemble(
  parts: SequenceOf[Span],
  cache: Codes | None,
  vocabulary: vocabulary_lib.Vocabulary,
) -> Sequence:
  """Returns the Sequence of `spans`; reads codes, but no image."""
  images: list[int] = []
  total = sum(span.count for span in parts)
  ids = np.empty(total, np.int32)
  weights = np.empty(total, np.float32)
  image_index = np.full(total, -1, np.int32)
  token_index = np.zeros(total, np.int32)
  start = 0
  for span in parts:
    stop = start + span.count
    weights[start:stop] = span.part.weight
    if span.ids is not None:
      ids[start:stop] = span.ids
    else:
      part, inner = span.part, slice(start + 1, stop - 1)
      assert isinstance(part, examples.ImagePart)
      assert cache is not None
      ids[start], ids[stop - 1] = vocabulary.image_begin, vocabulary.image_end
      ids[inner] = vocabulary.to_ids(cache.codes(part.image))
      if not part.write:
        if part.image not in images:
          images.append(part.image)
        image_index[inner] = images.index(part.image)
        token_index[inner] = np.arange(span.count - 2)
    start = stop
  weights = weights[1:]
  targets, last = ids[1:].copy(), -1
  for span in parts:
    last += span.count  # index of its last id; the very last id is </s> already
    ends = isinstance(span.part, examples.TextPart) and span.part.end
    if ends and last < len(targets):
      targets[last], weights[last] = vocabulary_lib.EOS_ID, span.part.weight
  return Sequence(
    tokens=ids[:-1],
    targets=targets,
    weights=weights,
    image_index=image_index[:-1],
    token_index=token_index[:-1],
    images=tuple(images),
  )


def build(
  example: examples.Example,
  cache: Codes | None,
  tokenizer: vocabulary_lib.TextTokenizer,
  vocabulary: vocabulary_lib.Vocabulary,
) -> Sequence:
  """Returns the Sequence of one example: `assemble` of its `spans`.

  An image followed by "red": [IMG] c0 c1 [/IMG] ▁red </s> becomes the five
  tokens [IMG] c0 c1 [/IMG] ▁red with the targets c0 c1 [/IMG] ▁red </s>,
  image_index -1 0 0 -1 -1 and token_index 0 0 1 0 0.
  """
  return assemble(spans(example, cache, tokenizer), cache, vocabulary)


def _count(example, part, cache):
  """Returns the number of codes of an image, -1 for a bad one."""
  if cache is None:
    raise errors.DataError(
      f"Example {example.key} has an image, but its source has no code cache."
      " Run `lavit tokenize --data … --out DIR` and give DIR as its cache."
    )
  return int(cache.counts[part.image])
