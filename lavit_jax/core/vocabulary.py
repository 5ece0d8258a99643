"""The layout of token ids: text | [IMG] [/IMG] | codes. No other file knows it.

With 32,000 text pieces and 16,384 codes (the paper's sizes):

  id        0     1    2     3 … 31999   32000   32001    32002 … 48385
  meaning   unk   <s>  </s>  pieces      [IMG]   [/IMG]   codes 0 … 16383

`Vocabulary` converts codes to ids and back, and tells which ids an output of
text or of images must not contain. `TextTokenizer` is a SentencePiece model.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from lavit_jax.core import errors
from lavit_jax.core.storage import files

UNK_ID = 0  # SentencePiece's layout, the same in every LLaMA
BOS_ID = 1
EOS_ID = 2
_MOST_THREADS = 16  # that tokenize texts at once
_PAD_MULTIPLE = 128  # of embedding and head rows, so that meshes divide them


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The ids of text pieces, two image marks and codes.

  Vocabulary(32000, 16384) has image_begin 32000, image_end 32001,
  code_offset 32002, size 48386 and padded_size 48512.

  Attributes:
    text_size: number of text pieces.
    num_codes: size of the codebook.
  """

  text_size: int
  num_codes: int

  def __post_init__(self):
    if self.text_size <= EOS_ID or self.num_codes < 1:
      raise errors.ConfigError(
        f"text_size={self.text_size}, num_codes={self.num_codes}: a vocabulary"
        f" needs at least {EOS_ID + 1} text pieces and one code. Take text_size"
        " from the text tokenizer and num_codes from the quantizer's config."
      )

  @property
  def image_begin(self) -> int:
    """Returns the id of [IMG], the token before an image."""
    return self.text_size

  @property
  def image_end(self) -> int:
    """Returns the id of [/IMG], the token after an image."""
    return self.text_size + 1

  @property
  def code_offset(self) -> int:
    """Returns the id of code 0."""
    return self.text_size + 2

  @property
  def size(self) -> int:
    """Returns the number of ids in use, which are 0 … size-1."""
    return self.text_size + 2 + self.num_codes

  @property
  def padded_size(self) -> int:
    """Returns the rows of embedding and head, `size` padded to a multiple."""
    return -(-self.size // _PAD_MULTIPLE) * _PAD_MULTIPLE

  @property
  def eos_id(self) -> int:
    """Returns the id of </s>, which ends a document or an answer."""
    return EOS_ID

  def to_ids(self, codes: npt.ArrayLike) -> np.ndarray:
    """Maps codes int[...] in 0 … num_codes-1 to ids int32[...].

    Raises:
      errors.DataError: a value is not a code.
    """
    codes = np.asarray(codes)
    if codes.size and (codes.min() < 0 or codes.max() >= self.num_codes):
      bad = (codes < 0) | (codes >= self.num_codes)
      raise errors.DataError(
        f"{codes[bad].flat[0]} is not a code: codes run from 0 to"
        f" {self.num_codes - 1}. Was the data tokenized with another tokenizer?"
        " Run `lavit tokenize` again with this one."
      )
    return (codes + self.code_offset).astype(np.int32)

  def to_codes(self, ids: npt.ArrayLike) -> np.ndarray:
    """Maps ids int[...] of codes to codes int32[...].

    Raises:
      errors.DataError: an id is not that of a code.
    """
    ids = np.asarray(ids)
    bad = ~self.is_code(ids)
    if bad.any():
      raise errors.DataError(
        f"id {ids[bad].flat[0]} is not a visual code: their ids are"
        f" {self.code_offset} to {self.size - 1}. Remove text and image marks"
        " first (`codes_of` does)."
      )
    return (ids - self.code_offset).astype(np.int32)

  def is_code(self, ids: npt.ArrayLike) -> np.ndarray:
    """Returns bool[...], True for the ids of codes."""
    ids = np.asarray(ids)
    return (ids >= self.code_offset) & (ids < self.size)

  def codes_of(self, ids: npt.ArrayLike) -> np.ndarray:
    """Returns the codes int32[k] in a sequence of ids int[n]."""
    ids = np.asarray(ids)
    return self.to_codes(ids[self.is_code(ids)])

  def text_mask(self) -> np.ndarray:
    """Returns bool[padded_size], True for text pieces, unk, <s> and </s>."""
    return np.arange(self.padded_size) < self.text_size

  def suppress_for_text(self) -> np.ndarray:
    """Returns bool[padded_size], True for ids that a text must not contain."""
    return ~self.text_mask()

  def suppress_for_image(self, official: bool = False) -> np.ndarray:
    """Returns bool[padded_size], True for ids that an image must not contain.

    Args:
      official: allow not only codes and [/IMG], but also unk, <s>, </s> and
        [IMG], as the official code does.
    """
    ids = np.arange(self.padded_size)
    allowed = self.is_code(ids) | (ids == self.image_end)
    if official:
      allowed |= (ids <= EOS_ID) | (ids == self.image_begin)
    return ~allowed


class BadText(errors.DataError):
  """A text is not a sequence of characters, and cannot be tokenized."""


class TextTokenizer:
  """A SentencePiece model with unk 0, <s> 1, </s> 2, which it does not add.

  Marks that are written in a text, such as "</s>", are plain text: a caption
  cannot end a document. Copies and pickles contain the model.
  """

  def __init__(self, proto: bytes, name: str = "tokenizer"):
    """Loads a model.

    Args:
      proto: the bytes of a `tokenizer.model`.
      name: of the model in messages.

    Raises:
      errors.DataError: it is not a SentencePiece model, or has other ids.
    """
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
      raise errors.DataError(
        f"{name} is not a SentencePiece model ({len(proto)} bytes). Give the"
        " `tokenizer.model` of a LLaMA checkpoint, or one that"
        " TextTokenizer.train wrote."
      ) from error
    model = self._model
    ids = (model.unk_id(), model.bos_id(), model.eos_id())
    if ids != (UNK_ID, BOS_ID, EOS_ID):
      raise errors.DataError(
        f"{name} has unk, <s>, </s> at {ids}, expected"
        f" {(UNK_ID, BOS_ID, EOS_ID)} as in every LLaMA. Train the model again"
        " with these ids."
      )
    self._proto = proto

  @classmethod
  def load(cls, path: files.PathLike) -> "TextTokenizer":
    """Reads a `tokenizer.model`; UsageError if the file does not exist."""
    file = files.input_path(path)
    if not file.exists():
      raise errors.UsageError(
        f"No text tokenizer at {file}: expected a SentencePiece"
        " `tokenizer.model`. Check the path."
      )
    return cls(file.read_bytes(), str(file))

  @classmethod
  def train(
    cls, sentences: Iterable[str], path: files.PathLike, vocab_size: int
  ) -> "TextTokenizer":
    """Trains BPE with byte fallback, and writes the model.

    The same sentences give the same model.

    Args:
      sentences: to train on.
      path: of the `tokenizer.model` to write.
      vocab_size: number of pieces, including three special and 256 byte ones.

    Raises:
      errors.UsageError: the sentences do not allow this vocab_size.
      BadText: a sentence has half a character.
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
        f" these sentences: {error}. It needs 3 special pieces, 256 byte pieces"
        " and one piece per character, and has at most as many as the text"
        " provides: change vocab_size or give more text."
      ) from error
    tokenizer = cls(out.getvalue(), str(path))
    tokenizer.save(path)
    return tokenizer

  def save(self, path: files.PathLike) -> None:
    """Writes the model to a file for `load`."""
    file = files.input_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(self._proto)

  @functools.cached_property
  def size(self) -> int:
    """Returns the number of text pieces, the text_size of a `Vocabulary`."""
    return self._model.get_piece_size()

  def encode(self, text: str) -> list[int]:
    """Maps a text to ids without <s> or </s>; "" gives [].

    Raises:
      BadText: SentencePiece cannot tokenize the text.
    """
    _check_text(text)
    return self._model.encode(text)

  def lengths(self, texts: Sequence[str]) -> list[int]:
    """Returns the number of ids of each text, computed on all cores.

    Raises:
      BadText: SentencePiece cannot tokenize one of them.
    """
    for text in texts:
      _check_text(text)
    if not texts:
      return []
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    encoded = self._model.encode(list(texts), num_threads=threads)
    return [len(ids) for ids in encoded]

  def decode(self, ids: Sequence[int]) -> str:
    """Maps ids to a text without unk, <s>, </s>.

    Raises:
      errors.DataError: an id is not that of a text piece.
    """
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if not 0 <= i < self.size]:
      raise errors.DataError(
        f"id {bad[0]} is not a text piece: their ids are 0 to {self.size - 1}."
        " Image marks and codes have no text; remove them first."
      )
    return self._model.decode([i for i in ids if i > EOS_ID])

  def __reduce__(self) -> tuple[Any, ...]:
    """Pickles and copies the model's bytes, as grain's workers need it."""
    return type(self), (self._proto,)


def _check_text(text):
  """Raises BadText for other types than str, and for half characters.

  JSON ("\\ud83d") and command lines can have lone surrogates, UTF-8 cannot.
  """
  if not isinstance(text, str):
    raise BadText(
      f"{text!r:.60} is a {type(text).__name__}; expected a text (str)."
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    start = error.start
    raise BadText(
      f"A text has half a character, {text[start]!r}, at position {start}:"
      f" {text[max(0, start - 20) : start + 20]!r}. It was cut off, or is not"
      " UTF-8: correct it, or leave it out."
    ) from None
