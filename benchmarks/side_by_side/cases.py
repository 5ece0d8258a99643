"""The work that is timed: sizes of the model, cases, and their inputs.

Knows neither JAX nor PyTorch, as both sides read it.
"""

import dataclasses

import numpy as np
import PIL.Image

from lavit_jax.core import image_io, vocabulary

GUIDANCE = 4.0
TOP_K = 50
BATCHES = (1, 8)
_SMALL_PROMPT, _SMALL_NEW = 9, 6  # what --small cuts prompts and texts to
_BLOBS = 12  # an image is so many random colours a side, made smooth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes of the language model, the encoder and the tokenizer."""

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  image_size: int
  patch_size: int
  vit_width: int
  vit_depth: int
  vit_heads: int
  merger_depth: int
  text_size: int
  num_codes: int

  @property
  def vocabulary(self) -> vocabulary.Vocabulary:
    """Text pieces, [IMG], [/IMG] and codes."""
    return vocabulary.Vocabulary(self.text_size, self.num_codes)


FULL = Sizes(
  width=768,
  depth=12,
  num_heads=12,
  mlp_dim=2048,
  image_size=224,
  patch_size=14,
  vit_width=768,
  vit_depth=12,
  vit_heads=12,
  merger_depth=4,
  text_size=32000,
  num_codes=16384,
)
SMALL = Sizes(
  width=32,
  depth=2,
  num_heads=4,
  mlp_dim=64,
  image_size=84,
  patch_size=14,
  vit_width=32,
  vit_depth=2,
  vit_heads=4,
  merger_depth=2,
  text_size=300,
  num_codes=64,
)
CODE_DIM = 32
SHARE_KEPT = 1 / 3  # of the patches, on the average over images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One kind of work; counts are of tokens, for one row of the batch.

  Attributes:
    kind: "beam" (continuous prompt, text is written), "draw" (ids, [IMG];
      codes are written, guided, sampled) or "tokenize".
    unit: what is counted a second.
    count: how many of it a row makes; 0 where a rate says nothing.
    merger_form: of our tokenizer; PyTorch's is the official one always.
  """

  name: str
  kind: str
  unit: str = "tokens"
  count: int = 0
  prompt: int = 0
  new_tokens: int = 0
  num_beams: int = 1
  length_penalty: float = 1.0
  early_stopping: bool = False
  merger_form: str = ""


def _caption(name, new_tokens, count):
  return Case(
    name=name,
    kind="beam",
    count=count,
    prompt=87,
    new_tokens=new_tokens,
    num_beams=2,
  )


def _draw(name, new_tokens, count):
  return Case(
    name=name, kind="draw", count=count, prompt=21, new_tokens=new_tokens
  )


def _tokenize(form):
  name = f"tokenize_{form}"
  return Case(
    name=name, kind="tokenize", unit="images", count=1, merger_form=form
  )


CASES = (
  _caption("caption", 36, 36),
  Case(
    name="vqa",
    kind="beam",
    count=10,
    prompt=100,
    new_tokens=10,
    num_beams=5,
    length_penalty=0.0,
    early_stopping=True,
  ),
  _draw("draw", 85, 85),
  _tokenize("reference"),
  _tokenize("compact"),
  _caption("first_token_caption", 1, 0),
  _draw("first_token_draw", 1, 0),
)


def chosen(prefixes, small: bool) -> list[Case]:
  """The cases whose name starts with one of the prefixes, or all."""
  found = [
    case
    for case in CASES
    if not prefixes or case.name.startswith(tuple(prefixes))
  ]
  return [_cut(case) for case in found] if small else found


def _cut(case):
  new_tokens = min(case.new_tokens, _SMALL_NEW)
  return dataclasses.replace(
    case,
    prompt=min(case.prompt, _SMALL_PROMPT),
    new_tokens=new_tokens,
    count=min(case.count, max(new_tokens, 1)),
  )


def embeds(case: Case, sizes: Sizes, batch: int) -> np.ndarray:
  """A continuous prompt float32[B, L, D]."""
  rng = np.random.default_rng(1)
  shape = (batch, case.prompt, sizes.width)
  return rng.standard_normal(shape, np.float32)


def drawing_prompt(case: Case, sizes: Sizes, batch: int) -> np.ndarray:
  """Text pieces, then [IMG]: int32[B, L]."""
  rng = np.random.default_rng(2)
  shape = (batch, case.prompt)
  ids = rng.integers(3, sizes.text_size, shape, dtype=np.int32)
  ids[:, -1] = sizes.vocabulary.image_begin
  return ids


def images(sizes: Sizes, batch: int) -> np.ndarray:
  """Blots of colour, some paler than others: uint8[B, H, W, 3]."""
  rng = np.random.default_rng(3)
  found = []
  for i in range(batch):
    pixels = rng.integers(0, 256, (_BLOBS, _BLOBS, 3))
    even = ((i + 1) % 4) / 16
    pixels = (1 - even) * pixels + even * pixels[0, 0]
    image = PIL.Image.fromarray(pixels.astype(np.uint8))
    found.append(image_io.to_uint8(image, sizes.image_size))
  return np.stack(found)


def suppressed(case: Case, sizes: Sizes) -> np.ndarray:
  """bool[V], V without padding: what this case never writes."""
  vocab = sizes.vocabulary
  if case.kind == "beam":
    return vocab.suppress_for_text()[: vocab.size]
  return vocab.suppress_for_image(official=True)[: vocab.size]


def eos_id(case: Case, sizes: Sizes) -> int:
  """What would end a row, were it not ruled out until the last token."""
  vocab = sizes.vocabulary
  return vocab.eos_id if case.kind == "beam" else vocab.image_end
