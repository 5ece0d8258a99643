"""Sampling: images, or latents, drawn by a network that predicts noise.

One `lax.scan` over the visited steps, both streams of guidance in one batch.
What a step computes is a solver's (`solvers`), from the levels of a schedule
(`schedules`); `latents` has the conditions of the official pixel decoders.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.diffusion import schedules, solvers


def image_noise(seeds: jax.Array, step: int | jax.Array, shape):
  """float32[B, *shape]: a pure function of each int[B] seed and the step."""

  def one(seed):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.normal(key, shape)

  return jax.vmap(one)(seeds)


def guided(denoise: Callable[..., jax.Array], guidance):
  """Joins both streams: `denoise` gets conditions and unconditions in a row.

  Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) in one batch of
  2 B: output = u + guidance * (c - u), in float32.
  """

  def joined(z, t, pair):
    both = denoise(jnp.concatenate([z, z]), jnp.concatenate([t, t]), pair)
    cond, uncond = jnp.split(both.astype(jnp.float32), 2)
    return uncond + guidance * (cond - uncond)

  return joined


def sample(
  denoise: Callable[[jax.Array, jax.Array, Any], jax.Array],
  schedule: schedules.NoiseSchedule,
  condition: Any,
  *,
  seeds: jax.Array,
  shape: tuple[int, ...],
  steps: int,
  solver: solvers.Solver = solvers.Ddim(),
  uncondition: Any = None,
  guidance: float | jax.Array = 1.0,
  noise: jax.Array | None = None,
  dtype: jnp.dtype = jnp.float32,
  progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
  """Draws images, as one `lax.scan` over the visited steps.

  Args:
    denoise: (z dtype[B, ...], t int[B], condition) -> the network's output.
    schedule: what the network was trained with.
    condition: pytree of arrays [B, ...].
    seeds: int[B]; an image depends on its own seed only.
    shape: of one image.
    steps: number of visited steps (static).
    solver: DDIM or DPM-Solver++ (static).
    uncondition: tree like condition; None runs the conditional stream alone.
    guidance: factor of classifier-free guidance, used with uncondition.
    noise: float[B, *shape] to start from, instead of the seeds' own.
    dtype: in which `denoise` is given z. Here all is float32: what is left of
      the noise late in a sampling is less than bfloat16 can tell.
    progress: called on the host with (steps done, steps) after each step.

  Returns:
    float32[B, *shape].

  Raises:
    errors.UsageError: steps do not fit the schedule, or noise the shape.
  """
  visited, numbers = solver.plan(schedule, steps)
  if uncondition is not None:
    condition = jax.tree.map(
      lambda c, u: jnp.concatenate([c, u]), condition, uncondition
    )
    denoise = guided(denoise, guidance)
  z = _start(seeds, shape, noise)

  def step(carry, now):
    z, previous = carry
    t, index, now = now
    output = denoise(z.astype(dtype), jnp.full(z.shape[:1], t), condition)
    extra = image_noise(seeds, index, shape) if solver.eta else None
    output = output.astype(jnp.float32)
    z, image = solver.step(schedule, output, z, previous, now, extra)
    if progress is not None:
      _tell(progress, index, steps, z)
    return (z, image), None

  index = np.arange(1, steps + 1, dtype=np.int32)
  scanned = (visited, index, numbers)
  (z, _), _ = jax.lax.scan(step, (z, jnp.zeros_like(z)), scanned)
  return z


def _start(seeds, shape, noise):
  """float32[B, *shape], the noise to start from."""
  if noise is None:
    return image_noise(seeds, 0, shape)
  if noise.shape != (wanted := (len(seeds), *shape)):
    raise errors.UsageError(
      f"The noise to start from has shape {noise.shape}, but {len(seeds)} seeds"
      f" and images of {tuple(shape)} need {wanted}."
    )
  return jnp.asarray(noise, jnp.float32)


def _tell(progress, index, steps, z):
  """Calls progress(index, steps) once z is there."""
  jax.debug.callback(
    lambda index, _: progress(int(index), steps), index, z.ravel()[0]
  )


@functools.partial(
  jax.jit,
  static_argnames=(
    "decoder",
    "schedule",
    "steps",
    "solver",
    "guide",
    "progress",
  ),
)
def draw(
  decoder,
  schedule: schedules.NoiseSchedule,
  variables,
  x_rec: jax.Array,
  seeds: jax.Array,
  *,
  steps: int = 20,
  solver: solvers.Solver = solvers.Ddim(),
  guide: bool = False,
  guidance: float | jax.Array = 1.0,
  progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
  """Images from reconstructed features.

  Args:
    decoder: a `pixels.PixelDecoder` (static).
    schedule: what it was trained with (static).
    variables: its variables, `{"params": ...}`.
    x_rec: float[B, N, D].
    seeds: int[B].
    steps: that the solver visits (static).
    solver: see `solvers.py` (static).
    guide: run the unconditional stream too (static; twice the work).
    guidance: its factor; a change of it compiles nothing.
    progress: as of `sample` (static).

  Returns:
    float32[B, H, W, 3] in [0, 1].
  """
  size = decoder.config.image_size
  given = jnp.zeros(x_rec.shape[0], bool)

  def denoise(z, t, condition):
    x_rec, drop = condition
    return decoder.apply(variables, z, t, x_rec, drop=drop)

  images = sample(
    denoise,
    schedule,
    (x_rec, given),
    seeds=seeds,
    shape=(size, size, 3),
    steps=steps,
    solver=solver,
    uncondition=(x_rec, ~given) if guide else None,
    guidance=guidance,
    progress=progress,
  )
  return jnp.clip(images / 2 + 0.5, 0.0, 1.0)
