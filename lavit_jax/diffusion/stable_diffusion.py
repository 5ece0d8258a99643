"""Sampling by the two official pixel decoders, from conditions to latents.

LaVIT, arXiv 2309.04669, section 3.2. *lowres* is Stable Diffusion 1.5's U-Net,
conditioned on N masked tokens; *highres* is SDXL's, conditioned on N tokens, a
pooled vector and six numbers of image size and crop. The networks are
callables, whose conditions are keyword arguments of `unet.UNet`. Latents are
channels last; the caller decodes them:

  @jax.jit
  def draw(params, tokens, uncond, seeds):
    denoise = lambda z, t, cond: net.apply({"params": params}, z, t, **cond)
    return stable_diffusion.lowres(
      denoise, schedule, settings, tokens, uncond, steps=25, seeds=seeds
    )
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.diffusion import sampling, schedules, solvers

RATIOS = {  # of the highres decoder; height, width
  "1:1": (1024, 1024),
  "4:3": (896, 1152),
  "3:2": (832, 1216),
  "16:9": (768, 1344),
  "2:3": (1216, 832),
  "3:4": (1152, 896),
}
LOWRES_GUIDANCE, HIGHRES_GUIDANCE = 5.0, 7.0  # the official defaults
Denoise = Callable[[jax.Array, jax.Array, Any], jax.Array]


def size_of(ratio: str, side: int = 1024, factor: int = 8) -> tuple[int, int]:
  """Returns height and width of a ratio: "4:3" gives (896, 1152).

  Args:
    ratio: a key of `RATIOS`.
    side: height and width of the decoder's square images; the result is in
      proportion.
    factor: height and width are multiples of it.

  Raises:
    errors.UsageError: the ratio is not in `RATIOS`.
  """
  if ratio not in RATIOS:
    raise errors.UsageError(
      f"The ratio {ratio!r} is unknown: give one of {', '.join(RATIOS)}, or a"
      " height and a width."
    )
  scale = side / (1024 * factor)
  height, width = (max(round(n * scale), 1) * factor for n in RATIOS[ratio])
  return height, width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Image size and solver; hashable, so that it can be static.

  Attributes:
    height: of the image, in pixels.
    width: of the image, in pixels.
    solver: see `solvers.named`.
    dtype: of the network's inputs; latents are float32 in the solver.
    channels: of the latents.
    factor: height and width, in pixels, of a latent position; the VAE's.
    progress: called on the host with (steps done, steps) after each step.

  Raises:
    errors.UsageError: a size is not a multiple of `factor`.
  """

  height: int
  width: int
  solver: solvers.Solver = solvers.OFFICIAL
  dtype: str = "float32"
  channels: int = 4
  factor: int = 8
  progress: sampling.Progress | None = None

  def __post_init__(self):
    for name in ("height", "width"):
      value = getattr(self, name)
      if value <= 0 or value % self.factor:
        nearest = max(round(value / self.factor), 1) * self.factor
        raise errors.UsageError(
          f"{name}={value} is not a multiple of {self.factor}, the {name} of a"
          f" latent position in pixels. The nearest multiple is {nearest}."
        )

  @property
  def shape(self) -> tuple[int, int, int]:
    """Returns height, width and channels of the latents of one image."""
    factor = self.factor
    return self.height // factor, self.width // factor, self.channels


def lowres(
  denoise: Denoise,
  schedule: schedules.NoiseSchedule,
  settings: Settings,
  tokens: jax.Array,
  uncond: jax.Array,
  *,
  steps: int | sampling.Steps,
  seeds: jax.Array,
  mask: jax.Array | None = None,
  guidance: float | jax.Array = LOWRES_GUIDANCE,
  noise: jax.Array | None = None,
) -> jax.Array:
  """Samples latents by the U-Net of Stable Diffusion 1.5.

  Args:
    denoise: maps (z [B, h, w, C], t int[B], {"condition": [B, N, D],
      "condition_mask": bool[B, N]}) to the U-Net's output; here B counts both
      streams.
    schedule: of the checkpoint.
    settings: sizes, solver.
    tokens: float[B, N, D], of `decoder.LowresDecoder`.
    uncond: float[1, U, D] or float[U, D], the checkpoint's unconditional
      embeddings; U at most N.
    steps: number of visited steps (static), or `sampling.planned` ones.
    seeds: int[B]; an image depends on its own seed only.
    mask: bool[B, N], False for masked tokens; None for no mask.
    guidance: factor of guidance; the Python number 1 runs the conditional
      stream only.
    noise: float[B, h, w, C] to start from, instead of noise from the seeds.

  Returns:
    float32[B, h, w, C], still to be divided by the VAE's scaling factor.

  Raises:
    errors.UsageError: shapes do not fit each other, or steps the schedule.
  """
  if mask is None:
    mask = jnp.ones(tokens.shape[:2], bool)
  _check_batch({"tokens": tokens, "mask": mask}, seeds)
  tokens = tokens.astype(settings.dtype)
  padded, uncond_mask = pad_uncond(uncond, tokens)
  return _sample(
    denoise,
    schedule,
    settings,
    {"condition": tokens, "condition_mask": mask.astype(bool)},
    {"condition": padded, "condition_mask": uncond_mask},
    (steps, seeds, guidance, noise),
  )


def pad_uncond(
  uncond: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Pads the tokens of the unconditional stream with masked zeros.

  Args:
    uncond: float[1, U, D] or float[U, D].
    tokens: float[B, N, D] of the conditional stream.

  Returns:
    Tokens [B, N, D] of the same dtype, and their mask bool[B, N].

  Raises:
    errors.UsageError: U > N, or another D.
  """
  uncond = uncond.reshape(-1, uncond.shape[-1])
  (used, width), (_, num, expected) = uncond.shape, tokens.shape
  if used > num or width != expected:
    raise errors.UsageError(
      f"The unconditional embeddings are {used} tokens of width {width}, but a"
      f" condition has {num} of width {expected}: the widths must be equal, and"
      f" the tokens at most {num}. They belong to another decoder."
    )
  padded = jnp.pad(uncond.astype(tokens.dtype), ((0, num - used), (0, 0)))
  mask = jnp.broadcast_to(jnp.arange(num) < used, tokens.shape[:2])
  return jnp.broadcast_to(padded, tokens.shape), mask


def highres(
  denoise: Denoise,
  schedule: schedules.NoiseSchedule,
  settings: Settings,
  tokens: jax.Array,
  pooled: jax.Array,
  *,
  steps: int | sampling.Steps,
  seeds: jax.Array,
  original_size: tuple[int, int] | None = None,
  crop: tuple[int, int] = (0, 0),
  guidance: float | jax.Array = HIGHRES_GUIDANCE,
  noise: jax.Array | None = None,
) -> jax.Array:
  """Samples latents by the U-Net of SDXL.

  In the unconditional stream tokens and pooled vector are zeros.

  Args:
    denoise: maps (z [B, h, w, C], t int[B], {"condition": [B, N, D], "pooled":
      [B, P], "sizes": float32[B, 6]}) to the U-Net's output; here B counts
      both streams.
    schedule: of the checkpoint.
    settings: sizes, solver.
    tokens: float[B, N, D], first result of `decoder.HighresDecoder`.
    pooled: float[B, P], its second result.
    steps: number of visited steps (static), or `sampling.planned` ones.
    seeds: int[B]; an image depends on its own seed only.
    original_size: height and width of the source to condition on; None for
      those of the image.
    crop: top and left of the crop to condition on.
    guidance: factor of guidance; the Python number 1 runs the conditional
      stream only.
    noise: float[B, h, w, C] to start from, instead of noise from the seeds.

  Returns:
    float32[B, h, w, C], still to be divided by the VAE's scaling factor.

  Raises:
    errors.UsageError: shapes do not fit each other, or steps the schedule.
  """
  _check_batch({"tokens": tokens, "pooled": pooled}, seeds)
  condition = {
    "condition": tokens.astype(settings.dtype),
    "pooled": pooled.astype(settings.dtype),
  }
  uncondition = jax.tree.map(jnp.zeros_like, condition)
  numbers = sizes(settings, len(seeds), original_size, crop)
  return _sample(
    denoise,
    schedule,
    settings,
    condition | {"sizes": numbers},
    uncondition | {"sizes": numbers},
    (steps, seeds, guidance, noise),
  )


def sizes(
  settings: Settings,
  count: int,
  original_size: tuple[int, int] | None = None,
  crop: tuple[int, int] = (0, 0),
) -> jax.Array:
  """Returns SDXL's size conditioning, float32[count, 6].

  Its columns are height and width of the source, top and left of the crop,
  height and width of the image.
  """
  target = (settings.height, settings.width)
  original = target if original_size is None else original_size
  row = [*original, *crop, *target]
  return jnp.broadcast_to(jnp.asarray(row, jnp.float32), (count, 6))


def _sample(denoise, schedule, settings, condition, uncondition, rest):
  steps, seeds, guidance, noise = rest
  # A traced factor may be any number: then both streams run.
  unguided = isinstance(guidance, int | float) and guidance == 1
  return sampling.sample(
    denoise,
    schedule,
    condition,
    seeds=seeds,
    shape=settings.shape,
    steps=steps,
    solver=settings.solver,
    uncondition=None if unguided else uncondition,
    guidance=guidance,
    noise=noise,
    dtype=jnp.dtype(settings.dtype),
    progress=settings.progress,
  )


def _check_batch(arrays, seeds):
  """Raises UsageError unless each array has one row per seed."""
  rows = {name: array.shape[0] for name, array in arrays.items()}
  if any(count != len(seeds) for count in rows.values()):
    listed = ", ".join(
      f"{count} rows of {name}" for name, count in rows.items()
    )
    raise errors.UsageError(
      f"{len(seeds)} seeds, but {listed}: give one of each per image."
    )
