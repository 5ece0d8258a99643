"""The one place that knows the id layout: text | [IMG] [/IMG] | codes.

With 32,000 text pieces and 16,384 codes (the paper's sizes):

  id        0     1    2     3 … 31999   32000   32001    32002 … 48385
  meaning   unk   <s>  </s>  pieces      [IMG]   [/IMG]   codes 0 … 16383

`Vocabulary` turns codes into ids and back and says which ids a kind of output
may not contain; `TextTokenizer` is the SentencePiece model below them.
"""

import dataclasses
import functools
import io
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from lavit_jax.core import errors
from lavit_jax.core.storage import files

UNK_ID = 0  # SentencePiece's own layout, the same in every LLaMA
BOS_ID = 1
EOS_ID = 2
_PAD_MULTIPLE = 128  # rows of embedding and head: divisible by any mesh


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Ids of `text_size` pieces, two image marks and `num_codes` codes.

  Vocabulary(32000, 16384) has image_begin 32000, image_end 32001,
  code_offset 32002, size 48386 and padded_size 48512.
  """

  text_size: int
  num_codes: int

  def __post_init__(self):
    if self.text_size <= EOS_ID or self.num_codes < 1:
      raise errors.ConfigError(
        f"text_size={self.text_size}, num_codes={self.num_codes}: a vocabulary"
        f" needs more than {EOS_ID + 1} text pieces and at least one code."
        " Take text_size from the text tokenizer and num_codes from the"
        " quantizer's config."
      )

  @property
  def image_begin(self) -> int:
    """[IMG], the token before an image."""
    return self.text_size

  @property
  def image_end(self) -> int:
    """[/IMG], the token that ends an image."""
    return self.text_size + 1

  @property
  def code_offset(self) -> int:
    """The id of code 0."""
    return self.text_size + 2

  @property
  def size(self) -> int:
    """Ids in use: 0 … size-1."""
    return self.text_size + 2 + self.num_codes

  @property
  def padded_size(self) -> int:
    """Rows of embedding and head: `size` up to a multiple of 128."""
    return -(-self.size // _PAD_MULTIPLE) * _PAD_MULTIPLE

  @property
  def eos_id(self) -> int:
    """</s>, the token that ends a document or an answer."""
    return EOS_ID

  @property
  def pad_id(self) -> int:
    """What fills the unused places of a row (never read: masked)."""
    return UNK_ID

  def to_ids(self, codes) -> np.ndarray:
    """Codes int[...] in 0 … num_codes-1 to ids int32[...].

    Raises DataError naming the first value that is no code.
    """
    codes = np.asarray(codes)
    bad = (codes < 0) | (codes >= self.num_codes)
    if bad.any():
      raise errors.DataError(
        f"{codes[bad].flat[0]} is not a code: codes run from 0 to"
        f" {self.num_codes - 1}. Was the data tokenized with another"
        " tokenizer? Run `lavit tokenize` again with this one."
      )
    return (codes + self.code_offset).astype(np.int32)

  def to_codes(self, ids) -> np.ndarray:
    """Ids int[...] of codes to codes int32[...].

    Raises DataError naming the first id that stands for no code.
    """
    ids = np.asarray(ids)
    bad = ~self.is_code(ids)
    if bad.any():
      raise errors.DataError(
        f"id {ids[bad].flat[0]} is not a visual code: these run from"
        f" {self.code_offset} to {self.size - 1}. Cut the text and the image"
        " marks away first (`codes_of` does)."
      )
    return (ids - self.code_offset).astype(np.int32)

  def is_code(self, ids) -> np.ndarray:
    """bool[...], True where an id stands for a visual code."""
    ids = np.asarray(ids)
    return (ids >= self.code_offset) & (ids < self.size)

  def codes_of(self, ids) -> np.ndarray:
    """The codes int32[k] of one sequence int[n], everything else dropped."""
    ids = np.asarray(ids)
    return self.to_codes(ids[self.is_code(ids)])

  def text_mask(self) -> np.ndarray:
    """bool[padded_size], True at text pieces (unk, <s> and </s> too)."""
    return np.arange(self.padded_size) < self.text_size

  def suppress_for_text(self) -> np.ndarray:
    """bool[padded_size], True at the ids a text may not contain."""
    return ~self.text_mask()

  def suppress_for_image(self, official: bool = False) -> np.ndarray:
    """bool[padded_size], True at the ids an image may not contain.

    Only codes and [/IMG] are left. The official code also leaves unk, <s>,
    </s> and [IMG] possible; `official` does the same, for equal numbers.
    """
    ids = np.arange(self.padded_size)
    allowed = self.is_code(ids) | (ids == self.image_end)
    if official:
      allowed |= (ids <= EOS_ID) | (ids == self.image_begin)
    return ~allowed


class BadText(errors.DataError):
  """A text that is no sequence of characters, and so has no ids."""


class TextTokenizer:
  """SentencePiece text pieces: unk 0, <s> 1, </s> 2, no marks added.

  Marks written out in a text ("</s>") are text like any other: a caption
  cannot end a document. The object is copied and pickled with its model.
  """

  def __init__(self, proto: bytes, name: str = "tokenizer"):
    """Builds from the bytes of a `tokenizer.model`; DataError if it is none."""
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
      raise errors.DataError(
        f"{name} is not a SentencePiece model ({len(proto)} bytes). Give the"
        " `tokenizer.model` of a LLaMA checkpoint, or one that"
        " TextTokenizer.train wrote."
      ) from error
    model = self._model
    found = (model.unk_id(), model.bos_id(), model.eos_id())
    if found != (UNK_ID, BOS_ID, EOS_ID):
      raise errors.DataError(
        f"{name} has unk, <s>, </s> at {found}, expected"
        f" {(UNK_ID, BOS_ID, EOS_ID)} as in every LLaMA. Train the model again"
        " with these ids."
      )
    self._proto = proto

  @classmethod
  def load(cls, path) -> "TextTokenizer":
    """Reads a `tokenizer.model`; UsageError where there is no file."""
    path = files.place(path)
    if not path.exists():
      raise errors.UsageError(
        f"No text tokenizer at {path}: expected a SentencePiece"
        " `tokenizer.model`. Check the path."
      )
    return cls(path.read_bytes(), str(path))

  @classmethod
  def train(
    cls, sentences: Iterable[str], path, vocab_size: int
  ) -> "TextTokenizer":
    """Trains byte-fallback BPE on `sentences`, writes it to `path`.

    The same sentences give the same model. `vocab_size` counts the three
    special and the 256 byte pieces; UsageError when it is out of reach,
    BadText for a sentence that holds half a character.
    """
    out = io.BytesIO()
    sentences = list(sentences)
    for sentence in sentences:
      _check_text(sentence)
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
      )
    except RuntimeError as error:
      raise errors.UsageError(
        f"A text tokenizer of vocab_size={vocab_size} cannot be trained on"
        f" these sentences: {error}. It needs 3 special, 256 byte and one"
        " piece a character, and no more than the text has to give: change"
        " vocab_size or give more text."
      ) from error
    tokenizer = cls(out.getvalue(), str(path))
    tokenizer.save(path)
    return tokenizer

  def save(self, path) -> None:
    """Writes the model where `load` reads it."""
    path = files.place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(self._proto)

  @functools.cached_property
  def size(self) -> int:
    """Number of text pieces, the text_size of the Vocabulary."""
    return self._model.get_piece_size()

  def encode(self, text: str) -> list[int]:
    """Text to ids without <s> or </s>: "" gives []; BadText says why not."""
    _check_text(text)
    return self._model.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Ids to text; unk, <s>, </s> are left out.

    Raises DataError for an id that is no text piece.
    """
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if not 0 <= i < self.size]:
      raise errors.DataError(
        f"id {bad[0]} is not a text piece: these run from 0 to"
        f" {self.size - 1}. Image marks and codes have no text; cut them away."
      )
    return self._model.decode([i for i in ids if i > EOS_ID])

  def __reduce__(self):
    """Pickles and copies by the model's bytes (grain workers need it)."""
    return type(self), (self._proto,)


def _check_text(text):
  """Raises BadText for what SentencePiece cannot take: no str, half of one.

  JSON ("\\ud83d") and command lines can hold lone surrogates, UTF-8 cannot.
  """
  if not isinstance(text, str):
    raise BadText(
      f"{text!r:.60} is a {type(text).__name__}, expected a text (str)."
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    start = error.start
    raise BadText(
      f"A text holds half a character, {text[start]!r}, at place {start}:"
      f" {text[max(0, start - 20) : start + 20]!r}. It was cut off, or is no"
      " UTF-8: mend it, or leave it out."
    ) from None
