"""Measures a model on held-out data, and collects examples for the report."""

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import checkpoints
from lavit_jax.data import faults
from lavit_jax.data.batching import rows
from lavit_jax.data.sources import kinds, shapes
from lavit_jax.evaluate import shapes as shapes_scores
from lavit_jax.evaluate import tokenizer as tokenizer_scores
from lavit_jax.infer import pipeline

CODE_IMAGES = 2_000  # images over which the use of codes is counted
_DRAWING_STEPS = 12  # of the pixel decoder; 20 are 0.01 to 0.02 better
_EXHIBITS = 12
_STEPS = 10  # of `_evaluate_shapes`, for the progress bar


@dataclasses.dataclass
class Exhibits:
  """Examples for the report; an entry for each image.

  Attributes:
    images: uint8[H, W, 3].
    keeps: bool[N], the kept patches of each image.
    redrawn: PIL images decoded from the visual tokens.
    captions: (image, reference, caption).
    answers: (image, question, right answer, answer).
    drawings: (prompt, PIL image).
    edits: (image, instruction, PIL image).
    code_patches: some patches uint8[P, P, 3] for each code.
  """

  images: list[np.ndarray] = dataclasses.field(default_factory=list)
  keeps: list[np.ndarray] = dataclasses.field(default_factory=list)
  redrawn: list[Any] = dataclasses.field(default_factory=list)
  captions: list[tuple] = dataclasses.field(default_factory=list)
  answers: list[tuple] = dataclasses.field(default_factory=list)
  drawings: list[tuple] = dataclasses.field(default_factory=list)
  edits: list[tuple] = dataclasses.field(default_factory=list)
  code_patches: dict[int, list[np.ndarray]] = dataclasses.field(
    default_factory=dict
  )


def evaluate(
  lavit: pipeline.LaVIT,
  *,
  data: Mapping[str, Any],
  scenes: int = 500,
  quiet: bool = False,
) -> tuple[dict[str, Any], Exhibits]:
  """Evaluates a model on held-out data.

  Args:
    lavit: a loaded model with all its parts.
    data: config.data of the run.
    scenes: held-out scenes for every score; codes are counted over 2,000.
    quiet: show no progress bar.

  Returns:
    (metrics by name, examples for the report).
  """
  exhibits = Exhibits()
  metrics: dict[str, Any] = {"scenes": scenes}
  metrics["parameters"] = {
    part: checkpoints.count_params(
      checkpoints.load_part(lavit.directory, part).params
    )
    for part in lavit.parts
  }
  if data["kind"] != "shapes" or data.get("sources"):
    source = kinds.build(data, "held_out")
    _evaluate_user_data(lavit, source, metrics, exhibits)
    return metrics, exhibits
  more = {"held_out_size": max(scenes, CODE_IMAGES), "filters": {}}
  sized = dict(data) | more
  held_out = kinds.build(sized, "held_out")
  never_seen = kinds.build(sized, "never_seen")
  with progress.Progress(
    _STEPS, label="evaluate", stream=io.StringIO() if quiet else None
  ) as bar:
    steps = _evaluate_shapes(lavit, held_out, never_seen, metrics, exhibits)
    for number, name in enumerate(steps, start=1):
      bar.update(number)
      bar.print(f"evaluate: {name} done")
  return metrics, exhibits


def _evaluate_shapes(lavit, held_out, never_seen, metrics, exhibits):
  """Runs the _STEPS on the embedded data; yields the name of each when done."""
  count = metrics["scenes"]
  _tokenizer(lavit, held_out, metrics, exhibits)
  yield "tokenizer"
  yield from _scenes(lavit, held_out, count, metrics, exhibits)
  _unguided(lavit, held_out, count, metrics)
  yield "drawings without guidance"
  for name in _scenes(lavit, never_seen, count, metrics, prefix="never_seen_"):
    yield f"{name} of never-seen pairs"


def _tokenizer(lavit, source, metrics, exhibits):
  """Measures tokens and reconstructions."""
  indices = range(max(metrics["scenes"], CODE_IMAGES))
  images = np.stack([source.image(i) for i in indices])
  size = source.image_size
  patches = math.isqrt(lavit.visual.num_patches)  # a side
  shares = np.stack(
    [
      shapes.object_shares(source.scene(i), size, size // patches)
      for i in indices
    ]
  )
  metrics |= tokenizer_scores.quality(lavit.visual, images, shares)
  tokens = lavit.tokenize(list(images[:500]))
  kept = np.array([len(t["codes"]) for t in tokens])
  objects = np.array([len(source.scene(i).objects) for i in range(500)])
  for count in np.unique(objects):
    mean = float(kept[objects == count].mean())
    metrics[f"tokens_for_{count}_objects"] = mean
  exhibits.images = list(images[:_EXHIBITS])
  exhibits.keeps = [t["keep"] for t in tokens[:_EXHIBITS]]
  exhibits.redrawn = lavit.reconstruct(list(images[:_EXHIBITS]))
  _code_examples(images, tokens, patches, exhibits)
  redrawn = lavit.reconstruct(list(images[:200]))
  metrics |= shapes_scores.object_scores(
    [source.scene(i).objects for i in range(200)],
    [shapes_scores.judge(np.asarray(image)) for image in redrawn],
    "reconstruct",
  )


def _code_examples(images, tokens, side, exhibits, each: int = 6):
  """Collects some patches of every code, for the codebook sheet."""
  size = images.shape[1] // side
  for image, token in zip(images, tokens, strict=False):
    positions = np.flatnonzero(token["keep"])
    for position, code in zip(positions, token["codes"], strict=True):
      patches = exhibits.code_patches.setdefault(int(code), [])
      if len(patches) < each:
        y, x = (position // side) * size, (position % side) * size
        patches.append(image[y : y + size, x : x + size])


def _scenes(lavit, source, count, metrics, exhibits=None, prefix=""):
  """Measures captions, answers, generated images and edits.

  Args:
    lavit: the model.
    source: of the scenes.
    count: number of scenes.
    metrics: takes the scores, their names begin with `prefix`.
    exhibits: takes examples for the report; None: no examples.
    prefix: of the metrics.

  Yields:
    The name of each task when it is done.
  """
  shown = exhibits or Exhibits()
  images = [source.image(i) for i in range(count)]
  objects = [source.scene(i).objects for i in range(count)]
  captions = lavit.caption(images)
  metrics |= shapes_scores.caption_scores(objects, captions, f"{prefix}caption")
  references = [source.captions(i)[0] for i in range(min(_EXHIBITS, count))]
  shown.captions = list(zip(images, references, captions, strict=False))
  yield "captions"
  questions = _questions(source, count)
  answers = lavit.answer(
    [images[i] for i, *_ in questions], [text for _, _, text, _ in questions]
  )
  metrics |= shapes_scores.vqa_scores(
    [kind for _, kind, _, _ in questions],
    [answer for *_, answer in questions],
    answers,
    f"{prefix}vqa",
  )
  shown.answers = [
    (images[questions[n][0]], *questions[n][2:], answers[n])
    for n in range(0, min(len(questions), _EXHIBITS * 7), 7)
  ]
  yield "answers"
  prompts = [source.captions(i)[0] for i in range(count)]
  drawn = lavit.generate(prompts, steps=_DRAWING_STEPS)
  metrics |= _drawing_scores(objects, drawn, f"{prefix}t2i")
  shown.drawings = list(zip(prompts, drawn, strict=True))[:_EXHIBITS]
  yield "drawings"
  rows = [_edit_prompt(source, i) for i in range(count)]
  drawn = lavit.synthesize_batch(
    [[image, words] for image, words, _ in rows], steps=_DRAWING_STEPS
  )
  results = [objects for *_, objects in rows]
  metrics |= _drawing_scores(results, drawn, f"{prefix}edit")
  shown.edits = [(*rows[n][:2], drawn[n]) for n in range(len(references))]
  yield "edits"


def _questions(source, count):
  """Returns (scene, type, question, answer), every second type in turn."""
  return [
    (i, *question)
    for i in range(count)
    for question in source.questions(i)[i % 2 :: 2]
  ]


def _edit_prompt(source, i):
  """Returns (image, instruction, objects of the result) of a scene's edit."""
  image, words, result = source.example("edit", i).parts
  return (
    source.image(image.image),
    words.text,
    source.scene(result.image).objects,
  )


def _drawing_scores(objects, drawn, prefix):
  return shapes_scores.drawing_scores(
    objects, [np.asarray(image) for image in drawn], prefix
  )


def _unguided(lavit, source, count, metrics):
  """Measures images generated without guidance."""
  prompts = [source.captions(i)[0] for i in range(count)]
  objects = [source.scene(i).objects for i in range(count)]
  drawn = lavit.generate(prompts, guidance_scale=1.0, steps=_DRAWING_STEPS)
  scores = _drawing_scores(objects, drawn, "t2i")
  metrics["t2i_attributes_without_guidance"] = scores["t2i_attributes"]


def _readable(source, count):
  """Returns (indices, uint8[n, H, W, 3]) of the first readable images."""
  log = faults.FaultLog(f"images of {source.name}", limit_share=1.0)
  indices, images = [], []
  for i in range(source.num_images):
    if len(indices) == count:
      break
    pixels, valid = rows.image(source, i, log)
    if valid:
      indices.append(i)
      images.append(pixels)
  if not indices:
    raise errors.DataError(
      f"No image of {source.name} to evaluate on: {log.summary()}. Choose"
      " other held-out data."
    )
  return indices, np.stack(images)


def _evaluate_user_data(lavit, source, metrics, exhibits):
  """Measures what needs no knowledge of the objects in the images."""
  indices, images = _readable(source, 100)
  whole_batches = len(images) // 50 * 50
  if whole_batches:
    metrics |= tokenizer_scores.quality(lavit.visual, images[:whole_batches])
  tokens = lavit.tokenize(list(images))
  captions = lavit.caption(list(images))
  references = [source.captions(i) for i in indices]
  right = [c in r for c, r in zip(captions, references, strict=True)]
  metrics["caption_exact"] = float(np.mean(right))
  exhibits.images = list(images[:_EXHIBITS])
  exhibits.keeps = [t["keep"] for t in tokens[:_EXHIBITS]]
  exhibits.redrawn = lavit.reconstruct(list(images[:_EXHIBITS]))
  exhibits.captions = [
    (images[i], (references[i] or ["(none)"])[0], captions[i])
    for i in range(min(_EXHIBITS, len(images)))
  ]
  prompts = [texts[0] for texts in references if texts][:_EXHIBITS]
  if prompts:
    drawn = lavit.generate(prompts)
    exhibits.drawings = list(zip(prompts, drawn, strict=True))
