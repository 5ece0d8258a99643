"""class LaVIT: one model that tokenizes, describes, answers and draws.

Loads a model directory (`checkpoints.py`) and offers the tasks of the paper.
Inputs are paths, PIL images or uint8 arrays, one or a list; a single input
gives a single output. Batches are padded to a few sizes and prompts to
multiples of 16, so that each padded shape compiles once.
"""

import importlib.resources
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from lavit_jax import checkpoints, errors, images, vocabulary
from lavit_jax.data import examples, sequences
from lavit_jax.infer import decode, diffusion, visual
from lavit_jax.models import llama, pixels, unified

BATCHES = (1, 4, 16, 64)
_PROMPT_MULTIPLE = 16
# Of the LLM over visual words: with `tiny` better than the official 3 and 1.
GUIDANCE_SCALE = 2.0
TEMPERATURE = 0.5


def resolve(model) -> pathlib.Path:
  """The directory of a model: a path, or "tiny" for the shipped one.

  Raises:
    errors.CheckpointError: there is nothing of that name.
  """
  if str(model) == "tiny":
    path = importlib.resources.files("lavit_jax") / "weights" / "tiny"
    if not pathlib.Path(str(path)).is_dir():
      raise errors.CheckpointError(
        "The shipped model 'tiny' is missing from this installation"
        f" ({path}). Reinstall lavit_jax, or train one: lavit quickstart."
      )
    return pathlib.Path(str(path))
  path = pathlib.Path(model)
  if (path / "model").is_dir() and not checkpoints.parts_in(path):
    path = path / "model"  # a quickstart workdir
  if not checkpoints.parts_in(path):
    raise errors.CheckpointError(
      f"{model} is no model directory: none of the parts"
      f" {', '.join(checkpoints.PARTS)} is in it. Give 'tiny', the model_dir"
      " of a training run, or the workdir of lavit quickstart."
    )
  return path


class LaVIT:
  """A loaded model. Make one with `LaVIT.load("tiny")` or a directory."""

  def __init__(self, directory, *, seed: int = 0):
    self.directory = pathlib.Path(directory)
    self.parts = checkpoints.parts_in(directory)
    self._seed = seed
    self._loaded: dict[str, Any] = {}

  @classmethod
  def load(cls, model="tiny", *, seed: int = 0) -> "LaVIT":
    """Opens a model directory; each part is read when it is first needed."""
    return cls(resolve(model), seed=seed)

  # Parts, read on first use ------------------------------------------------

  def _part(self, name, make):
    if name not in self._loaded:
      self._loaded[name] = make()
    return self._loaded[name]

  @property
  def visual(self) -> visual.VisualTokenizer:
    """Encoder and visual tokenizer."""
    return self._part(
      "visual",
      lambda: visual.VisualTokenizer(
        checkpoints.load_part(self.directory, "encoder"),
        checkpoints.load_part(self.directory, "tokenizer"),
      ),
    )

  @property
  def text(self) -> vocabulary.TextTokenizer:
    """The SentencePiece model of the text half of the vocabulary."""
    path = self.directory / "tokenizer.model"
    return self._part("text", lambda: vocabulary.TextTokenizer.load(path))

  @property
  def _llm(self):
    return self._part("llm", lambda: _Language(self.directory, self.visual))

  @property
  def _pixels(self):
    return self._part("pixels", lambda: _Pixels(self.directory))

  # Pictures to tokens and back --------------------------------------------

  def tokenize(self, pictures, *, seed: int | None = None, budget=None):
    """Visual tokens of pictures.

    Args:
      pictures: one or a list.
      seed: sample the selection as the paper does; None is deterministic.
      budget: keep exactly this many patches, instead of the expected number.

    Returns:
      For each picture a dict: `keep` bool[N] (patches kept, raster order)
      and `codes` int32[k] (their code numbers).
    """
    batch, single = self._batch(pictures)
    tokens = [
      self.visual.tokenize(chunk, seed=seed, budget=budget, count=count)
      for chunk, count in _chunks(batch)
    ]
    out = [row for chunk in tokens for row in chunk]
    return out[0] if single else out

  def reconstruct(self, pictures, *, seed: int = 0, steps: int = 20):
    """Pictures redrawn from their own tokens, without the LLM."""
    tokens = self.tokenize(pictures)
    single = isinstance(tokens, dict)
    rows = [tokens] if single else tokens
    drawn = self.draw_codes(
      [row["codes"] for row in rows], seed=seed, steps=steps
    )
    return drawn[0] if single else drawn

  def draw_codes(
    self,
    codes: Sequence[np.ndarray],
    *,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 1.0,
  ) -> list[PIL.Image.Image]:
    """Paints pictures from lists of code numbers int[k], 1 <= k <= N.

    Picture i takes the noise of seed + i, whatever the batch.
    """
    drawn = []
    for start in range(0, len(codes), BATCHES[-1]):
      chunk = codes[start : start + BATCHES[-1]]
      size = _padded_size(len(chunk))
      rows = list(chunk) + [chunk[-1]] * (size - len(chunk))
      x_rec = self.visual.features_of(rows)
      seeds = jnp.arange(size, dtype=jnp.int32) + seed + start
      arrays = self._pixels.draw(x_rec, seeds, steps, guidance_scale)
      drawn += [images.to_pil(a) for a in arrays[: len(chunk)]]
    return drawn

  # Pictures to words --------------------------------------------------------

  def caption(self, pictures, *, prompt: str = "", max_new_tokens: int = 64):
    """Describes one picture or a list of them: str or list[str]."""
    batch, single = self._batch(pictures)
    out = self._read_then_write(batch, [prompt] * len(batch), max_new_tokens)
    return out[0] if single else out

  def answer(self, pictures, questions, *, max_new_tokens: int = 12):
    """Answers a question about each picture: str or list[str].

    One picture and several questions, or equally many of both.
    """
    batch, _ = self._batch(pictures)
    single = isinstance(questions, str)
    asked = [questions] if single else list(questions)
    if len(batch) == 1:
      batch = np.repeat(batch, len(asked), axis=0)
    if len(batch) != len(asked):
      raise errors.UsageError(
        f"{len(batch)} pictures and {len(asked)} questions: give one question"
        " a picture, or several about one picture."
      )
    prompts = [examples.QUESTION.format(q.strip()) for q in asked]
    out = self._read_then_write(batch, prompts, max_new_tokens)
    return out[0] if single else out

  def _read_then_write(self, batch, prompts, max_new_tokens):
    words = []
    vocab = self._llm.vocabulary
    suppress = vocab.suppress_for_text()
    suppress[self.text.size :] = True  # ids that stand for no piece
    for chunk, count in _chunks(batch):
      start = len(words)
      asked = prompts[start : start + count]
      asked += [asked[-1]] * (len(chunk) - count)
      parts = [
        [image, prompt] if prompt else [image]
        for image, prompt in zip(chunk, asked, strict=True)
      ]
      result = decode.generate(
        self._llm.model,
        self._llm.params["llm"],
        prompt=self._prompt(parts),
        max_new_tokens=max_new_tokens,
        suppress=suppress,
        eos_id=vocab.eos_id,
      )
      for row in np.asarray(result.tokens)[:count]:
        words.append(self.text.decode(_until(row, vocab.eos_id)).strip())
    return words

  # Words (and pictures) to pictures ------------------------------------------

  def generate(self, prompts, **kwargs):
    """Draws what a prompt says: PIL image, or a list for a list.

    Keyword arguments are those of `synthesize`.
    """
    single = isinstance(prompts, str)
    texts = [prompts] if single else list(prompts)
    out = self.synthesize_batch([[text] for text in texts], **kwargs)
    return out[0] if single else out

  def synthesize(self, parts, **kwargs):
    """Draws a picture from text and pictures, e.g. [img, "make it red"].

    Args:
      parts: list of str (text) and pictures (PIL images, arrays, or
        pathlib.Path; a str is always text).
      **kwargs: see `synthesize_batch`.
    """
    return self.synthesize_batch([parts], **kwargs)[0]

  def synthesize_batch(
    self,
    prompts,
    *,
    seed: int = 0,
    guidance_scale: float = GUIDANCE_SCALE,
    temperature: float = TEMPERATURE,
    top_k: int = 50,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    steps: int = 20,
    decoder_guidance_scale: float = 1.0,
  ) -> list[PIL.Image.Image]:
    """Draws one picture for each prompt, a list of text and picture parts.

    Args:
      prompts: list of lists; see `synthesize`.
      seed: picture i is a function of its prompt and seed + i.
      guidance_scale: of the LLM over visual words; 1 is off.
      temperature: 0 is greedy.
      top_k: keep the likeliest k visual words, 0 all.
      top_p: keep the likeliest words that hold this probability.
      max_new_tokens: visual words at most; by default one a patch.
      steps: DDIM steps of the pixel decoder.
      decoder_guidance_scale: of the pixel decoder; 1 is off.
    """
    codes = self.write_codes(
      prompts,
      seed=seed,
      guidance_scale=guidance_scale,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      max_new_tokens=max_new_tokens,
    )
    return self.draw_codes(
      codes, seed=seed, steps=steps, guidance_scale=decoder_guidance_scale
    )

  def write_codes(
    self,
    prompts,
    *,
    seed: int = 0,
    guidance_scale: float = GUIDANCE_SCALE,
    temperature: float = TEMPERATURE,
    top_k: int = 50,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
  ) -> list[np.ndarray]:
    """The visual words int32[k] the LLM writes for each prompt, k >= 1."""
    vocab = self._llm.vocabulary
    codes: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCHES[-1]):
      chunk = [self._parse(p) for p in prompts[start : start + BATCHES[-1]]]
      count, size = len(chunk), _padded_size(len(chunk))
      chunk += [chunk[-1]] * (size - count)
      keys = jax.vmap(jax.random.key)(
        jnp.arange(size, dtype=jnp.uint32) + seed + start
      )
      result = decode.generate(
        self._llm.model,
        self._llm.params["llm"],
        prompt=self._prompt(chunk, draw=True),
        uncond=decode.left_pad([[vocab.image_begin]]),
        guidance_scale=guidance_scale,
        rng=keys if temperature else None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_new_tokens=1,
        max_new_tokens=max_new_tokens or self.visual.num_patches + 1,
        suppress=vocab.suppress_for_image(),
        eos_id=vocab.image_end,
      )
      rows = np.asarray(result.tokens)[:count]
      limit = self.visual.num_patches
      codes += [vocab.codes_of(row)[:limit] for row in rows]
    return codes

  # Prompts -------------------------------------------------------------------

  def _parse(self, parts):
    """Text stays text; every picture becomes uint8[size, size, 3]."""
    if isinstance(parts, str) or not isinstance(parts, Sequence):
      parts = [parts]
    if not parts:
      raise errors.UsageError(
        "An empty prompt: give at least one text or one picture."
      )
    parsed = []
    for part in parts:
      if isinstance(part, str):
        parsed.append(part)
      else:
        image = images.load(part)
        parsed.append(images.to_uint8(image, self.visual.image_size))
    return parsed

  def _prompt(self, rows, draw: bool = False):
    """Left-padded tokens, mask and continuous embeddings of parsed prompts."""
    llm, vocab = self._llm, self._llm.vocabulary
    pictures = [p for row in rows for p in row if not isinstance(p, str)]
    tokens, valid = llm.read(pictures) if pictures else (None, None)
    ids, spans, next_picture = [], [], 0
    for row in rows:
      line, where = [], []
      for part in row:
        if isinstance(part, str):
          line += sequences.text_ids(self.text, part)
          continue
        kept = int(valid[next_picture].sum())
        line.append(vocab.image_begin)
        where.append((len(line), next_picture, kept))
        line += [vocab.code_offset] * kept  # replaced by the embeddings
        line.append(vocab.image_end)
        next_picture += 1
      if draw:
        line.append(vocab.image_begin)
      ids.append(line)
      spans.append(where)
    if not all(ids):
      raise errors.UsageError(
        "A prompt has no tokens: its text is empty. Write something, or give"
        " a picture."
      )
    self._check_length(max(map(len, ids)))
    prompt = decode.left_pad(ids, multiple=_PROMPT_MULTIPLE)
    if pictures:
      shape = prompt["tokens"].shape
      embeds = np.zeros((*shape, tokens.shape[-1]), np.float32)
      use = np.zeros(shape, bool)
      for i, where in enumerate(spans):
        offset = shape[1] - len(ids[i])
        for start, picture, kept in where:
          span = slice(offset + start, offset + start + kept)
          embeds[i, span] = tokens[picture, :kept]
          use[i, span] = True
      prompt |= {"embeds": embeds, "use_embeds": use}
    return prompt

  def _check_length(self, length):
    limit = self._llm.model.config.max_len
    if length >= limit:
      raise errors.UsageError(
        f"The prompt is {length} tokens long, but this model reads at most"
        f" {limit} with its answer. Shorten the text or give fewer pictures."
      )

  def _batch(self, pictures):
    """uint8[n, size, size, 3] of one picture or several; was it one?"""
    single = not isinstance(pictures, list | tuple) and not (
      isinstance(pictures, np.ndarray) and pictures.ndim == 4
    )
    listed = [pictures] if single else list(pictures)
    if not listed:
      raise errors.UsageError("No picture was given; give at least one.")
    size = self.visual.image_size
    arrays = [images.to_uint8(images.load(p), size) for p in listed]
    return np.stack(arrays), single

  def info(self) -> dict[str, Any]:
    """Parts, sizes and what each task needs, without loading weights."""
    parts = {}
    for name in self.parts:
      meta = checkpoints.read_meta(self.directory, name)
      parts[name] = {
        "parameters": meta.get("parameters"),
        "step": meta.get("step"),
        "metrics": meta.get("metrics", {}),
      }
    needs = {
      "tokenize": ("encoder", "tokenizer"),
      "reconstruct": ("encoder", "tokenizer", "pixels"),
      "caption": ("encoder", "tokenizer", "llm"),
      "answer": ("encoder", "tokenizer", "llm"),
      "generate": ("encoder", "tokenizer", "pixels", "llm"),
      "synthesize": ("encoder", "tokenizer", "pixels", "llm"),
    }
    tasks = {t: all(p in parts for p in need) for t, need in needs.items()}
    return {"directory": str(self.directory), "parts": parts, "tasks": tasks}


class _Language:
  """The LLM part with its continuous branch."""

  def __init__(self, directory, tokenizer: visual.VisualTokenizer):
    part = checkpoints.load_part(directory, "llm")
    self.params = part.params
    self.vocabulary = vocabulary.Vocabulary(**part.meta["vocabulary"])
    config = llama.LlamaConfig(**part.meta["llama"])
    self.model = llama.Llama(config)
    self._visual = tokenizer
    # At inference every kept token is read: the capacity is all patches.
    self._unified = unified.UnifiedModel(
      config, tokenizer.config, tokenizer.num_patches
    )
    self._read = jax.jit(
      lambda params, features, keep: self._unified.apply(
        {"params": params}, features, keep, method="read"
      )
    )

  def read(self, pictures):
    """Projected tokens float[n, N, W] and bool[n, N] of uint8 pictures."""
    outs = []
    for chunk, count in _chunks(np.stack(pictures)):
      # Official weights may bring a selector of their own for reading.
      own = self.params.get("selector")
      features, keep = self._visual.select(chunk, own)
      tokens, valid = self._read(self.params, features, keep)
      outs.append((np.asarray(tokens)[:count], np.asarray(valid)[:count]))
    return tuple(np.concatenate(x) for x in zip(*outs, strict=True))


class _Pixels:
  """The pixel decoder part."""

  def __init__(self, directory):
    part = checkpoints.load_part(directory, "pixels")
    config = pixels.PixelDecoderConfig(**part.meta["pixels"])
    self._decoder = pixels.PixelDecoder(config)
    self._schedule = diffusion.Schedule(**part.meta["schedule"])
    self._variables = {"params": part.params}

  def draw(self, x_rec, seeds, steps, guidance_scale):
    """float32[B, H, W, 3] in [0, 1], numpy."""
    pictures = diffusion.draw(
      self._decoder,
      self._schedule,
      self._variables,
      x_rec,
      seeds,
      steps=steps,
      guide=guidance_scale != 1,
      guidance=guidance_scale,
    )
    return np.asarray(pictures)


def _until(row, end):
  """The ids before the first `end`."""
  row = list(map(int, row))
  return row[: row.index(end)] if end in row else row


def _padded_size(count: int) -> int:
  return next(size for size in BATCHES if size >= count)


def _chunks(batch):
  """Cuts [n, ...] into padded chunks: yields (chunk, how many are real)."""
  for start in range(0, len(batch), BATCHES[-1]):
    chunk = batch[start : start + BATCHES[-1]]
    count = len(chunk)
    pad = _padded_size(count) - count
    if pad:
      chunk = np.concatenate([chunk, np.repeat(chunk[-1:], pad, axis=0)])
    yield chunk, count
