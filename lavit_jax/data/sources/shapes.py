"""The embedded dataset: drawn scenes and texts about them, without download.

Scenes, splits, drawing and sentences are in data/shapes/; this module makes
them a Source.
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

# Examples of each task for one scene: different texts, same images.
VARIATIONS = {
  "image_text": 4,
  "text_image": 4,
  "edit": 2,
  "vqa": 2 * len(questions_lib.TYPES),
  "document": 4,
  "text": 4,
}
# Share of text_image examples without text, for classifier-free guidance.
UNPROMPTED_SHARE = 0.1
# Questions about the image in one vqa example: an answer has two tokens, the
# image that it needs about fourteen.
QUESTIONS_TOGETHER = 3
# Relative frequency of each type among the questions after the first: types
# that need to find an object by its looks, or to compare, are learnt last.
_FREQUENCIES = {"place": 2.0, "count": 2.0, "yes/no": 3.0}
# A number for each use of random numbers, so that none share a generator.
_PURPOSES = {"scene": 0, "captions": 7, "questions": 8} | {
  task: n for n, task in enumerate(examples.TASKS, start=1)
}


@dataclasses.dataclass(frozen=True)
class ShapesSource:
  """`size` scenes of a split, each with an edited version: 2 * size images.

  Image i < size is scene i; image size + i is the same scene edited.
  Everything is a pure function of (split, seed, index); a pickle is a few
  bytes, and methods may be called from any thread.

  Attributes:
    split: one of scene.SPLITS.
    size: number of scenes.
    image_size: height and width of the images, in pixels.
    seed: of the scenes and texts.
  """

  split: str = "train"
  size: int = 10_000
  image_size: int = 48
  seed: int = 0

  def __post_init__(self) -> None:
    scene_lib.check_split(self.split)
    render_lib.check_image_size(self.image_size)
    if self.size < 1 or self.seed < 0:
      raise ValueError(
        f"size={self.size}, seed={self.seed}: a shapes source has at least one"
        " scene and a seed of 0 or more. Change data.size or data.seed."
      )

  @property
  def name(self) -> str:
    """Split and seed; with image_size, they determine the images."""
    return f"shapes/{self.split}/seed{self.seed}"

  @property
  def num_images(self) -> int:
    """Number of scenes and edited versions."""
    return 2 * self.size

  def scene(self, i: int) -> scene_lib.Scene:
    """Returns the Scene of image i, 0 <= i < num_images."""
    self._check(i, self.num_images, "image")
    scene, edit = self._sample(i % self.size)
    return scene if i < self.size else edit.scene

  def edit(self, i: int) -> scene_lib.Edit:
    """Returns the Edit that leads from image i to image size + i."""
    self._check(i, self.size, "scene")
    return self._sample(i)[1]

  def image(self, i: int) -> np.ndarray:
    """Returns image i, uint8[image_size, image_size, 3]."""
    return render(self.scene(i), self.image_size)

  def image_key(self, i: int) -> str:
    """Returns the name of image i: "train/0/12" or "train/0/12/edited"."""
    self._check(i, self.num_images, "image")
    edited = "/edited" if i >= self.size else ""
    return f"{self.split}/{self.seed}/{i % self.size}{edited}"

  def captions(self, i: int) -> list[str]:
    """Returns the plain caption of image i, two other full ones, and any."""
    scene = self.scene(i)
    rng = self._rng("captions", i)
    return [
      text.full_caption(scene),
      text.full_caption(scene, rng),
      text.full_caption(scene, rng),
      text.caption(scene, rng),
    ]

  def tasks(self) -> tuple[str, ...]:
    """Returns all tasks of examples.TASKS."""
    return examples.TASKS

  def num_examples(self, task: str) -> int:
    """Returns the number of scenes times VARIATIONS of the task."""
    if task not in self.tasks():
      raise ValueError(
        f"task={task!r} is unknown to the shapes source: it has"
        f" {', '.join(self.tasks())}. Change the mixture."
      )
    return self.size * VARIATIONS[task]

  def example(self, task: str, i: int) -> examples.Example:
    """Returns example i of a task; draws no image."""
    self._check(i, self.num_examples(task), f"{task} example")
    build = getattr(self, f"_{task}")
    key = f"{self.name}/{task}/{i}"
    scene, rng = i % self.size, self._rng(task, i)
    if task == "vqa":
      kinds = questions_lib.TYPES
      return build(key, scene, rng, kinds[i // self.size % len(kinds)])
    return build(key, scene, rng)

  def questions(self, i: int) -> list[tuple[str, str, str]]:
    """Returns a question of each type on image i: (type, question, answer)."""
    rng = self._rng("questions", i)
    return questions_lib.questions(self.scene(i), rng)

  def sentences(self, i: int) -> str:
    """Returns the text of text example i, about words or about a scene."""
    (part,) = self.example("text", i).parts
    assert isinstance(part, examples.TextPart)
    return part.text

  def _image_text(self, key, i, rng):
    return examples.image_text(key, i, text.caption(self.scene(i), rng))

  def _text_image(self, key, i, rng):
    if rng.random() < UNPROMPTED_SHARE:
      parts = (examples.ImagePart(i, write=True),)
      return examples.Example(key, "text_image", parts)
    return examples.text_image(key, i, text.caption(self.scene(i), rng))

  def _edit(self, key, i, rng):
    instruction = text.instruction(self.scene(i), self.edit(i), rng)
    return examples.edit(key, i, instruction, self.size + i)

  def _vqa(self, key, i, rng, kind):
    others = [k for k in questions_lib.TYPES if k != kind]
    odds = np.array([_FREQUENCIES.get(k, 1.0) for k in others])
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
    sentence = sentences_lib.sentence(self.scene(i), self.edit(i), rng)
    return examples.text(key, sentence)

  def _sample(self, i):
    return scene_lib.sample(self.split, self.seed, i)

  def _rng(self, purpose, i):
    number = _PURPOSES[purpose]
    return scene_lib.generator(self.seed, self.split, i, number)

  def _check(self, i, count, unit):
    if not 0 <= i < count:
      raise IndexError(
        f"{unit} {i} of {self.name} does not exist: there are {count},"
        " numbered from 0. Raise data.size or ask for a smaller number."
      )


def _draw_two(source, i, other, rng):
  """A caption and its image, twice."""
  first = text.full_caption(source.scene(i), rng)
  second = text.full_caption(source.scene(other), rng)
  return (
    examples.TextPart(f"first {first}"),
    examples.ImagePart(i, write=True),
    examples.TextPart(f"then {second}"),
    examples.ImagePart(other, write=True),
  )


def _read_two(source, i, other, rng):
  """Two images, then their captions in the same order."""
  first = text.full_caption(source.scene(i), rng)
  second = text.full_caption(source.scene(other), rng)
  return (
    examples.ImagePart(i, write=False),
    examples.ImagePart(other, write=False),
    examples.TextPart(f"first {first}. then {second}."),
  )


def _draw_a_change(source, i, other, rng):
  """A caption, its image, an instruction, the changed image."""
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
  instruction = text.instruction(source.scene(i), source.edit(i), rng)
  return (
    examples.ImagePart(i, write=False),
    examples.ImagePart(source.size + i, write=False),
    examples.TextPart(f"what changed: {instruction}"),
  )
