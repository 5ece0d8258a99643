"""Draws docs/tiny.png, the image of README: python docs/make_image.py."""

import math
import pathlib

import numpy as np

from lavit_jax.data.sources import shapes
from lavit_jax.evaluate.report import figures
from lavit_jax.infer import pipeline

PROMPTS = (
  "a large red circle at the top left and a small blue ring at the bottom"
  " right",
  "a small green triangle at the top right",
  "a large orange cross at the bottom right and a large cyan diamond at the"
  " top left",
)


def main():
  """One sheet: kept patches, captions, drawings and edits."""
  lavit = pipeline.LaVIT.load("tiny")
  source = shapes.ShapesSource("held_out", size=50)
  images = [source.image(i) for i in range(3)]
  side = math.isqrt(lavit.visual.num_patches)
  tiles, labels = [], []
  for image, token, caption in zip(
    images, lavit.tokenize(images), lavit.caption(images), strict=True
  ):
    shown = figures.overlay_mask(
      image, token["keep"], size=192, grid=(side, side)
    )
    tiles += [np.asarray(shown)]
    labels += [f"{len(token['codes'])} words: {caption}"]
  for prompt, drawn in zip(PROMPTS, lavit.generate(list(PROMPTS)), strict=True):
    tiles += [drawn]
    labels += [f"drawn: {prompt}"]
  for i in (3, 4, 5):
    before, words, _ = source.example("edit", i).parts
    image = source.image(before.image)
    tiles += [image, lavit.synthesize([image, words.text])]
    labels += ["before", f"edited: {words.text}"]
  sheet = figures.contact_sheet(tiles, labels, columns=6, cell=176)
  sheet.save(pathlib.Path(__file__).with_name("tiny.png"), optimize=True)


if __name__ == "__main__":
  main()
