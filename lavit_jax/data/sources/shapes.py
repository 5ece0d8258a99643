"""The embedded dataset: drawn scenes with words, unlimited, no download.

Scenes, splits, drawing and sentences are in data/shapes/. This file puts them
behind the Source protocol of examples.py.
"""

import dataclasses

import numpy as np

from lavit_jax.data import examples
from lavit_jax.data.shapes import questions as questions_lib
from lavit_jax.data.shapes import render as render_lib
from lavit_jax.data.shapes import scene as scene_lib
from lavit_jax.data.shapes import sentences as sentences_lib
from lavit_jax.data.shapes import text

Object = scene_lib.Object
Scene = scene_lib.Scene
render = render_lib.render
object_mask = render_lib.object_mask
object_shares = render_lib.object_shares

# Examples of each task for one scene: different words, same images.
VARIATIONS = {
  "image_text": 4,
  "text_image": 4,
  "edit": 2,
  "vqa": 2 * len(questions_lib.TYPES),
  "document": 4,
  "text": 4,
}
# Share of text_image examples with no text: the stream that guidance needs.
UNPROMPTED_SHARE = 0.1
# Questions on an image in one vqa example: an answer is two tokens, and the
# image that it needs about fourteen.
QUESTIONS_TOGETHER = 3
# How often each type is among those after the first: what must find an object
# by its looks, or compare, is learnt last.
_MORE_OFTEN = {"place": 2.0, "count": 2.0, "yes/no": 3.0}
# Purposes of random numbers, so that no two uses share a generator.
_PURPOSES = {"scene": 0, "captions": 7, "questions": 8} | {
  task: n for n, task in enumerate(examples.TASKS, start=1)
}


@dataclasses.dataclass(frozen=True)
class ShapesSource:
  """`size` scenes of a split, each with an edited version: 2 * size images.

  Image i < size is scene i; image size + i is the same scene edited.
  Everything is a pure function of (split, seed, index); a pickle is a few
  bytes, and methods may be called from any thread.
  """

  split: str = "train"
  size: int = 10_000
  image_size: int = 48
  seed: int = 0

  def __post_init__(self):
    scene_lib.check_split(self.split)
    render_lib.check_image_size(self.image_size)
    if self.size < 1 or self.seed < 0:
      raise ValueError(
        f"size={self.size}, seed={self.seed}: a shapes source has at least one"
        " scene and a seed of 0 or more. Change data.size or data.seed."
      )

  @property
  def name(self):
    """Names what the images are a function of, but their number."""
    return f"shapes/{self.split}/seed{self.seed}"

  @property
  def num_images(self):
    """Scenes and their edited versions."""
    return 2 * self.size

  def scene(self, i):
    """The Scene of image i, 0 <= i < num_images."""
    self._check(i, self.num_images, "image")
    scene, edit = self._sample(i % self.size)
    return scene if i < self.size else edit.scene

  def edit(self, i):
    """The Edit that leads from image i to image size + i."""
    self._check(i, self.size, "scene")
    return self._sample(i)[1]

  def image(self, i):
    """Image i as uint8[image_size, image_size, 3]."""
    return render(self.scene(i), self.image_size)

  def image_key(self, i):
    """Name of image i: "train/0/12" or "train/0/12/edited"."""
    self._check(i, self.num_images, "image")
    edited = "/edited" if i >= self.size else ""
    return f"{self.split}/{self.seed}/{i % self.size}{edited}"

  def captions(self, i):
    """The plain full caption of image i, two more full ones, and any."""
    scene = self.scene(i)
    rng = self._rng("captions", i)
    return [
      text.full_caption(scene),
      text.full_caption(scene, rng),
      text.full_caption(scene, rng),
      text.caption(scene, rng),
    ]

  def tasks(self):
    """All tasks of examples.TASKS."""
    return examples.TASKS

  def num_examples(self, task):
    """Scenes times VARIATIONS of the task."""
    if task not in self.tasks():
      raise ValueError(
        f"task={task!r} is unknown to the shapes source: it has"
        f" {', '.join(self.tasks())}. Change the mixture."
      )
    return self.size * VARIATIONS[task]

  def example(self, task, i):
    """Example i of a task; images are referred to, not drawn."""
    self._check(i, self.num_examples(task), f"{task} example")
    build = getattr(self, f"_{task}")
    key = f"{self.name}/{task}/{i}"
    scene, rng = i % self.size, self._rng(task, i)
    if task == "vqa":
      kinds = questions_lib.TYPES
      return build(key, scene, rng, kinds[i // self.size % len(kinds)])
    return build(key, scene, rng)

  def questions(self, i):
    """One question of every type about image i: (type, question, answer)."""
    rng = self._rng("questions", i)
    return questions_lib.questions(self.scene(i), rng)

  def sentences(self, i):
    """Text number i, about the world or a scene, without any image."""
    return self.example("text", i).parts[0].text

  def _image_text(self, key, i, rng):
    words = text.caption(self.scene(i), rng)
    return examples.image_text(key, i, words)

  def _text_image(self, key, i, rng):
    if rng.random() < UNPROMPTED_SHARE:
      parts = (examples.ImagePart(i, write=True),)
      return examples.Example(key, "text_image", parts)
    words = text.caption(self.scene(i), rng)
    return examples.text_image(key, i, words)

  def _edit(self, key, i, rng):
    words = text.instruction(self.scene(i), self.edit(i), rng)
    return examples.edit(key, i, words, self.size + i)

  def _vqa(self, key, i, rng, kind):
    others = [k for k in questions_lib.TYPES if k != kind]
    odds = np.array([_MORE_OFTEN.get(k, 1.0) for k in others])
    count = QUESTIONS_TOGETHER - 1
    more = rng.choice(others, count, replace=False, p=odds / odds.sum())
    scene = self.scene(i)
    turns = [questions_lib.question(scene, k, rng) for k in (kind, *more)]
    return examples.dialogue(key, i, turns)

  def _document(self, key, i, rng):
    build = (_draw_two, _read_two, _draw_a_change, _read_a_change)
    other = (i + 1 + int(rng.integers(max(self.size - 1, 1)))) % self.size
    parts = build[rng.integers(len(build))](self, i, other, rng)
    return examples.Example(key, "document", parts)

  def _text(self, key, i, rng):
    words = sentences_lib.sentence(self.scene(i), self.edit(i), rng)
    return examples.text(key, words)

  def _sample(self, i):
    return scene_lib.sample(self.split, self.seed, i)

  def _rng(self, purpose, i):
    number = _PURPOSES[purpose]
    return scene_lib.generator(self.seed, self.split, i, number)

  def _check(self, i, count, what):
    if not 0 <= i < count:
      raise IndexError(
        f"{what} {i} of {self.name} does not exist: there are {count},"
        " numbered from 0. Raise data.size or ask for a smaller number."
      )


def _draw_two(source, i, other, rng):
  """Words and an image, twice."""
  first = text.full_caption(source.scene(i), rng)
  second = text.full_caption(source.scene(other), rng)
  return (
    examples.TextPart(f"first {first}"),
    examples.ImagePart(i, write=True),
    examples.TextPart(f"then {second}"),
    examples.ImagePart(other, write=True),
  )


def _read_two(source, i, other, rng):
  """Two images, then the words of both in the same order."""
  first = text.full_caption(source.scene(i), rng)
  second = text.full_caption(source.scene(other), rng)
  return (
    examples.ImagePart(i, write=False),
    examples.ImagePart(other, write=False),
    examples.TextPart(f"first {first}. then {second}."),
  )


def _draw_a_change(source, i, other, rng):
  """Words, their image, an instruction, the changed image."""
  del other
  scene, edit = source.scene(i), source.edit(i)
  return (
    examples.TextPart(f"first {text.full_caption(scene, rng)}"),
    examples.ImagePart(i, write=True),
    examples.TextPart(f"then {text.instruction(scene, edit, rng)}"),
    examples.ImagePart(source.size + i, write=True),
  )


def _read_a_change(source, i, other, rng):
  """Two images, then the instruction that leads from one to the other."""
  del other
  words = text.instruction(source.scene(i), source.edit(i), rng)
  return (
    examples.ImagePart(i, write=False),
    examples.ImagePart(source.size + i, write=False),
    examples.TextPart(f"what changed: {words}"),
  )
