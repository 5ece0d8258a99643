"""Draws the images of README and the tutorial: python docs/make_image.py."""

import math
import pathlib

import numpy as np
import PIL.Image

from lavit_jax.data.sources import shapes
from lavit_jax.evaluate.report import figures
from lavit_jax.infer import pipeline

HERE = pathlib.Path(__file__).parent
PROMPTS = (
  "a large red circle at the top left and a small blue ring at the bottom"
  " right",
  "a small green triangle at the top right",
  "a large orange cross at the bottom right and a large cyan diamond at the"
  " top left",
)
RING = "a small blue ring at the top right"
EDIT = "make the small ring red"


def main() -> None:
  """Writes tiny.png, scene.png, reading.png and drawing.png."""
  lavit = pipeline.LaVIT.load("tiny")
  source = shapes.ShapesSource("held_out", size=50)
  _save(readme(lavit, source), "tiny.png")
  scene = source.image(0)
  _save(PIL.Image.fromarray(scene), "scene.png")
  _save(reading(lavit, scene), "reading.png")
  _save(drawing(lavit), "drawing.png")


def readme(lavit, source) -> PIL.Image.Image:
  """Returns one sheet: kept patches, captions, drawings and edits."""
  images = [source.image(i) for i in range(3)]
  tiles, labels = [], []
  for image, token, caption in zip(
    images, lavit.tokenize(images), lavit.caption(images), strict=True
  ):
    tiles += [_overlay(lavit, image, token)]
    labels += [f"{len(token['codes'])} tokens: {caption}"]
  for prompt, drawn in zip(PROMPTS, lavit.generate(list(PROMPTS)), strict=True):
    tiles += [drawn]
    labels += [f"drawn: {prompt}"]
  for i in (3, 4, 5):
    before, text, _ = source.example("edit", i).parts
    image = source.image(before.image)
    tiles += [image, lavit.synthesize([image, text.text])]
    labels += ["before", f"edited: {text.text}"]
  return figures.contact_sheet(tiles, labels, columns=6, cell=176)


def reading(lavit, scene: np.ndarray) -> PIL.Image.Image:
  """Returns a scene, its kept patches, and what its tokens hold of it."""
  token = lavit.tokenize(scene)
  again = lavit.draw_codes([token["codes"]])[0]
  tiles = [scene, _overlay(lavit, scene, token), again]
  labels = [
    "docs/scene.png",
    f"{len(token['codes'])} of {len(token['keep'])} patches are kept",
    "painted again from the visual tokens",
  ]
  return figures.contact_sheet(tiles, labels, columns=3, cell=192)


def drawing(lavit) -> PIL.Image.Image:
  """Returns a drawing from text, and an edit of it."""
  drawn = lavit.generate(RING, seed=3)
  tiles, labels = [drawn, lavit.synthesize([drawn, EDIT])], [RING, EDIT]
  return figures.contact_sheet(tiles, labels, columns=2, cell=192)


def _overlay(lavit, image, token) -> np.ndarray:
  side = math.isqrt(lavit.visual.num_patches)
  shown = figures.overlay_mask(
    image, token["keep"], size=192, grid=(side, side)
  )
  return np.asarray(shown)


def _save(image: PIL.Image.Image, name: str) -> None:
  image.save(HERE / name, optimize=True)


if __name__ == "__main__":
  main()
