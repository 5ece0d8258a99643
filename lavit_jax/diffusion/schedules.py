"""Noise schedules of diffusion, and conversions between its predictions.

With a_t the cumulative product of 1 - beta, z_t = sqrt(a_t) x + sqrt(1 - a_t)
eps. Fields have the meaning that they have in diffusers' scheduler files; the
tests compare them with recordings of the official sampler.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors

KINDS = ("linear", "scaled_linear", "cosine", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "velocity", "sample")
_MAX_BETA = 0.999  # of "squaredcos_cap_v2"
Array = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
  """A noise schedule and how it is sampled.

  Attributes:
    num_steps: T, the steps of training.
    kind: of the betas; "cosine" is Nichol & Dhariwal's (arXiv 2102.09672),
      "squaredcos_cap_v2" diffusers' form of it, with betas up to 0.999.
    beta_start: first beta of the linear kinds.
    beta_end: last beta of the linear kinds.
    spacing: which steps are visited in sampling; only "trailing" and
      "linspace" begin at the last step, which is pure noise or nearly so.
    steps_offset: added to the steps of the "leading" spacing.
    alpha_to_one: whether the last sampling step ends at a = 1, not at a_0.
    prediction: meaning of the network's output; see `to_eps`.
    clip: bound on the predicted image at every step, None for none. A pair
      (quantile, largest) is dynamic thresholding (arXiv 2205.11487); see
      `bound`.
    shift: added to log(a / (1 - a)) of the cosine kind; negative = noisier.
    betas: T of them, instead of a kind.
    zero_snr: rescale so that the last step is pure noise (Lin et al., arXiv
      2305.08891).
  """

  num_steps: int = 1000
  kind: str = "scaled_linear"
  beta_start: float = 0.00085
  beta_end: float = 0.012
  spacing: str = "leading"
  steps_offset: int = 1
  alpha_to_one: bool = False
  prediction: str = "epsilon"
  clip: float | tuple[float, float] | None = None
  shift: float = 0.0
  betas: tuple[float, ...] | None = None
  zero_snr: bool = False

  def __post_init__(self):
    for name in ("clip", "betas"):  # JSON and configs give lists
      if isinstance(value := getattr(self, name), list):
        object.__setattr__(self, name, tuple(value))
    allowed = {"kind": KINDS, "spacing": SPACINGS, "prediction": PREDICTIONS}
    for name, values in allowed.items():
      if getattr(self, name) not in values:
        raise errors.ConfigError(
          f"{name}={getattr(self, name)!r} is unknown: it must be one of"
          f" {', '.join(values)}. Change schedule.{name}."
        )
    self._check_numbers()

  def _check_numbers(self):
    ends = (self.beta_start, self.beta_end)
    betas = ends if self.betas is None else self.betas
    bounds = self.clip if isinstance(self.clip, tuple) else (1.0, self.clip)
    in_range = {
      "num_steps": self.num_steps >= 1,
      "steps_offset": self.steps_offset >= 0,
      "betas": all(0 <= beta < 1 for beta in betas),
      "clip": self.clip is None
      or (len(bounds) == 2 and 0 < bounds[0] <= 1 and bounds[1] > 0),
    }
    for name, good in in_range.items():
      if not good:
        raise errors.ConfigError(
          f"schedule.{name} is out of range in {self}: num_steps must be at"
          " least 1, steps_offset at least 0, betas in [0, 1), and clip a"
          " positive number or a pair of a quantile in (0, 1] and a positive"
          " number."
        )
    if self.betas is not None and len(self.betas) != self.num_steps:
      raise errors.ConfigError(
        f"The schedule has {len(self.betas)} betas for {self.num_steps} steps:"
        " give one beta per step. Change schedule.betas or schedule.num_steps."
      )


STABLE_DIFFUSION = NoiseSchedule()
PIXELS = NoiseSchedule(
  kind="cosine",
  spacing="trailing",
  steps_offset=0,
  alpha_to_one=True,
  prediction="sample",
  clip=1.0,
)


def alphas_cumprod(schedule: NoiseSchedule) -> np.ndarray:
  """Returns a_t float32[T], which falls from nearly 1 to nearly 0."""
  table = _alphas(schedule)
  if schedule.zero_snr:
    root = np.sqrt(table)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    table = root**2
  return table.astype(np.float32)


def _alphas(schedule):
  """Returns a_t float64[T] before any rescaling."""
  steps = schedule.num_steps
  start, end = schedule.beta_start, schedule.beta_end
  if schedule.betas is not None:
    betas = np.asarray(schedule.betas, np.float64)
  elif schedule.kind == "cosine":
    time = np.arange(1, steps + 1) / (steps + 0.5)
    level = np.clip(_squared_cosine(time), 1e-6, 1 - 1e-6)
    odds = level / (1 - level) * np.exp(schedule.shift)
    return odds / (1 + odds)
  elif schedule.kind == "squaredcos_cap_v2":
    level = _squared_cosine(np.arange(steps + 1) / steps)
    betas = np.minimum(1 - level[1:] / level[:-1], _MAX_BETA)
  elif schedule.kind == "linear":
    betas = np.linspace(start, end, steps)
  else:
    betas = np.linspace(start**0.5, end**0.5, steps) ** 2
  return np.cumprod(1 - betas)


def _squared_cosine(time):
  return np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2


def timesteps(schedule: NoiseSchedule, count: int) -> np.ndarray:
  """Returns the visited steps int32[count] from noisy to clean.

  `timesteps(STABLE_DIFFUSION, 5)` is [801, 601, 401, 201, 1].

  Raises:
    errors.UsageError: count is not in 1 ... num_steps.
  """
  total = schedule.num_steps
  check_count(schedule, count)
  steps: np.ndarray
  if schedule.spacing == "leading":
    steps = np.arange(count)[::-1] * (total // count) + schedule.steps_offset
  elif schedule.spacing == "trailing":
    # By rounding, arange may have one step more, down to 0.
    steps = np.round(np.arange(total, 0, -total / count)[:count]) - 1
  else:
    steps = np.linspace(0, total - 1, count).round()[::-1]
  return np.clip(steps, 0, total - 1).astype(np.int32)


def check_count(schedule: NoiseSchedule, count: int) -> None:
  """Raises errors.UsageError unless count is in 1 ... num_steps."""
  if not 1 <= count <= schedule.num_steps:
    raise errors.UsageError(
      f"{count} sampling steps, but the schedule has {schedule.num_steps}: give"
      f" a number from 1 to {schedule.num_steps}."
    )


def _broadcast(a: jax.Array, like: jax.Array) -> jax.Array:
  """Maps float[B] to float[B, 1, ...]; leaves a scalar as it is."""
  return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def add_noise(
  schedule: NoiseSchedule, x: jax.Array, noise: jax.Array, t: jax.Array
) -> jax.Array:
  """Returns z_t for images x and noise float[B, ...] and steps int[B]."""
  a = _broadcast(jnp.asarray(alphas_cumprod(schedule))[t], x)
  return jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise


def to_eps(
  schedule: NoiseSchedule, output: jax.Array, z: jax.Array, a: Array
) -> jax.Array:
  """Converts the network's output to the predicted noise.

  With prediction "epsilon" the output is the noise.

  With "velocity" (Salimans & Ho, arXiv 2202.00512) eps = sqrt(a) output +
  sqrt(1 - a) z. A network with output 0 already copies the noise from a noisy
  image, and the predicted image is bounded even for pure noise.

  With "sample" the output is the image, and eps = (z - sqrt(a) output) /
  sqrt(1 - a): a small network on large patches need not pass noise through (Li
  & He, arXiv 2511.13720).

  Args:
    schedule: tells the prediction.
    output: float[B, ...].
    z: float[B, ...], the noisy image, input of the network.
    a: float[B] or float[], its a_t.
  """
  if schedule.prediction == "epsilon":
    return output
  a = _broadcast(jnp.asarray(a), z)
  if schedule.prediction == "sample":
    return (z - jnp.sqrt(a) * output) / jnp.sqrt(1 - a)
  return jnp.sqrt(a) * output + jnp.sqrt(1 - a) * z


def to_image(
  schedule: NoiseSchedule, output: jax.Array, z: jax.Array, a: Array
) -> jax.Array:
  """Converts the network's output to the predicted image; see `to_eps`."""
  a = _broadcast(jnp.asarray(a), z)
  if schedule.prediction == "epsilon":
    return (z - jnp.sqrt(1 - a) * output) / jnp.sqrt(a)
  if schedule.prediction == "sample":
    return output
  return jnp.sqrt(a) * z - jnp.sqrt(1 - a) * output


def bound(schedule: NoiseSchedule, image: jax.Array) -> jax.Array:
  """Clips predicted images float[B, ...] to the schedule's `clip`.

  A pair (quantile, largest) clips each image at that quantile of its absolute
  values, itself clipped to 1 ... largest, and divides by it.
  """
  if schedule.clip is None:
    return image
  if not isinstance(schedule.clip, tuple):
    return jnp.clip(image, -schedule.clip, schedule.clip)
  quantile, largest = schedule.clip
  flat = jnp.abs(image.reshape(image.shape[0], -1))
  limit = jnp.clip(jnp.quantile(flat, quantile, axis=1), 1.0, largest)
  limit = _broadcast(limit, image)
  return jnp.clip(image, -limit, limit) / limit


def eps_error(
  schedule: NoiseSchedule,
  output: jax.Array,
  x: jax.Array,
  noise: jax.Array,
  a: jax.Array,
) -> jax.Array:
  """Returns the mean squared error of the predicted noise, float32[B].

  It equals that of `to_eps`, without its cancellation: for "velocity" it is
  a * || output - (sqrt(a) noise - sqrt(1 - a) x) ||^2, for "sample"
  a / (1 - a) * || output - x ||^2.

  Args:
    schedule: tells the prediction.
    output: float[B, ...], the network's for `add_noise(x, noise)`.
    x: float[B, ...], clean images.
    noise: float[B, ...].
    a: float[B], alphas_cumprod of their steps.
  """
  axes = tuple(range(1, x.ndim))
  if schedule.prediction == "epsilon":
    return jnp.square(output - noise).mean(axes)
  if schedule.prediction == "sample":
    return a / (1 - a) * jnp.square(output - x).mean(axes)
  wide = _broadcast(a, x)
  velocity = jnp.sqrt(wide) * noise - jnp.sqrt(1 - wide) * x
  return a * jnp.square(output - velocity).mean(axes)
