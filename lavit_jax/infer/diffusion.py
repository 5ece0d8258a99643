"""Diffusion schedules and DDIM sampling (Song et al., arXiv 2010.02502).

With a_t the cumulative product of 1 - beta, z_t = sqrt(a_t) x + sqrt(1 - a_t)
eps. Settings carry the meaning they have in diffusers' scheduler files; the
goldens of the official sampler hold the numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax import errors

KINDS = ("linear", "scaled_linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "velocity", "sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """A noise schedule and how it is sampled.

  Attributes:
    num_steps: T, the steps of training.
    kind: of the betas; "cosine" is Nichol & Dhariwal's (arXiv 2102.09672).
    beta_start: first beta of the linear kinds.
    beta_end: last beta of the linear kinds.
    spacing: which steps a short sampling visits; only "trailing" and
      "linspace" begin at the last one, where nothing is left of the picture.
    steps_offset: added to the steps of the "leading" spacing.
    alpha_to_one: the last sampling step ends at a = 1, not at a_0.
    prediction: what the network's output stands for; see `to_eps`.
    clip: bound on the predicted picture at every step, None for none.
    shift: added to log(a / (1 - a)) of the cosine kind; negative = noisier.
  """

  num_steps: int = 1000
  kind: str = "scaled_linear"
  beta_start: float = 0.00085
  beta_end: float = 0.012
  spacing: str = "leading"
  steps_offset: int = 1
  alpha_to_one: bool = False
  prediction: str = "epsilon"
  clip: float | None = None
  shift: float = 0.0

  def __post_init__(self):
    allowed = {"kind": KINDS, "spacing": SPACINGS, "prediction": PREDICTIONS}
    for name, values in allowed.items():
      if getattr(self, name) not in values:
        raise errors.ConfigError(
          f"{name}={getattr(self, name)!r} is not known: it must be one of"
          f" {', '.join(values)}. Change schedule.{name}."
        )


STABLE_DIFFUSION = Schedule()
PIXELS = Schedule(
  kind="cosine",
  spacing="trailing",
  steps_offset=0,
  alpha_to_one=True,
  prediction="sample",
  clip=1.0,
)


def alphas_cumprod(schedule: Schedule) -> np.ndarray:
  """float32[T], a_t: falls from nearly 1 to nearly 0."""
  steps = schedule.num_steps
  if schedule.kind == "cosine":
    time = np.arange(1, steps + 1) / (steps + 0.5)
    level = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    level = np.clip(level, 1e-6, 1 - 1e-6)
    odds = level / (1 - level) * np.exp(schedule.shift)
    return (odds / (1 + odds)).astype(np.float32)
  start, end = schedule.beta_start, schedule.beta_end
  if schedule.kind == "linear":
    betas = np.linspace(start, end, steps)
  else:
    betas = np.linspace(start**0.5, end**0.5, steps) ** 2
  return np.cumprod(1 - betas).astype(np.float32)


def timesteps(schedule: Schedule, count: int) -> np.ndarray:
  """int32[count], the visited steps from noisy to clean.

  `timesteps(STABLE_DIFFUSION, 5)` is [801, 601, 401, 201, 1].

  Raises:
    errors.UsageError: count is not within 1 .. num_steps.
  """
  total = schedule.num_steps
  if not 1 <= count <= total:
    raise errors.UsageError(
      f"{count} sampling steps asked for, but the schedule has {total}: give a"
      f" number from 1 to {total}."
    )
  if schedule.spacing == "leading":
    steps = np.arange(count)[::-1] * (total // count) + schedule.steps_offset
  elif schedule.spacing == "trailing":
    steps = np.round(np.arange(total, 0, -total / count)) - 1
  else:
    steps = np.linspace(0, total - 1, count).round()[::-1]
  return np.clip(steps, 0, total - 1).astype(np.int32)


def levels(schedule, steps):
  """float32[S] and float32[S]: a at the visited steps and one stride on."""
  table = alphas_cumprod(schedule)
  last = np.float32(1.0) if schedule.alpha_to_one else table[0]
  if schedule.spacing == "leading":
    stride = schedule.num_steps // len(steps)
    before = steps - stride
    after = np.where(before >= 0, table[np.maximum(before, 0)], last)
  else:
    after = np.append(table[steps[1:]], last)
  return table[steps], after.astype(np.float32)


def _over(level: jax.Array, like: jax.Array) -> jax.Array:
  """float[B] as float[B, 1, ...], or a scalar as it is."""
  return level.reshape(level.shape + (1,) * (like.ndim - level.ndim))


def add_noise(schedule: Schedule, x, noise, t):
  """z_t of float[B, ...] pictures, float[B, ...] noise and int[B] steps."""
  a = _over(jnp.asarray(alphas_cumprod(schedule))[t], x)
  return jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise


def to_eps(schedule: Schedule, output, z, a):
  """The predicted noise, whatever the network's output stands for.

  With prediction "epsilon" it is the output itself. With "velocity" (Salimans
  & Ho, arXiv 2202.00512) eps = sqrt(a) output + sqrt(1 - a) z: a network that
  gives 0 already copies the noise out of a noisy picture, and the predicted
  picture stays bounded where nothing is left of it. With "sample" the output
  is the picture, and eps = (z - sqrt(a) output) / sqrt(1 - a): a small network
  on large patches then never has to carry noise through (Li & He, arXiv
  2511.13720).

  Args:
    schedule: says which prediction.
    output: float[B, ...].
    z: float[B, ...], the noisy picture the output was computed from.
    a: float[B] or float[], its a_t.
  """
  if schedule.prediction == "epsilon":
    return output
  a = _over(jnp.asarray(a), z)
  if schedule.prediction == "sample":
    return (z - jnp.sqrt(a) * output) / jnp.sqrt(1 - a)
  return jnp.sqrt(a) * output + jnp.sqrt(1 - a) * z


def to_picture(schedule: Schedule, output, z, a):
  """The predicted clean picture; the arguments are those of `to_eps`."""
  a = _over(jnp.asarray(a), z)
  if schedule.prediction == "epsilon":
    return (z - jnp.sqrt(1 - a) * output) / jnp.sqrt(a)
  if schedule.prediction == "sample":
    return output
  return jnp.sqrt(a) * z - jnp.sqrt(1 - a) * output


def eps_error(schedule: Schedule, output, x, noise, a):
  """Mean squared error of the predicted noise, float32[B].

  Equal to that of `to_eps`, without its cancellation: for "velocity" it is
  a * || output - (sqrt(a) noise - sqrt(1 - a) x) ||^2, for "sample"
  a / (1 - a) * || output - x ||^2.

  Args:
    schedule: says which prediction.
    output: float[B, ...], the network's for `add_noise(x, noise)`.
    x: float[B, ...], clean pictures.
    noise: float[B, ...].
    a: float[B], alphas_cumprod of their steps.
  """
  axes = tuple(range(1, x.ndim))
  if schedule.prediction == "epsilon":
    return jnp.square(output - noise).mean(axes)
  if schedule.prediction == "sample":
    return a / (1 - a) * jnp.square(output - x).mean(axes)
  wide = _over(a, x)
  velocity = jnp.sqrt(wide) * noise - jnp.sqrt(1 - wide) * x
  return a * jnp.square(output - velocity).mean(axes)


def ddim_step(schedule, output, z, a, a_next, *, eta=0.0, noise=None):
  """One step from level a to the cleaner level a_next.

  Args:
    schedule: its prediction and clip are used.
    output: float[B, ...], the network's.
    z: float[B, ...].
    a: float[], cumulative alpha of z.
    a_next: float[], that of the result.
    eta: share of DDPM's noise, 0 for none (the paper's equation 12).
    noise: float[B, ...], needed where eta > 0.

  Returns:
    The next z and the predicted clean picture.
  """
  picture = to_picture(schedule, output, z, a)
  eps = to_eps(schedule, output, z, a)
  if schedule.clip is not None:
    picture = jnp.clip(picture, -schedule.clip, schedule.clip)
    eps = (z - jnp.sqrt(a) * picture) / jnp.sqrt(1 - a)
  spread = eta * jnp.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
  towards = jnp.sqrt(jnp.maximum(1 - a_next - spread**2, 0.0)) * eps
  z = jnp.sqrt(a_next) * picture + towards
  return (z if noise is None else z + spread * noise), picture


def picture_noise(seeds: jax.Array, step: int | jax.Array, shape):
  """float32[B, *shape]: a pure function of each int[B] seed and the step."""

  def one(seed):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.normal(key, shape)

  return jax.vmap(one)(seeds)


def guided(denoise: Callable[..., jax.Array], guidance):
  """Joins both streams: `denoise` gets conditions and unconditions in a row.

  Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) in one batch of
  2 B: output = u + guidance * (c - u).
  """

  def joined(z, t, pair):
    both = denoise(jnp.concatenate([z, z]), jnp.concatenate([t, t]), pair)
    cond, uncond = jnp.split(both, 2)
    return uncond + guidance * (cond - uncond)

  return joined


def sample(
  denoise: Callable[[jax.Array, jax.Array, Any], jax.Array],
  schedule: Schedule,
  condition: Any,
  *,
  seeds: jax.Array,
  shape: tuple[int, ...],
  steps: int,
  eta: float = 0.0,
  uncondition: Any = None,
  guidance: float | jax.Array = 1.0,
  noise: jax.Array | None = None,
) -> jax.Array:
  """Draws pictures by DDIM, as one `lax.scan` over the visited steps.

  Args:
    denoise: (z float[B, ...], t int[B], condition) -> the network's output.
    schedule: what the network was trained with.
    condition: pytree of arrays [B, ...].
    seeds: int[B]; a picture depends on its own seed only.
    shape: of one picture.
    steps: number of visited steps (static).
    eta: 0 is deterministic, 1 is DDPM's noise (static).
    uncondition: tree like condition; None runs the conditional stream alone.
    guidance: factor of classifier-free guidance, used with uncondition.
    noise: float[B, *shape] to start from, instead of the seeds' own.

  Returns:
    float32[B, *shape].
  """
  visited = timesteps(schedule, steps)
  visited_levels = levels(schedule, visited)
  if uncondition is not None:
    condition = jax.tree.map(
      lambda c, u: jnp.concatenate([c, u]), condition, uncondition
    )
    denoise = guided(denoise, guidance)
  z = picture_noise(seeds, 0, shape) if noise is None else noise

  def step(z, now):
    t, a, a_next, index = now
    output = denoise(z, jnp.full(z.shape[:1], t), condition)
    extra = picture_noise(seeds, index, shape) if eta else None
    z, _ = ddim_step(schedule, output, z, a, a_next, eta=eta, noise=extra)
    return z, None

  index = np.arange(1, steps + 1, dtype=np.int32)
  z, _ = jax.lax.scan(step, z, (visited, *visited_levels, index))
  return z


@functools.partial(
  jax.jit, static_argnames=("decoder", "schedule", "steps", "eta", "guide")
)
def draw(
  decoder,
  schedule: Schedule,
  variables,
  x_rec: jax.Array,
  seeds: jax.Array,
  *,
  steps: int = 20,
  eta: float = 0.0,
  guide: bool = False,
  guidance: float | jax.Array = 1.0,
) -> jax.Array:
  """Pictures from reconstructed features.

  Args:
    decoder: a `pixels.PixelDecoder` (static).
    schedule: what it was trained with (static).
    variables: its variables, `{"params": ...}`.
    x_rec: float[B, N, D].
    seeds: int[B].
    steps: of DDIM (static).
    eta: see `sample` (static).
    guide: run the unconditional stream too (static; twice the work).
    guidance: its factor; a change of it compiles nothing.

  Returns:
    float32[B, H, W, 3] in [0, 1].
  """
  size = decoder.config.image_size
  given = jnp.zeros(x_rec.shape[0], bool)

  def denoise(z, t, condition):
    x_rec, drop = condition
    return decoder.apply(variables, z, t, x_rec, drop=drop)

  pictures = sample(
    denoise,
    schedule,
    (x_rec, given),
    seeds=seeds,
    shape=(size, size, 3),
    steps=steps,
    eta=eta,
    uncondition=(x_rec, ~given) if guide else None,
    guidance=guidance,
  )
  return jnp.clip(pictures / 2 + 0.5, 0.0, 1.0)
