"""class LaVIT: one model that tokenizes, describes, answers and draws.

Loads a model directory (`checkpoints.py`) and offers the tasks of the paper.
Inputs are paths, PIL images or uint8 arrays, one or a list; a single input
gives a single output. Batches are padded to a few sizes and prompts to
multiples of 16, so that each padded shape compiles once.

How texts and images are written by default is up to the model (`rules.py`):
one trained here decodes greedily; one imported from the official release does
as its classes do. Where the official code has a quirk, a call does the right
thing and `parity=True` does the same as the official code:

  call              parity=True
  all that read     patches are sampled (with seed, or 0), not the likeliest;
                    an image's orientation and transparency go unheeded;
                    "</s>" in a text is the token, not the four characters
  caption, answer   cut at every "." (answers: and ","): "3.14" becomes "3"
  write_codes       <unk>, <s>, </s> and [IMG] may come among the words (and
                    are dropped), a negative prompt gets no [IMG], images in
                    a prompt get no [IMG] and [/IMG], and a prompt with an
                    image draws at most as many words as it is long itself
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from lavit_jax.core import errors, image_io, vocabulary
from lavit_jax.core.storage import checkpoints, files
from lavit_jax.infer import (
  arguments,
  batches,
  image_generation,
  memory,
  text_generation,
  visual,
)
from lavit_jax.infer.loading import parts
from lavit_jax.infer.pixels import decoders, safety
from lavit_jax.infer.pixels import options as options_lib
from lavit_jax.infer.presets import official, rules
from lavit_jax.infer.prompts import prompts, wording

resolve = parts.resolve


class LaVIT:
  """A loaded model. Make one with `LaVIT.load("tiny")` or a directory."""

  def __init__(
    self,
    directory,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    manner: str | None = None,
    max_batch: int = batches.SIZES[-1],
    check_safety: bool = True,
  ):
    self.directory = files.place(directory)
    self.parts = checkpoints.parts_in(directory)
    arguments.check_options(dtype, quantize, manner, max_batch)
    self.max_batch = max_batch
    self._dtype, self._quantize, self._manner = dtype, quantize, manner
    self._painters = {}
    self._check_safety = check_safety and safety.PART in self.parts

  @classmethod
  def load(cls, model="tiny", **options) -> "LaVIT":
    """Opens a model directory; each part is read when it is first needed.

    Args:
      model: "tiny" (shipped), a model directory, or a quickstart workdir.
      **options: dtype: "float32" or "bfloat16", of weights and computation
        (codes, and pixels drawn from them, are float32 in any case);
        quantize: "int8" for the weights of the LLM (`quantize.py`); manner:
        "ours" or "official" (`rules.py`), by default what the model asks for;
        max_batch: images or prompts at once, less needs less memory;
        check_safety: hold drawings to the safety checker, where the model has
        one: those withheld are black (`safety.is_withheld`).

    Raises:
      errors.CheckpointError: there is no such model.
      errors.UsageError: a bad option.
    """
    return cls(resolve(model), **options)

  # Parts, read on first use ------------------------------------------------

  @functools.cached_property
  def visual(self) -> visual.VisualTokenizer:
    """Encoder and visual tokenizer."""
    return parts.visual_tokenizer(self.directory, self._dtype)

  @functools.cached_property
  def text(self) -> vocabulary.TextTokenizer:
    """The SentencePiece model of the text half of the vocabulary."""
    return parts.text_tokenizer(self.directory)

  @functools.cached_property
  def _llm(self) -> parts.Language:
    return parts.Language(
      self.directory, self.visual, self._dtype, self._quantize
    )

  @functools.cached_property
  def _prompter(self) -> prompts.Prompter:
    return prompts.Prompter(self.visual, self._llm, self.text, self.max_batch)

  def _painter(self, kind: str | None):
    """A pixel decoder, of `painters.NEEDS`, or the default one."""
    kind = decoders.choose(self.parts, kind)
    if kind not in self._painters:
      self._painters[kind] = decoders.load(self.directory, kind, self._dtype)
    return self._painters[kind]

  @functools.cached_property
  def _safety(self) -> safety.Checker:
    return safety.Checker(self.directory)

  @functools.cached_property
  def rules(self) -> rules.GenerationPreset:
    """How this model writes and draws where a call does not say."""
    if self._manner:
      return rules.BY_NAME[self._manner]
    return rules.rules_of(checkpoints.read_meta(self.directory, "llm"))

  # Images to tokens and back --------------------------------------------

  def tokenize(
    self, images, *, seed: int | None = None, budget=None, parity=False
  ):
    """Visual tokens of images.

    Args:
      images: one or a list.
      seed: sample the selection as the paper does, image i with the noise
        of seed + i; None is deterministic.
      budget: keep exactly this many patches, instead of the expected number.
      parity: as the official code, see the head of this module.

    Returns:
      For each image a dict: `keep` bool[N] (patches kept, raster order)
      and `codes` int32[k] (their code numbers).
    """
    batch, single = self._batch(images, parity)
    seed = 0 if parity and seed is None else seed
    out = []
    for chunk, count, start in batches.chunks(batch, self.max_batch):
      seeds = None if seed is None else seed + start
      out += self.visual.tokenize(chunk, seed=seeds, budget=budget, count=count)
    return out[0] if single else out

  def reconstruct(self, images, *, budget=None, parity=False, **options):
    """Images redrawn from their own tokens, without the LLM.

    Args:
      images: one or a list.
      budget: see `tokenize`.
      parity: see `tokenize`.
      **options: see `draw_codes`.
    """
    tokens = self.tokenize(images, budget=budget, parity=parity)
    single = isinstance(tokens, dict)
    rows = [tokens] if single else tokens
    drawn = self.draw_codes([row["codes"] for row in rows], **options)
    return drawn[0] if single else drawn

  def draw_codes(
    self,
    codes: Sequence[np.ndarray],
    *,
    seed: int = 0,
    progress: options_lib.Progress | None = None,
    **options,
  ) -> list[PIL.Image.Image]:
    """Paints images from lists of code numbers int[k], 1 <= k <= N.

    What the model's safety checker withholds is black, and named by
    `safety.is_withheld`.

    Args:
      codes: one list for each image.
      seed: image i takes the noise of seed + i, whatever the batch.
      progress: called with (steps done, steps in all) as it goes on.
      **options: fields of `options.PixelOptions` (ratio, size, steps, …).
    """
    how = rules.changed(options_lib.PixelOptions(), options)
    arrays = decoders.paint(
      self._painter(how.decoder),
      self.visual,
      codes,
      seed,
      how,
      limit=self.max_batch,
      progress=progress,
    )
    images = [image_io.to_pil(array) for array in arrays]
    return self._safety.check(images) if self._check_safety else images

  # Images to words --------------------------------------------------------

  def caption(self, images, *, prompt="", parity=False, seed=None, **options):
    """Describes one image or a list of them: str or list[str].

    Args:
      images: one or a list.
      prompt: how every caption begins, not repeated in what comes back.
      parity: as the official code, see the head of this module.
      seed: sample which patches are read; None is deterministic.
      **options: fields of `rules.TextGenerationConfig` (num_beams,
        max_new_tokens, …).
    """
    arguments.require_text("prompt", prompt)
    batch, single = self._batch(images, parity)
    asked = [[p, prompt] if prompt else [p] for p in batch]
    rule = rules.changed(self.rules.caption, options)
    clean = str.strip
    if parity or self.rules.short:
      clean = official.clean_caption if parity else wording.first_sentence
    seeds = arguments.seeds(seed, parity, len(asked))
    written = text_generation.write(
      self._prompter, asked, rule, seeds=seeds, parity=parity
    )
    out = [clean(row[0].text) for row in written]
    return out[0] if single else out

  def answer(
    self,
    images,
    questions,
    *,
    answerable_first: bool = False,
    lemmatize: bool = False,
    parity: bool = False,
    seed: int | None = None,
    **options,
  ):
    """Answers a question about each image: str or list[str].

    One image and several questions, or equally many of both. (The official
    evaluation puts questions through `official.clean_question` first.)

    Args:
      images: one or a list.
      questions: str or a list.
      answerable_first: ask of each question whether it can be answered, as
        the VizWiz protocol does; where the model says no the answer is
        "unanswerable".
      lemmatize: give words in their base form (`wording.lemmatize`).
      parity: as the official code, see the head of this module.
      seed: sample which patches are read; None is deterministic.
      **options: fields of `rules.TextGenerationConfig`.

    Raises:
      errors.UsageError: images and questions that do not match in number.
    """
    batch, asked, single = self._paired(images, questions, parity)
    rule = rules.changed(self.rules.answer, options)
    seeds = arguments.seeds(seed, parity, len(asked))

    def ask(which, prompt):
      rows = [[batch[i], prompt(asked[i])] for i in which]
      chosen = None if seeds is None else seeds[which]
      written = text_generation.write(
        self._prompter, rows, rule, seeds=chosen, parity=parity
      )
      return [self._cut_answer(row[0].text, parity) for row in written]

    which = list(range(len(asked)))
    out = [wording.UNANSWERABLE] * len(asked)
    if answerable_first:
      said = ask(which, wording.answerable_prompt)
      which = [i for i in which if not said[i].lower().startswith("no")]
    if which:
      for i, words in zip(
        which, ask(which, wording.question_prompt), strict=True
      ):
        out[i] = wording.lemmatize(words) if lemmatize else words
    return out[0] if single else out

  def write(
    self, prompts, *, count: int = 1, parity=False, seed=None, **options
  ) -> list[list[text_generation.Text]]:
    """Goes on with prompts of text and images, in words.

    Args:
      prompts: list of prompts, each a str or a list of str and images.
      count: texts a prompt, the best first; more than one needs num_beams of
        at least as many.
      parity: as the official code, see the head of this module.
      seed: sample which patches are read; None is deterministic.
      **options: fields of `rules.TextGenerationConfig`; by default those of
        captions.

    Returns:
      For each prompt its `count` texts, whole, with their scores.
    """
    rule = rules.changed(self.rules.caption, options)
    seeds = arguments.seeds(seed, parity, len(prompts))
    how = {"seeds": seeds, "parity": parity, "count": count}
    return text_generation.write(self._prompter, prompts, rule, **how)

  def _paired(self, images, questions, parity):
    """Images, as many questions, and whether it was one question."""
    single = isinstance(questions, str)
    asked = [questions] if single else questions
    if not isinstance(asked, Sequence):
      arguments.require_text("question", asked)
    for question in asked:
      arguments.require_text("question", question)
    batch, _ = self._batch(images, parity)
    if len(batch) == 1:
      batch = np.repeat(batch, len(asked), axis=0)
    if len(batch) != len(asked) or not asked:
      raise errors.UsageError(
        f"{len(batch)} images and {len(asked)} questions: give one question"
        " an image, or several about one image."
      )
    return batch, asked, single

  def _cut_answer(self, text, parity):
    if parity:
      return official.clean_answer(text).strip()
    return wording.short_answer(text) if self.rules.short else text.strip()

  # Words (and images) to images ------------------------------------------

  def generate(self, prompts, **kwargs):
    """Draws what a prompt says: PIL image, or a list for a list.

    Keyword arguments are those of `synthesize_batch`.
    """
    single = isinstance(prompts, str)
    asked = [prompts] if single else prompts
    if not isinstance(asked, Sequence):
      arguments.require_text("prompt", asked, "synthesize")
    for text in asked:
      arguments.require_text("prompt", text, "synthesize")
    out = self.synthesize_batch([[text] for text in asked], **kwargs)
    return out[0] if single else out

  def synthesize(self, parts, **kwargs):
    """Draws an image from text and images, e.g. [img, "make it red"].

    Args:
      parts: list of str (text) and images (PIL images, arrays, or
        pathlib.Path; a str is always text).
      **kwargs: see `synthesize_batch`.
    """
    return self.synthesize_batch([parts], **kwargs)[0]

  def synthesize_batch(
    self,
    prompts,
    *,
    count: int = 1,
    seed: int = 0,
    negative_prompts=None,
    parity: bool = False,
    progress: options_lib.Progress | None = None,
    **options,
  ) -> list[Any]:
    """Draws an image for each prompt, a list of text and image parts.

    Args:
      prompts: list of lists; see `synthesize`.
      count: images of each prompt.
      seed: image i is a function of its prompt and seed + i.
      negative_prompts: see `write_codes`.
      parity: see `write_codes`.
      progress: see `draw_codes`.
      **options: fields of `rules.ImageGenerationConfig` for the visual tokens
        (guidance_scale, …) and of `options.PixelOptions` for the pixels (ratio,
        steps, …).

    Returns:
      An image for each prompt, or with count > 1 a list of so many.
    """
    if count < 1:
      raise errors.UsageError(f"count={count}: expected 1 or more.")
    words, pixels = rules.split(
      options, rules.ImageGenerationConfig, options_lib.PixelOptions
    )
    how = rules.changed(options_lib.PixelOptions(), pixels)
    decoders.choose(self.parts, how.decoder)  # before the words are written
    against = arguments.one_each(
      "negative prompt", negative_prompts, len(prompts)
    )
    repeat = lambda rows: [row for row in rows for _ in range(count)]
    codes = self.write_codes(
      repeat(prompts),
      negative_prompts=repeat(against),
      seed=seed,
      parity=parity,
      **words,
    )
    drawn = self.draw_codes(codes, seed=seed, progress=progress, **pixels)
    if count == 1:
      return drawn
    return [drawn[i : i + count] for i in range(0, len(drawn), count)]

  def write_codes(
    self,
    prompts,
    *,
    negative_prompts=None,
    seed: int = 0,
    parity: bool = False,
    **options,
  ) -> list[np.ndarray]:
    """The visual words int32[k] the LLM writes for each prompt, k >= 1.

    Args:
      prompts: list of prompts, each a str or a list of str and images.
      negative_prompts: what guidance leads away from: one for all prompts or
        one for each; by default nothing, [IMG] alone.
      seed: prompt i is a function of itself and seed + i.
      parity: as the official code, see the head of this module.
      **options: fields of `rules.ImageGenerationConfig`; a guidance_scale that
        is given holds for prompts with images too.
    """
    rule = rules.changed(self.rules.draw, options)
    if options.get("guidance_scale") is not None:
      rule = dataclasses.replace(rule, mixed_guidance_scale=rule.guidance_scale)
    against = arguments.one_each(
      "negative prompt", negative_prompts, len(prompts)
    )
    return image_generation.write(
      self._prompter,
      prompts,
      against,
      rule,
      form="codes" if parity else self.rules.picture_prompts,
      seed=seed,
      parity=parity,
    )

  def _batch(self, images, parity=False):
    """uint8[n, size, size, 3] of one image or several; was it one?"""
    single = not isinstance(images, list | tuple) and not (
      isinstance(images, np.ndarray) and images.ndim == 4
    )
    listed = [images] if single else list(images)
    if not listed:
      raise errors.UsageError("No image was given; give at least one.")
    size = self.visual.image_size
    return np.stack([prompts.sized(p, size, parity) for p in listed]), single

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
    needs = memory.needs(
      self.directory, dtype=self._dtype, quantize=self._quantize
    )
    return {
      "directory": str(self.directory),
      "parts": parts,
      "pixel_decoders": decoders.available(self.parts),
      "safety_checker": self._check_safety,
      "tasks": {task: need["possible"] for task, need in needs.items()},
      "memory": needs,
    }
