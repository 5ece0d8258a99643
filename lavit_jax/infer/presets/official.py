"""The official release's rules of inference, to the letter.

What `lavit port verify` holds a checkpoint to. The text rules are those of the
official understanding and generation classes (jy0205/LaVIT at commit 8cde9b4),
the settings those of their defaults. Quirks that are kept here, and not
elsewhere:

  - "3.14" is cut to "3": captions and answers end at the first ".";
  - a transparent image loses its transparency, whatever colour lies under
    it, and no orientation is heeded;
  - </s>, <s>, <unk> in a prompt are taken for the special tokens;
  - while drawing, ids 0, 1, 2 and [IMG] stay allowed (a weak model may write
    them into an image), and a negative prompt gets no [IMG];
  - a prompt of tokens makes its own length the longest image.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import image_io, vocabulary
from lavit_jax.infer.decoding import prompt_rows
from lavit_jax.models import llama, unified
from lavit_jax.models.tokenizer import merger, selector, tokenizer

QUESTION = "Question: {} Answer:"
# Beam search; one bos that the model never reads counts in a length.
CAPTION = {
  "num_beams": 2,
  "min_new_tokens": 8,
  "max_new_tokens": 36,
  "length_penalty": 1.0,
  "early_stopping": False,
  "length_offset": 1,
}
ANSWER = {
  "num_beams": 5,
  "min_new_tokens": 2,
  "max_new_tokens": 10,
  "length_penalty": 0.0,
  "early_stopping": True,
  "length_offset": 1,
}
DRAW = {"min_new_tokens": 20, "max_new_tokens": 200}
GUIDANCE_TEXT, GUIDANCE_MULTIMODAL = 4.0, 5.0
_SPECIAL = {
  "<unk>": vocabulary.UNK_ID,
  "<s>": vocabulary.BOS_ID,
  "</s>": vocabulary.EOS_ID,
}


def clean_caption(decoded: str) -> str:
  """The first sentence: " a dog. a cat" gives "a dog"."""
  return decoded.strip().split(".")[0]


def clean_answer(decoded: str) -> str:
  """The answer before lemmatisation: "red, or blue" gives "red"."""
  answer = decoded.strip()
  for end in ("\n", "question:", "Long answer:", ",", "."):
    answer = answer.split(end)[0]
  return answer


def clean_question(question: str, max_words: int = 50) -> str:
  """A question as the prompt wants it: "Is it 3:30?!" gives "is it 330?"."""
  question = re.sub(r"([.!\"()*#:;~])", "", question.lower()).rstrip(" ")
  words = question.split(" ")
  return " ".join(words[:max_words]) if len(words) > max_words else question


def preprocess(path, size: int) -> np.ndarray:
  """float32[size, size, 3], CLIP-normalised, of an image of our own."""
  image = image_io.load(path, plain=True)
  return image_io.normalize(image_io.to_uint8(image, size))


def encode(text: vocabulary.TextTokenizer, words: str) -> list[int]:
  """Ids of a text, special tokens read as such, no <s> added."""
  ids = []
  for piece in re.split(r"(<unk>|</?s>)", words):
    if piece:
      ids += [_SPECIAL[piece]] if piece in _SPECIAL else text.encode(piece)
  return ids


def suppress_for_text(vocab: vocabulary.Vocabulary) -> np.ndarray:
  """bool[size]: image marks and codes; rows of padding stay allowed."""
  return vocab.suppress_for_text()[: vocab.size]


def suppress_for_image(vocab: vocabulary.Vocabulary) -> np.ndarray:
  """bool[size]: text pieces but 0, 1 and 2; rows of padding stay allowed."""
  return vocab.suppress_for_image(official=True)[: vocab.size]


@dataclasses.dataclass(frozen=True)
class Model:
  """The networks of an imported checkpoint, with their parameters.

  Attributes:
    encoder: params of the ViT.
    visual: variables of the tokenizer that writes ids (its stage-1 weights).
    language: params `llm`, `merger`, `projection` and, where the overlay for
      understanding has one, `selector`.
    text: the SentencePiece model.
  """

  config: tokenizer.TokenizerConfig
  llama_config: llama.LlamaConfig
  vocab: vocabulary.Vocabulary
  encoder: Mapping
  visual: Mapping
  language: Mapping
  text: vocabulary.TextTokenizer

  @property
  def llm(self) -> llama.Llama:
    """The language model, hashable."""
    return llama.Llama(self.llama_config)

  def features(self, pixels) -> jax.Array:
    """float[B, N, D] of float[B, H, W, 3], CLIP-normalised."""
    return tokenizer.encode_images(self.config, self.encoder, pixels)

  def log_probs(self, features, reading: bool = False) -> jax.Array:
    """Selector's log-probabilities float[B, N, 2], of the branch that reads."""
    params = self.visual["params"]
    if reading and "selector" in self.language:
      params = self.language
    net = selector.TokenSelector(self.config.selector)
    return net.apply({"params": params["selector"]}, features)

  def merged(self, features, mask, reading: bool = False) -> jax.Array:
    """The merger at all positions, float[B, N, D]; mask float[B, N]."""
    params = self.language if reading else self.visual["params"]
    net = merger.TokenMerger(self.config.merger)
    return net.apply({"params": params["merger"]}, features, mask)

  def codes(self, pixels, gumbel):
    """Ids of images under given noise, all rows as long as there are patches.

    Args:
      pixels: float[B, H, W, 3].
      gumbel: float[B, N, 2], -log(Exp(1)).

    Returns:
      (ids int[B, N] of the vocabulary, valid bool[B, N]).
    """
    features = self.features(pixels)
    keep = selector.mask_from_noise(self.log_probs(features), gumbel)
    net = tokenizer.DynamicVisualTokenizer(self.config)
    _, codes, valid = net.apply(
      self.visual,
      features,
      keep.astype(bool),
      self.config.num_patches,
      method="encode",
    )
    return np.asarray(codes) + self.vocab.code_offset, np.asarray(valid)

  def read(self, pixels, gumbel):
    """Continuous tokens float[B, N, W] of images, and valid bool[B, N]."""
    features = self.features(pixels)
    log_probs = self.log_probs(features, reading=True)
    keep = selector.mask_from_noise(log_probs, gumbel).astype(bool)
    net = unified.UnifiedModel(
      self.llama_config, self.config, self.config.num_patches
    )
    params = {k: v for k, v in self.language.items() if k != "selector"}
    return net.apply({"params": params}, features, keep, method="read")

  def prompt(
    self, rows: Sequence[Sequence], length: int | None = None
  ) -> dict[str, np.ndarray]:
    """Left-padded prompt of rows of ids and float[k, W] continuous tokens."""
    width, eos = self.llama_config.width, vocabulary.EOS_ID
    return prompt_rows.padded(rows, width, length=length, pad_id=eos)

  def reading_rows(self, pixels, gumbel, words=None) -> list[list]:
    """Rows [IMG] image [/IMG] ids of words, an image a row."""
    tokens, valid = (np.asarray(x) for x in self.read(pixels, gumbel))
    rows = []
    for i in range(len(tokens)):
      image = tokens[i][valid[i]]
      row = [self.vocab.image_begin, image, self.vocab.image_end]
      rows.append(row + list(words[i] if words else []))
    return rows

  def embedded(self, prompt) -> jax.Array:
    """What the language model takes a prompt as, float[B, L, W]."""
    return self.llm.apply(
      {"params": self.language["llm"]},
      jnp.asarray(prompt["tokens"]),
      prompt.get("embeds"),
      prompt.get("use_embeds"),
      method="embed",
    )
