"""Every held-out measurement of a whole model, and exhibits for the report."""

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lavit_jax import checkpoints
from lavit_jax.data import shapes, sources
from lavit_jax.evaluate import shapes as shapes_scores
from lavit_jax.evaluate import tokenizer as tokenizer_scores
from lavit_jax.train import progress

CODE_PICTURES = 2_000  # pictures over which the use of codes is counted
_NEVER_SEEN = 200  # scenes with never-seen pairs, at most
_DRAWING_STEPS = 12  # of the pixel decoder; 20 are 0.01 to 0.02 better
_EXHIBITS = 12


@dataclasses.dataclass
class Exhibits:
  """What the report shows of a model's work, a list entry a picture."""

  pictures: list[np.ndarray] = dataclasses.field(default_factory=list)
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
  lavit, *, data: Mapping[str, Any], scenes: int = 500, quiet: bool = False
):
  """Evaluates a `LaVIT` on held-out data.

  Args:
    lavit: a loaded model with all its parts.
    data: config.data of the run.
    scenes: held-out scenes for every score; codes are counted over 2,000.
    quiet: no progress bar.

  Returns:
    (metrics: dict of floats, exhibits: `Exhibits`).
  """
  exhibits = Exhibits()
  metrics: dict[str, Any] = {"scenes": scenes}
  metrics["parameters"] = {
    part: checkpoints.count_params(
      checkpoints.load_part(lavit.directory, part).params
    )
    for part in lavit.parts
  }
  if data["kind"] != "shapes":
    source = sources.build(data, "held_out")
    _own_data(lavit, source, metrics, exhibits)
    return metrics, exhibits
  sized = dict(data) | {"held_out_size": max(scenes, CODE_PICTURES)}
  held_out = sources.build(sized, "held_out")
  never_seen = sources.build(sized, "never_seen")
  few = min(scenes, _NEVER_SEEN)
  steps = (
    ("tokenizer", lambda: _tokenizer(lavit, held_out, metrics, exhibits)),
    ("captions", lambda: _captions(lavit, held_out, scenes, metrics, exhibits)),
    ("answers", lambda: _answers(lavit, held_out, scenes, metrics, exhibits)),
    ("drawings", lambda: _drawings(lavit, held_out, scenes, metrics, exhibits)),
    ("edits", lambda: _edits(lavit, held_out, scenes, metrics, exhibits)),
    ("never seen", lambda: _never_seen(lavit, never_seen, few, metrics)),
  )
  with progress.Progress(
    len(steps), label="evaluate", stream=io.StringIO() if quiet else None
  ) as bar:
    for number, (name, action) in enumerate(steps):
      action()
      bar.update(number + 1)
      bar.print(f"evaluate: {name} done")
  return metrics, exhibits


def _tokenizer(lavit, source, metrics, exhibits):
  indices = range(max(metrics["scenes"], CODE_PICTURES))
  pictures = np.stack([source.image(i) for i in indices])
  size = source.image_size
  patches = math.isqrt(lavit.visual.num_patches)  # a side
  shares = np.stack(
    [
      shapes.object_shares(source.scene(i), size, size // patches)
      for i in indices
    ]
  )
  metrics |= tokenizer_scores.quality(lavit.visual, pictures, shares)
  tokens = lavit.tokenize(list(pictures[:500]))
  kept = np.array([len(t["codes"]) for t in tokens])
  objects = np.array([len(source.scene(i).objects) for i in range(500)])
  for count in np.unique(objects):
    mean = float(kept[objects == count].mean())
    metrics[f"tokens_for_{count}_objects"] = mean
  exhibits.pictures = list(pictures[:_EXHIBITS])
  exhibits.keeps = [t["keep"] for t in tokens[:_EXHIBITS]]
  exhibits.redrawn = lavit.reconstruct(list(pictures[:_EXHIBITS]))
  _code_examples(pictures, tokens, patches, exhibits)
  redrawn = lavit.reconstruct(list(pictures[:200]))
  metrics |= shapes_scores.object_scores(
    [source.scene(i).objects for i in range(200)],
    [shapes_scores.judge(np.asarray(image)) for image in redrawn],
    "reconstruct",
  )


def _code_examples(pictures, tokens, side, exhibits, each: int = 6):
  """Some patches for every code, for the codebook sheet."""
  size = pictures.shape[1] // side
  for picture, token in zip(pictures, tokens, strict=False):
    places = np.flatnonzero(token["keep"])
    for place, code in zip(places, token["codes"], strict=True):
      found = exhibits.code_patches.setdefault(int(code), [])
      if len(found) < each:
        y, x = (place // side) * size, (place % side) * size
        found.append(picture[y : y + size, x : x + size])


def _captions(lavit, source, scenes, metrics, exhibits):
  pictures = [source.image(i) for i in range(scenes)]
  captions = lavit.caption(pictures)
  objects = [source.scene(i).objects for i in range(scenes)]
  metrics |= shapes_scores.caption_scores(objects, captions)
  exhibits.captions = [
    (pictures[i], source.captions(i)[0], captions[i])
    for i in range(min(_EXHIBITS, scenes))
  ]


def _asked(source, scenes):
  """(scene, type, question, answer): every second type, by turns."""
  return [
    (i, *question)
    for i in range(scenes)
    for question in source.questions(i)[i % 2 :: 2]
  ]


def _answers(lavit, source, scenes, metrics, exhibits):
  asked = _asked(source, scenes)
  pictures = [source.image(i) for i, *_ in asked]
  answers = lavit.answer(pictures, [q for _, _, q, _ in asked])
  metrics |= shapes_scores.vqa_scores(
    [kind for _, kind, _, _ in asked], [a for *_, a in asked], answers
  )
  exhibits.answers = [
    (pictures[n], asked[n][2], asked[n][3], answers[n])
    for n in range(0, min(len(asked), _EXHIBITS * 7), 7)
  ]


def _drawings(lavit, source, scenes, metrics, exhibits):
  prompts = [source.captions(i)[0] for i in range(scenes)]
  objects = [source.scene(i).objects for i in range(scenes)]
  drawn = lavit.generate(prompts, steps=_DRAWING_STEPS)
  arrays = [np.asarray(image) for image in drawn]
  metrics |= shapes_scores.drawing_scores(objects, arrays)
  plain = lavit.generate(
    prompts[:100], guidance_scale=1.0, steps=_DRAWING_STEPS
  )
  scores = shapes_scores.drawing_scores(
    objects[:100], [np.asarray(image) for image in plain]
  )
  metrics["t2i_attributes_without_guidance"] = scores["t2i_attributes"]
  guided = shapes_scores.drawing_scores(objects[:100], arrays[:100])
  metrics["t2i_attributes_with_guidance"] = guided["t2i_attributes"]
  exhibits.drawings = list(
    zip(prompts[:_EXHIBITS], drawn[:_EXHIBITS], strict=True)
  )


def _edit_prompts(source, scenes):
  """(picture, words, objects of the result) of each scene's edit."""
  rows = []
  for i in range(scenes):
    parts = source.example("edit", i).parts
    rows.append(
      (
        source.image(parts[0].image),
        parts[1].text,
        source.scene(parts[2].image).objects,
      )
    )
  return rows


def _edits(lavit, source, scenes, metrics, exhibits):
  rows = _edit_prompts(source, scenes)
  drawn = lavit.synthesize_batch(
    [[image, words] for image, words, _ in rows], steps=_DRAWING_STEPS
  )
  metrics |= shapes_scores.drawing_scores(
    [objects for *_, objects in rows], [np.asarray(d) for d in drawn], "edit"
  )
  exhibits.edits = [
    (rows[n][0], rows[n][1], drawn[n]) for n in range(min(_EXHIBITS, scenes))
  ]


def _never_seen(lavit, source, scenes, metrics):
  """The same scores on colour-shape pairs that no stage has seen."""
  pictures = [source.image(i) for i in range(scenes)]
  objects = [source.scene(i).objects for i in range(scenes)]
  captions = lavit.caption(pictures)
  metrics |= shapes_scores.caption_scores(
    objects, captions, "never_seen_caption"
  )
  asked = _asked(source, scenes)
  answers = lavit.answer(
    [pictures[i] for i, *_ in asked], [q for _, _, q, _ in asked]
  )
  metrics |= shapes_scores.vqa_scores(
    [kind for _, kind, _, _ in asked],
    [a for *_, a in asked],
    answers,
    "never_seen_vqa",
  )
  prompts = [source.captions(i)[0] for i in range(scenes)]
  drawn = lavit.generate(prompts, steps=_DRAWING_STEPS)
  metrics |= shapes_scores.drawing_scores(
    objects, [np.asarray(d) for d in drawn], "never_seen_t2i"
  )
  rows = _edit_prompts(source, scenes)
  drawn = lavit.synthesize_batch(
    [[image, words] for image, words, _ in rows], steps=_DRAWING_STEPS
  )
  metrics |= shapes_scores.drawing_scores(
    [o for *_, o in rows], [np.asarray(d) for d in drawn], "never_seen_edit"
  )


def _own_data(lavit, source, metrics, exhibits):
  """What can be measured without knowing what is in the pictures."""
  indices = range(min(source.num_images, 100))
  pictures = np.stack([source.image(i) for i in indices])
  whole = len(pictures) // 50 * 50
  if whole:
    metrics |= tokenizer_scores.quality(lavit.visual, pictures[:whole])
  tokens = lavit.tokenize(list(pictures))
  captions = lavit.caption(list(pictures))
  wanted = [source.captions(i) for i in indices]
  right = [c in w for c, w in zip(captions, wanted, strict=True)]
  metrics["caption_exact"] = float(np.mean(right))
  exhibits.pictures = list(pictures[:_EXHIBITS])
  exhibits.keeps = [t["keep"] for t in tokens[:_EXHIBITS]]
  exhibits.redrawn = lavit.reconstruct(list(pictures[:_EXHIBITS]))
  exhibits.captions = [
    (pictures[i], (wanted[i] or ["(none)"])[0], captions[i])
    for i in range(min(_EXHIBITS, len(pictures)))
  ]
  prompts = [w[0] for w in wanted if w][:_EXHIBITS]
  if prompts:
    drawn = lavit.generate(prompts)
    exhibits.drawings = list(zip(prompts, drawn, strict=True))
