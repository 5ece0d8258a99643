"""Sampling of images or latents by a network that removes noise.

One loop over the visited steps, with both streams of guidance in one batch.
`solvers` defines the steps, `schedules` the noise levels; `stable_diffusion`
adds the conditions of the official pixel decoders.
"""

import functools
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.diffusion import schedules, solvers

Progress = Callable[[int, int], None]  # takes (steps done, steps)


class Steps(typing.NamedTuple):
  """The visited steps as arrays: an argument of a program, not a part of it.

  A program that takes them visits any number of steps; one that takes a number
  is compiled for it.

  Attributes:
    visited: int32[T], the first `total` are visited.
    coefficients: float32[T] by name, see `plan` of the solver.
    total: int32[], number of visited steps.
  """

  visited: Any
  coefficients: dict[str, Any]
  total: Any


def planned(
  solver: solvers.Solver, schedule: schedules.NoiseSchedule, count: int
) -> Steps:
  """Returns the steps of a solver, padded to T steps of the schedule.

  Raises:
    errors.UsageError: count does not fit the schedule.
  """
  visited, coefficients = solver.plan(schedule, count)
  pad = lambda x: np.pad(x, (0, schedule.num_steps - count))
  padded = {name: pad(values) for name, values in coefficients.items()}
  return Steps(pad(visited), padded, np.int32(count))


def image_noise(
  seeds: jax.Array, step: int | jax.Array, shape: Sequence[int]
) -> jax.Array:
  """Draws float32[B, *shape], a pure function of each seed and the step.

  Args:
    seeds: int[B].
    step: number of the step, 0 for the noise to start from.
    shape: of one image.
  """

  def one(seed):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.normal(key, tuple(shape))

  return jax.vmap(one)(seeds)


def guided(
  denoise: Callable[..., jax.Array], guidance: float | jax.Array
) -> Callable[..., jax.Array]:
  """Returns a network with classifier-free guidance.

  Ho & Salimans, arXiv 2207.12598: output = u + guidance * (c - u), in float32.
  Both streams are one batch of 2 B.

  Args:
    denoise: see `sample`.
    guidance: factor of the difference between both streams.

  Returns:
    Maps (z [B, ...], t int[B], a tree of B conditions and B unconditional
    ones, concatenated) to float32[B, ...].
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
  steps: int | Steps,
  solver: solvers.Solver = solvers.Ddim(),
  uncondition: Any = None,
  guidance: float | jax.Array = 1.0,
  noise: jax.Array | None = None,
  dtype: Any = jnp.float32,
  progress: Progress | None = None,
) -> jax.Array:
  """Samples images, as one loop over the visited steps.

  Args:
    denoise: maps (z dtype[B, ...], t int[B], condition) to the network's
      output.
    schedule: that the network was trained with.
    condition: pytree of arrays [B, ...].
    seeds: int[B]; an image depends on its own seed only.
    shape: of one image.
    steps: number of visited steps (static), or what `planned` returns, for a
      program that does any number.
    solver: DDIM or DPM-Solver++ (static).
    uncondition: tree like condition for the unconditional stream; None runs
      the conditional stream only.
    guidance: factor of classifier-free guidance, used with uncondition.
    noise: float[B, *shape] to start from, instead of noise from the seeds.
    dtype: of the network's z. The solver computes in float32: late in
      sampling, bfloat16 cannot represent the little noise that is left.
    progress: called on the host with (steps done, steps) after each step.

  Returns:
    float32[B, *shape].

  Raises:
    errors.UsageError: steps do not fit the schedule, or noise the shape.
  """
  if isinstance(steps, int):
    plan = Steps(*solver.plan(schedule, steps), steps)
  else:
    plan = steps
  if uncondition is not None:
    condition = jax.tree.map(
      lambda c, u: jnp.concatenate([c, u]), condition, uncondition
    )
    denoise = guided(denoise, guidance)
  z = _start(seeds, shape, noise)

  def step(carry, xs):
    z, previous = carry
    t, index, coefficients = xs  # the first step has the index 1
    output = denoise(z.astype(dtype), jnp.full(z.shape[:1], t), condition)
    extra = image_noise(seeds, index, shape) if solver.eta else None
    output = output.astype(jnp.float32)
    z, image = solver.step(schedule, output, z, previous, coefficients, extra)
    if progress is not None:
      _report(progress, index, plan.total, z)
    return (z, image), None

  start = (z, jnp.zeros_like(z))
  index = np.arange(1, len(plan.visited) + 1, dtype=np.int32)
  xs = (plan.visited, index, plan.coefficients)
  if isinstance(steps, int):
    (z, _), _ = jax.lax.scan(step, start, xs)
  else:
    at = lambda i: jax.tree.map(lambda x: jnp.asarray(x)[i], xs)
    body = lambda i, carry: step(carry, at(i))[0]
    z, _ = jax.lax.fori_loop(0, plan.total, body, start)
  return z


def _start(seeds, shape, noise):
  """Returns the noise to start from, float32[B, *shape]."""
  if noise is None:
    return image_noise(seeds, 0, shape)
  if noise.shape != (expected := (len(seeds), *shape)):
    raise errors.UsageError(
      f"The noise to start from has shape {noise.shape}, but {len(seeds)} seeds"
      f" and images of shape {tuple(shape)} need {expected}."
    )
  return jnp.asarray(noise, jnp.float32)


def _report(progress, index, total, z):
  """Calls progress(index, total) once z is computed."""
  jax.debug.callback(
    lambda index, total, _: progress(int(index), int(total)),
    index,
    total,
    z.ravel()[0],
  )


@functools.partial(
  jax.jit,
  static_argnames=("decoder", "schedule", "solver", "guide", "progress"),
)
def draw(
  decoder: Any,
  schedule: schedules.NoiseSchedule,
  variables: Any,
  x_rec: jax.Array,
  seeds: jax.Array,
  *,
  steps: Steps,
  solver: solvers.Solver = solvers.Ddim(),
  guide: bool = False,
  guidance: float | jax.Array = 1.0,
  progress: Progress | None = None,
) -> jax.Array:
  """Samples images from reconstructed features in pixel space.

  Args:
    decoder: a `pixel_decoder.PixelDecoder` (static).
    schedule: that it was trained with (static).
    variables: its variables, `{"params": ...}`.
    x_rec: float[B, N, D].
    seeds: int[B].
    steps: see `planned`; others need no compilation.
    solver: see `solvers.py` (static).
    guide: run the unconditional stream, too (static; twice the work).
    guidance: factor of the guidance; another one needs no compilation.
    progress: see `sample` (static).

  Returns:
    float32[B, H, W, 3] in [0, 1].
  """
  size = decoder.config.image_size
  conditioned = jnp.zeros(x_rec.shape[0], bool)

  def denoise(z, t, condition):
    x_rec, drop = condition
    return decoder.apply(variables, z, t, x_rec, drop=drop)

  images = sample(
    denoise,
    schedule,
    (x_rec, conditioned),
    seeds=seeds,
    shape=(size, size, 3),
    steps=steps,
    solver=solver,
    uncondition=(x_rec, ~conditioned) if guide else None,
    guidance=guidance,
    progress=progress,
  )
  return jnp.clip(images / 2 + 0.5, 0.0, 1.0)
