"""Decoders of JPEGs and ways to resize them: how fast, and how far apart.

  pip install -e '.[fast]' torch torchvision opencv-python-headless imagecodecs
  python benchmarks/decoders.py PHOTOGRAPHS.jsonl [--enlarged 2000]

Every way runs in one thread on the same photographs (lines of image, JPEGs), in
turn, three times; the least CPU time counts. "far" is the distance of pixels,
0 to 255, to those of Pillow (decoding) or of `decoding.exact` (squares of 224
pixels): the largest, and the mean. With --enlarged, the photographs are first
enlarged so that their shorter side has so many pixels, and encoded at quality
92. Libraries that are not installed are left out.
"""

import argparse
import io
import json
import pathlib
import time

import numpy as np
from PIL import Image

from lavit_jax.data.images import decoding

SIDE = 224
ROUNDS = 3


def _pillow(data):
  return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def _decoders():
  """Yields (name, function of bytes) of each decoder that is installed."""
  yield "Pillow", _pillow
  try:
    import simplejpeg

    yield "simplejpeg", simplejpeg.decode_jpeg
    yield (
      "simplejpeg, fast upsampling and DCT",
      lambda d: simplejpeg.decode_jpeg(d, fastupsample=True, fastdct=True),
    )
  except ImportError:
    pass
  try:
    import cv2

    cv2.setNumThreads(1)
    colour = cv2.IMREAD_COLOR_RGB
    yield "OpenCV", lambda d: cv2.imdecode(np.frombuffer(d, np.uint8), colour)
  except ImportError:
    pass
  try:
    import imagecodecs

    yield "imagecodecs", imagecodecs.jpeg8_decode
  except ImportError:
    pass
  if (read := _torchvision()) is not None:
    yield "torchvision", lambda d: read(d).numpy().transpose(1, 2, 0)


def _torchvision():
  try:
    import torch
    import torchvision
  except ImportError:
    return None
  torch.set_num_threads(1)
  mode = torchvision.io.ImageReadMode.RGB

  def read(data):
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(tensor, mode=mode)

  return read


def _squares():
  """Yields (name, function of bytes) of each way to a square."""
  yield "exact: Pillow", lambda d: decoding.exact(d, SIDE)
  yield "fast: simplejpeg, cykooz_resizer", lambda d: decoding.fast(d, SIDE)
  if (read := _torchvision()) is not None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    def resized(data):
      square = functional.resize(
        read(data),
        [SIDE, SIDE],
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
      )
      return square.numpy().transpose(1, 2, 0)

    yield "torchvision", resized


def _measure(ways, images) -> None:
  """Prints a line for each way; the first one is what others are far from."""
  ways = dict(ways)
  times = dict.fromkeys(ways, float("inf"))
  for _ in range(ROUNDS):
    for name, way in ways.items():
      begun = time.process_time()
      for data in images:
        way(data)
      times[name] = min(times[name], time.process_time() - begun)
  first = next(iter(ways.values()))
  for name, way in ways.items():
    far = [np.abs(first(d).astype(int) - way(d)) for d in images]
    print(
      f"{name:38s} {len(images) / times[name]:6.0f} images/s   far"
      f" {max(x.max() for x in far):3d}, {np.mean([x.mean() for x in far]):.2f}"
    )


def _enlarged(data, side) -> bytes:
  image = Image.open(io.BytesIO(data)).convert("RGB")
  scale = side / min(image.size)
  size = tuple(round(n * scale) for n in image.size)
  file = io.BytesIO()
  image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
  return file.getvalue()


def main() -> None:
  """Prints two tables: decoding alone, and decoding to a square."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("photographs")
  parser.add_argument("--enlarged", type=int, default=0, metavar="PIXELS")
  parser.add_argument("--images", type=int, default=300)
  args = parser.parse_args()
  path = pathlib.Path(args.photographs)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  count = min(args.images, 40) if args.enlarged else args.images
  images = [(path.parent / r["image"]).read_bytes() for r in rows[:count]]
  if args.enlarged:
    images = [_enlarged(data, args.enlarged) for data in images]
  print(f"{len(images)} JPEGs, one thread")
  _measure(_decoders(), images)
  print(f"to squares of {SIDE} pixels")
  _measure(_squares(), images)


if __name__ == "__main__":
  main()
