"""Inference exactly as in the official release.

`lavit port verify` compares checkpoints with it. Texts are treated as in the
official understanding and generation classes (jy0205/LaVIT at commit 8cde9b4),
and the settings are their defaults. These quirks exist here alone:

  - "3.14" is cut to "3": captions and answers end at the first ".";
  - a transparent image loses its transparency, whatever colour lies under
    it, and the orientation of an image is ignored;
  - </s>, <s>, <unk> in a prompt are the special tokens;
  - while an image is generated, ids 0, 1, 2 and [IMG] stay allowed (a weak
    model may put them into an image), and a negative prompt gets no [IMG];
  - a prompt with images limits an image to the length of the prompt.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import image_io, vocabulary
from lavit_jax.infer.decoding import prompt_rows
from lavit_jax.models import llama, unified
from lavit_jax.models.tokenizer import merger, selector, tokenizer

Array = jax.Array | np.ndarray

QUESTION = "Question: {} Answer:"
# Beam search; a length counts one bos, which the model never reads.
CAPTION: dict[str, Any] = {
  "num_beams": 2,
  "min_new_tokens": 8,
  "max_new_tokens": 36,
  "length_penalty": 1.0,
  "early_stopping": False,
  "length_offset": 1,
}
ANSWER: dict[str, Any] = {
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
  """Returns the first sentence: " a dog. a cat" gives "a dog"."""
  return decoded.strip().split(".")[0]


def clean_answer(decoded: str) -> str:
  """Returns the answer without lemmas: "red, or blue" gives "red"."""
  answer = decoded.strip()
  for end in ("\n", "question:", "Long answer:", ",", "."):
    answer = answer.split(end)[0]
  return answer


def clean_question(question: str, max_words: int = 50) -> str:
  """Cleans a question for the prompt: "Is it 3:30?!" gives "is it 330?"."""
  question = re.sub(r"([.!\"()*#:;~])", "", question.lower()).rstrip(" ")
  words = question.split(" ")
  return " ".join(words[:max_words]) if len(words) > max_words else question


def preprocess(path: Any, size: int) -> np.ndarray:
  """Loads an image, CLIP-normalised: float32[size, size, 3]."""
  image = image_io.load(path, plain=True)
  return image_io.normalize(image_io.to_uint8(image, size))


def encode(text: vocabulary.TextTokenizer, words: str) -> list[int]:
  """Returns the ids of a text with its special tokens; adds no <s>."""
  ids: list[int] = []
  for piece in re.split(r"(<unk>|</?s>)", words):
    if piece:
      ids += [_SPECIAL[piece]] if piece in _SPECIAL else text.encode(piece)
  return ids


def suppress_for_text(vocab: vocabulary.Vocabulary) -> np.ndarray:
  """Returns bool[size]: image marks and codes, but no padding rows."""
  return vocab.suppress_for_text()[: vocab.size]


def suppress_for_image(vocab: vocabulary.Vocabulary) -> np.ndarray:
  """Returns bool[size]: text pieces but 0, 1, 2; and no padding rows."""
  return vocab.suppress_for_image(official=True)[: vocab.size]


def apply(net: Any, variables: Any, *args: Any, **options: Any) -> Any:
  """Applies a network as one program, not operation by operation.

  Args:
    net: a Flax module.
    variables: its variables.
    *args: arrays.
    **options: arrays by name; a bool, an int or a str is static.

  Returns:
    What `net.apply` returns.
  """
  static = tuple(
    (name, options.pop(name))
    for name in sorted(options)
    if isinstance(options[name], bool | int | str)
  )
  return _apply(net, static, variables, args, options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(net, static, variables, args, options):
  return net.apply(variables, *args, **options, **dict(static))


_encode_images = jax.jit(tokenizer.encode_images, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Model:
  """The networks of an imported checkpoint, with their parameters.

  Attributes:
    config: of encoder and visual tokenizer.
    llama_config: of the LLM.
    vocab: the id layout of the LLM.
    encoder: params of the ViT.
    visual: variables of the tokenizer (its stage-1 weights).
    language: params `llm`, `merger`, `projection` and, if the weights for
      understanding have one, `selector`.
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

  def features(self, pixels: Array) -> jax.Array:
    """Encodes float[B, H, W, 3], CLIP-normalised, to float[B, N, D]."""
    return _encode_images(self.config, self.encoder, jnp.asarray(pixels))

  def log_probs(self, features: Array, reading: bool = False) -> jax.Array:
    """Returns log-probabilities of keep and drop, float[B, N, 2].

    Args:
      features: float[B, N, D].
      reading: with the selector for understanding, if there is one.
    """
    params = self.visual["params"]
    if reading and "selector" in self.language:
      params = self.language
    net = selector.TokenSelector(self.config.selector)
    return apply(net, {"params": params["selector"]}, features)

  def merged(
    self, features: Array, mask: Array, reading: bool = False
  ) -> jax.Array:
    """Applies the merger at all positions: float[B, N, D].

    Args:
      features: float[B, N, D].
      mask: float[B, N], 1 at kept patches.
      reading: with the merger for understanding.
    """
    params = self.language if reading else self.visual["params"]
    net = merger.TokenMerger(self.config.merger)
    return apply(net, {"params": params["merger"]}, features, mask)

  def codes(
    self, pixels: Array, gumbel: Array
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of images, selected with recorded noise.

    Args:
      pixels: float[B, H, W, 3].
      gumbel: float[B, N, 2], -log(Exp(1)).

    Returns:
      (ids int[B, N] of the vocabulary, valid bool[B, N]).
    """
    features = self.features(pixels)
    log_probs = self.log_probs(features)
    keep = selector.mask_from_noise(log_probs, jnp.asarray(gumbel))
    _, codes, valid = apply(
      tokenizer.DynamicVisualTokenizer(self.config),
      self.visual,
      features,
      keep.astype(bool),
      capacity=self.config.num_patches,
      method="encode",
    )
    return np.asarray(codes) + self.vocab.code_offset, np.asarray(valid)

  def read(self, pixels: Array, gumbel: Array) -> tuple[jax.Array, jax.Array]:
    """Returns continuous tokens float[B, N, W] and valid bool[B, N].

    Args:
      pixels: float[B, H, W, 3].
      gumbel: float[B, N, 2], as for `codes`.
    """
    features = self.features(pixels)
    log_probs = self.log_probs(features, reading=True)
    keep = selector.mask_from_noise(log_probs, jnp.asarray(gumbel))
    net = unified.UnifiedModel(
      self.llama_config, self.config, self.config.num_patches
    )
    params = {k: v for k, v in self.language.items() if k != "selector"}
    return apply(
      net, {"params": params}, features, keep.astype(bool), method="read"
    )

  def prompt(
    self, rows: Sequence[Sequence], length: int | None = None
  ) -> dict[str, np.ndarray]:
    """Pads rows of ids and float[k, W] continuous tokens on the left."""
    width, eos = self.llama_config.width, vocabulary.EOS_ID
    return prompt_rows.padded(rows, width, length=length, pad_id=eos)

  def reading_rows(
    self,
    pixels: Array,
    gumbel: Array,
    words: Sequence[Sequence[int]] | None = None,
  ) -> list[list]:
    """Returns a row [IMG] image [/IMG] words for each image.

    Args:
      pixels: float[B, H, W, 3].
      gumbel: float[B, N, 2], as for `codes`.
      words: ids of the text after each image.
    """
    tokens, valid = (np.asarray(x) for x in self.read(pixels, gumbel))
    rows = []
    for i in range(len(tokens)):
      image = tokens[i][valid[i]]
      row = [self.vocab.image_begin, image, self.vocab.image_end]
      rows.append(row + list(words[i] if words else []))
    return rows

  def embedded(self, prompt: Mapping[str, Array]) -> jax.Array:
    """Returns the input embeddings of a padded prompt, float[B, L, W]."""
    return apply(
      self.llm,
      {"params": self.language["llm"]},
      jnp.asarray(prompt["tokens"]),
      prompt.get("embeds"),
      prompt.get("use_embeds"),
      method="embed",
    )
