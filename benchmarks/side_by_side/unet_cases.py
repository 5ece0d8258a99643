"""What the U-Net benchmark runs: sizes, cases, and their inputs.

Knows neither JAX nor PyTorch, as both sides read it.
"""

import dataclasses
import time

import numpy as np

TOKENS = 256  # of a condition, as the official decoder has
SEEN = 77  # of the unconditional stream
GUIDANCE = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """A U-Net of Stable Diffusion 1.5's shape, and the VAE whose memory counts.

  Attributes:
    channels: of the U-Net's levels.
    latent: places a side of the latents.
    vae_channels: of the VAE's levels.
    image: pixels a side of what the VAE decodes.
    tiles: places a side of the tiles it is decoded in.
  """

  channels: tuple[int, ...]
  layers_per_block: int
  heads: int
  cross_dim: int
  groups: int
  latent: int
  vae_channels: tuple[int, ...]
  image: int
  tiles: tuple[int, ...]


FULL = Sizes(
  channels=(128, 256, 512, 512),
  layers_per_block=1,
  heads=8,
  cross_dim=768,
  groups=32,
  latent=64,
  vae_channels=(128, 256, 512, 512),
  image=1024,
  tiles=(64, 32),
)
SMALL = Sizes(
  channels=(16, 32),
  layers_per_block=1,
  heads=2,
  cross_dim=24,
  groups=8,
  latent=8,
  vae_channels=(16, 32),
  image=128,
  tiles=(32, 16),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Guided sampling of `batch` images by DDIM.

  Attributes:
    unit, count: steps, for the table.
  """

  name: str
  steps: int
  unit: str = "steps"

  @property
  def count(self) -> int:
    """Steps of an image."""
    return self.steps


CASES = (Case(name="unet_ddim", steps=10),)


# 3 x 3, two rows: side of the map, channels in, channels out.
CONVOLUTIONS = (
  (64, 128, 128),
  (64, 256, 128),
  (32, 256, 256),
  (32, 512, 256),
  (16, 512, 512),
)


def gflop(shape) -> float:
  """Of one convolution, in 1e9 operations."""
  side, into, out = shape
  return 2 * 9 * 2 * side**2 * into * out / 1e9


def fastest(run, times: int = 5) -> float:
  """Least seconds of a few calls, the first left out."""
  run()
  seconds = []
  for _ in range(times):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def inputs(sizes: Sizes, batch: int) -> dict[str, np.ndarray]:
  """Noise NHWC, the condition, and the unconditional embeddings."""
  rng = np.random.default_rng(0)
  side, width = sizes.latent, sizes.cross_dim
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "noise": draw(batch, side, side, 4),
    "tokens": draw(batch, TOKENS, width),
    "uncond": draw(1, SEEN, width),
  }
