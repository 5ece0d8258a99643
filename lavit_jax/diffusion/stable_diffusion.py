"""The two official pixel decoders, from conditions to latents.

LaVIT, arXiv 2309.04669, section 3.2. *lowres* is Stable Diffusion 1.5's U-Net,
told by N masked tokens; *highres* is SDXL's, told by N tokens, a pooled vector
and six numbers of size and place. The networks are callables, whose conditions
have the names that `unet.UNet` gives them; latents are channels last, and
whoever asks for them decodes them:

  @jax.jit
  def draw(params, tokens, uncond, seeds):
    denoise = lambda z, t, given: net.apply({"params": params}, z, t, **given)
    return latents.lowres(
      denoise, schedule, settings, tokens, uncond, seeds=seeds
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
  """Height and width of a ratio: "4:3" gives (896, 1152).

  Args:
    ratio: a key of `RATIOS`.
    side: of the square that the decoder draws; the sizes are in proportion.
    factor: of which they are multiples.

  Raises:
    errors.UsageError: the ratio is none of `RATIOS`.
  """
  if ratio not in RATIOS:
    raise errors.UsageError(
      f"The ratio {ratio!r} is not known: give one of {', '.join(RATIOS)}, or"
      " a height and a width."
    )
  scale = side / (1024 * factor)
  height, width = (max(round(n * scale), 1) * factor for n in RATIOS[ratio])
  return height, width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is drawn and how; hashable, for a static argument.

  Attributes:
    height: of the image, in pixels.
    width: of the image, in pixels.
    steps: that the solver visits.
    solver: see `solvers.named`.
    dtype: of what the network is given; latents are float32 throughout.
    channels: of the latents.
    factor: pixels of a latent place, to each side; the VAE's.
    progress: called on the host with (steps done, steps) after each step.

  Raises:
    errors.UsageError: a size is not a multiple of `factor`.
  """

  height: int
  width: int
  steps: int
  solver: solvers.Solver = solvers.OFFICIAL
  dtype: str = "float32"
  channels: int = 4
  factor: int = 8
  progress: Callable[[int, int], None] | None = None

  def __post_init__(self):
    for name in ("height", "width"):
      value = getattr(self, name)
      if value <= 0 or value % self.factor:
        near = max(round(value / self.factor), 1) * self.factor
        raise errors.UsageError(
          f"{name}={value} is not a multiple of {self.factor}, the pixels of a"
          f" latent place to each side: {near} is near."
        )

  @property
  def shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the latents of one image."""
    factor = self.factor
    return self.height // factor, self.width // factor, self.channels


def lowres(
  denoise: Denoise,
  schedule: schedules.NoiseSchedule,
  settings: Settings,
  tokens: jax.Array,
  uncond: jax.Array,
  *,
  seeds: jax.Array,
  mask: jax.Array | None = None,
  guidance: float | jax.Array = LOWRES_GUIDANCE,
  noise: jax.Array | None = None,
) -> jax.Array:
  """Latents by the U-Net of Stable Diffusion 1.5.

  Args:
    denoise: (z [B, h, w, C], t int[B], {"condition": [B, N, D],
      "condition_mask": bool[B, N]}) -> its output; B counts both streams.
    schedule: of the checkpoint.
    settings: sizes, steps, solver.
    tokens: float[B, N, D], `decoder.LowresDecoder`'s.
    uncond: float[1, U, D] or float[U, D], the checkpoint's; U at most N.
    seeds: int[B]; an image depends on its own seed only.
    mask: bool[B, N], which tokens are seen; None for all.
    guidance: a plain 1 runs the conditional stream alone.
    noise: float[B, h, w, C] to start from, instead of the seeds' own.

  Returns:
    float32[B, h, w, C], still to be divided by the VAE's scaling factor.

  Raises:
    errors.UsageError: shapes do not fit each other, or steps the schedule.
  """
  if mask is None:
    mask = jnp.ones(tokens.shape[:2], bool)
  _check_batch({"tokens": tokens, "mask": mask}, seeds)
  tokens = tokens.astype(settings.dtype)
  rest, seen = pad_uncond(uncond, tokens)
  return _sample(
    denoise,
    schedule,
    settings,
    {"condition": tokens, "condition_mask": mask.astype(bool)},
    {"condition": rest, "condition_mask": seen},
    (seeds, guidance, noise),
  )


def pad_uncond(uncond: jax.Array, tokens: jax.Array):
  """The unconditional stream: zeros after its U tokens, which alone are seen.

  Args:
    uncond: float[1, U, D] or float[U, D].
    tokens: float[B, N, D], those of the conditional stream.

  Returns:
    [B, N, D] of the tokens' dtype, and bool[B, N].

  Raises:
    errors.UsageError: U > N, or another D.
  """
  uncond = uncond.reshape(-1, uncond.shape[-1])
  (used, width), (_, num, wanted) = uncond.shape, tokens.shape
  if used > num or width != wanted:
    raise errors.UsageError(
      f"The unconditional embeddings are {used} tokens of width {width}, but"
      f" a condition is {num} of width {wanted}: they need its width, and at"
      " most as many tokens. They belong to another decoder."
    )
  padded = jnp.pad(uncond.astype(tokens.dtype), ((0, num - used), (0, 0)))
  seen = jnp.broadcast_to(jnp.arange(num) < used, tokens.shape[:2])
  return jnp.broadcast_to(padded, tokens.shape), seen


def highres(
  denoise: Denoise,
  schedule: schedules.NoiseSchedule,
  settings: Settings,
  tokens: jax.Array,
  pooled: jax.Array,
  *,
  seeds: jax.Array,
  original_size: tuple[int, int] | None = None,
  crop: tuple[int, int] = (0, 0),
  guidance: float | jax.Array = HIGHRES_GUIDANCE,
  noise: jax.Array | None = None,
) -> jax.Array:
  """Latents by the U-Net of SDXL.

  Without a condition both tokens and pooled vector are zeros.

  Args:
    denoise: (z [B, h, w, C], t int[B], {"condition": [B, N, D], "pooled": [B,
      P], "sizes": float32[B, 6]}) -> its output; B counts both streams.
    schedule: of the checkpoint.
    settings: sizes, steps, solver.
    tokens: float[B, N, D], `decoder.HighresDecoder`'s first.
    pooled: float[B, P], its second.
    seeds: int[B]; an image depends on its own seed only.
    original_size: height and width to be told; None for the drawn ones.
    crop: top and left to be told.
    guidance: a plain 1 runs the conditional stream alone.
    noise: float[B, h, w, C] to start from, instead of the seeds' own.

  Returns:
    float32[B, h, w, C], still to be divided by the VAE's scaling factor.

  Raises:
    errors.UsageError: shapes do not fit each other, or steps the schedule.
  """
  _check_batch({"tokens": tokens, "pooled": pooled}, seeds)
  given = {
    "condition": tokens.astype(settings.dtype),
    "pooled": pooled.astype(settings.dtype),
  }
  nothing = jax.tree.map(jnp.zeros_like, given)
  numbers = sizes(settings, len(seeds), original_size, crop)
  return _sample(
    denoise,
    schedule,
    settings,
    given | {"sizes": numbers},
    nothing | {"sizes": numbers},
    (seeds, guidance, noise),
  )


def sizes(settings: Settings, count: int, original_size=None, crop=(0, 0)):
  """float32[count, 6]: original height and width, top and left, drawn ones."""
  target = (settings.height, settings.width)
  original = target if original_size is None else original_size
  row = [*original, *crop, *target]
  return jnp.broadcast_to(jnp.asarray(row, jnp.float32), (count, 6))


def _sample(denoise, schedule, settings, given, nothing, rest):
  seeds, guidance, noise = rest
  # A traced factor may be any number: then both streams run.
  alone = isinstance(guidance, int | float) and guidance == 1
  return sampling.sample(
    denoise,
    schedule,
    given,
    seeds=seeds,
    shape=settings.shape,
    steps=settings.steps,
    solver=settings.solver,
    uncondition=None if alone else nothing,
    guidance=guidance,
    noise=noise,
    dtype=jnp.dtype(settings.dtype),
    progress=settings.progress,
  )


def _check_batch(arrays, seeds):
  """UsageError unless all arrays have as many rows as there are seeds."""
  rows = {name: array.shape[0] for name, array in arrays.items()}
  if any(count != len(seeds) for count in rows.values()):
    listed = ", ".join(
      f"{count} rows of {name}" for name, count in rows.items()
    )
    raise errors.UsageError(
      f"{len(seeds)} seeds, but {listed}: give one of each an image."
    )
