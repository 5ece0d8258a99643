"""Tasks of class LaVIT with visual tokens: tokenize, decode, generate."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from lavit_jax.core import errors, image_io
from lavit_jax.infer import batches, image_generation, ranges
from lavit_jax.infer.pixels import decoders
from lavit_jax.infer.pixels import options as options_lib
from lavit_jax.infer.presets import rules
from lavit_jax.infer.tasks import arguments, model

Generated = PIL.Image.Image | list[PIL.Image.Image]  # a list if count > 1


class ImageTasks(model.LoadedModel):
  """Images to visual tokens, and prompts or visual tokens to images.

  Methods share the arguments of two configs, where None means the default:

    rules.ImageGenerationConfig  how the LLM generates visual tokens
      guidance_scale, mixed_guidance_scale, temperature, top_k, top_p,
      min_new_tokens, max_new_tokens; by default those of the model's preset.
      A guidance_scale that is set holds for prompts with images too.
    options.PixelOptions  how a pixel decoder makes the image
      decoder, steps, solver, decoder_guidance_scale, ratio, size,
      original_size, crop, tile; by default those of the pixel decoder.
  """

  def tokenize(
    self,
    images: arguments.Images,
    *,
    seed: int | None = None,
    budget: int | None = None,
    parity: bool = False,
  ) -> dict[str, np.ndarray] | list[dict[str, np.ndarray]]:
    """Computes the visual tokens of images.

    Args:
      images: one or a list.
      seed: sample the selection as the paper does, image i with the noise of
        seed + i; None is deterministic.
      budget: keep exactly so many patches, instead of the expected number.
      parity: as the official code, see the head of `pipeline.py`.

    Returns:
      For each image a dict: `keep` bool[N], the kept patches in raster order,
      and `codes` int32[k], their codes.
    """
    batch, single = self._batch(images, parity)
    seed = ranges.check_seed(seed, optional=True)
    if budget is not None:
      budget = ranges.check_integer("budget", budget, 1)
    seed = 0 if parity and seed is None else seed
    rows = []
    for chunk, count, start in batches.chunks(batch, self.max_batch):
      first = None if seed is None else seed + start
      rows += self.visual.tokenize(
        chunk, seed=first, budget=budget, count=count
      )
    return rows[0] if single else rows

  def reconstruct(
    self,
    images: arguments.Images,
    *,
    budget: int | None = None,
    parity: bool = False,
    seed: int = 0,
    progress: options_lib.Progress | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    solver: str | None = None,
    decoder_guidance_scale: float | None = None,
    ratio: str | None = None,
    size: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    tile: int | None = None,
  ) -> Generated:
    """Decodes images from their own visual tokens, without the LLM.

    Args:
      images: one or a list.
      budget: see `tokenize`.
      parity: see `tokenize`.
      seed: see `draw_codes`, as for all arguments below.
      progress: callback.
      decoder: pixel decoder.
      steps: of denoising.
      solver: of denoising.
      decoder_guidance_scale: of denoising.
      ratio: width to height.
      size: height and width.
      original_size: condition of highres.
      crop: condition of highres.
      tile: pixels a side.

    Returns:
      An image, or a list for a list.
    """
    options = arguments.fields_of(options_lib.PixelOptions, locals())
    ranges.check_seed(seed)
    settings = self._settings(options, progress)
    tokens = self.tokenize(images, budget=budget, parity=parity)
    rows = [tokens] if isinstance(tokens, dict) else tokens
    codes = [row["codes"] for row in rows]
    decoded = self._decode(codes, seed, progress, settings)
    return decoded[0] if isinstance(tokens, dict) else decoded

  def draw_codes(
    self,
    codes: Sequence[np.ndarray],
    *,
    seed: int = 0,
    progress: options_lib.Progress | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    solver: str | None = None,
    decoder_guidance_scale: float | None = None,
    ratio: str | None = None,
    size: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    tile: int | None = None,
  ) -> list[PIL.Image.Image]:
    """Decodes images from visual tokens.

    An image that the model's safety checker withholds is black, and
    `safety.is_withheld` is True for it.

    Args:
      codes: int[k] for each image, 1 <= k <= N.
      seed: image i takes the noise of seed + i, whatever the batch.
      progress: called with (steps done, steps in all).
      decoder: a pixel decoder of the model: "highres", "lowres" or "pixels".
      steps: of denoising.
      solver: "ddim", or "dpm++" for few steps.
      decoder_guidance_scale: how closely pixels follow the visual tokens.
      ratio: width to height, such as "16:9".
      size: height and width, instead of a ratio.
      original_size: see `options.PixelOptions`.
      crop: see `options.PixelOptions`.
      tile: decode latents in tiles of so many pixels a side.

    Raises:
      errors.UsageError: an option that the pixel decoder does not take, or
        codes out of range.
      errors.CheckpointError: the model has no such pixel decoder.
    """
    options = arguments.fields_of(options_lib.PixelOptions, locals())
    settings = self._settings(options, progress)
    return self._decode(codes, seed, progress, settings)

  def generate(
    self,
    prompts: str | Sequence[str],
    *,
    count: int = 1,
    seed: int = 0,
    negative_prompts: str | Sequence[arguments.Prompt | None] | None = None,
    parity: bool = False,
    progress: options_lib.Progress | None = None,
    guidance_scale: float | None = None,
    mixed_guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_new_tokens: int | None = None,
    max_new_tokens: int | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    solver: str | None = None,
    decoder_guidance_scale: float | None = None,
    ratio: str | None = None,
    size: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    tile: int | None = None,
  ) -> Generated | list[Generated]:
    """Generates images from text.

    The arguments are those of `synthesize_batch`, but for the prompts.

    Returns:
      An image for one prompt, a list for a list; with count > 1 each entry is
      a list of so many images.
    """
    options = dict(locals())
    single = isinstance(prompts, str)
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence):
      arguments.require_text("prompt", texts, "synthesize")
    for text in texts:
      arguments.require_text("prompt", text, "synthesize")
    images = self._synthesize([[text] for text in texts], options)
    return images[0] if single else images

  def synthesize(
    self,
    parts: Sequence[arguments.Image],
    *,
    count: int = 1,
    seed: int = 0,
    negative_prompts: str | Sequence[arguments.Prompt | None] | None = None,
    parity: bool = False,
    progress: options_lib.Progress | None = None,
    guidance_scale: float | None = None,
    mixed_guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_new_tokens: int | None = None,
    max_new_tokens: int | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    solver: str | None = None,
    decoder_guidance_scale: float | None = None,
    ratio: str | None = None,
    size: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    tile: int | None = None,
  ) -> Generated:
    """Generates an image from text and images, e.g. [image, "make it red"].

    `parts` are str, which are text, and images: PIL images, arrays or
    pathlib.Path. The other arguments are those of `synthesize_batch`.

    Returns:
      An image, or with count > 1 a list of so many.
    """
    options = dict(locals())
    ranges.check_sequence("parts", parts, "texts and images")
    return self._synthesize([parts], options)[0]

  def synthesize_batch(
    self,
    prompts: Sequence[arguments.Prompt],
    *,
    count: int = 1,
    seed: int = 0,
    negative_prompts: str | Sequence[arguments.Prompt | None] | None = None,
    parity: bool = False,
    progress: options_lib.Progress | None = None,
    guidance_scale: float | None = None,
    mixed_guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_new_tokens: int | None = None,
    max_new_tokens: int | None = None,
    decoder: str | None = None,
    steps: int | None = None,
    solver: str | None = None,
    decoder_guidance_scale: float | None = None,
    ratio: str | None = None,
    size: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    tile: int | None = None,
  ) -> list[Generated]:
    """Generates an image for each prompt of text and images.

    Args:
      prompts: each a str, or a list of parts, see `synthesize`.
      count: images for each prompt.
      seed: image i depends on its prompt and seed + i alone.
      negative_prompts: see `write_codes`.
      parity: see `write_codes`.
      progress: see `draw_codes`.
      guidance_scale: see `write_codes`, as for all to max_new_tokens.
      mixed_guidance_scale: for prompts with an image.
      temperature: of sampling.
      top_k: of sampling.
      top_p: of sampling.
      min_new_tokens: fewest visual tokens.
      max_new_tokens: most visual tokens.
      decoder: see `draw_codes`, as for all arguments below.
      steps: of denoising.
      solver: of denoising.
      decoder_guidance_scale: of denoising.
      ratio: width to height.
      size: height and width.
      original_size: condition of highres.
      crop: condition of highres.
      tile: pixels a side.

    Returns:
      An image for each prompt, or with count > 1 a list of so many.
    """
    return self._synthesize(prompts, dict(locals()))

  def write_codes(
    self,
    prompts: Sequence[arguments.Prompt],
    *,
    negative_prompts: str | Sequence[arguments.Prompt | None] | None = None,
    seed: int = 0,
    parity: bool = False,
    guidance_scale: float | None = None,
    mixed_guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_new_tokens: int | None = None,
    max_new_tokens: int | None = None,
  ) -> list[np.ndarray]:
    """Generates visual tokens with the LLM: int32[k], k >= 1, for each prompt.

    Args:
      prompts: each a str, or a list of str (text) and images.
      negative_prompts: guidance steers away from them: one for all prompts or
        one for each. None: [IMG] alone.
      seed: prompt i depends on itself and seed + i alone.
      parity: as the official code, see the head of `pipeline.py`.
      guidance_scale: closeness to the prompt; 1 is off.
      mixed_guidance_scale: for prompts with an image, where guidance_scale is
        None.
      temperature: 0 is greedy.
      top_k: sample from the k most probable, 0: from all.
      top_p: sample from the most probable that hold this probability.
      min_new_tokens: fewest visual tokens.
      max_new_tokens: most visual tokens, [/IMG] included.
    """
    options = arguments.fields_of(rules.ImageGenerationConfig, locals())
    ranges.check_sequence("prompts", prompts, "prompts")
    config = rules.changed(self.rules.draw, options)
    if guidance_scale is not None:
      config = dataclasses.replace(config, mixed_guidance_scale=guidance_scale)
    return image_generation.write(
      self._prompter,
      prompts,
      arguments.per_prompt("negative prompt", negative_prompts, len(prompts)),
      config,
      form="codes" if parity else self.rules.picture_prompts,
      seed=seed,
      parity=parity,
    )

  def _settings(self, options, progress) -> options_lib.PixelOptions:
    """Returns options that the pixel decoder takes, before any other work."""
    if progress is not None and not callable(progress):
      raise errors.UsageError(
        f"progress={progress!r}: expected a function of (steps done, steps)."
      )
    settings = rules.changed(options_lib.PixelOptions(), options)
    self._pixel_decoder(settings.decoder).check(settings)
    return settings

  def _decode(self, codes, seed, progress, settings) -> list[PIL.Image.Image]:
    """See `draw_codes`."""
    arrays = decoders.decode(
      self._pixel_decoder(settings.decoder),
      self.visual,
      codes,
      ranges.check_seed(seed),
      settings,
      limit=self.max_batch,
      progress=progress,
    )
    images = [image_io.to_pil(array) for array in arrays]
    return self._safety.check(images) if self._check_safety else images

  def _synthesize(self, prompts, options: dict[str, Any]) -> list[Any]:
    """See `synthesize_batch`; `options` holds its other arguments."""
    count, seed = options["count"], options["seed"]
    ranges.check_integer("count", count, 1)
    ranges.check_sequence("prompts", prompts, "prompts")
    for prompt in prompts:
      if not isinstance(prompt, str):
        ranges.check_sequence("a prompt", prompt, "texts and images")
    pixels = arguments.fields_of(options_lib.PixelOptions, options)
    settings = self._settings(pixels, options["progress"])
    negatives = arguments.per_prompt(
      "negative prompt", options["negative_prompts"], len(prompts)
    )
    codes = self.write_codes(
      [prompt for prompt in prompts for _ in range(count)],
      negative_prompts=[text for text in negatives for _ in range(count)],
      seed=seed,
      parity=options["parity"],
      **arguments.fields_of(rules.ImageGenerationConfig, options),
    )
    images = self._decode(codes, seed, options["progress"], settings)
    if count == 1:
      return images
    return [images[i : i + count] for i in range(0, len(images), count)]
