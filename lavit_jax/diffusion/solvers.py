"""Solvers for sampling: from noise to an image in few steps.

A solver is a frozen, hashable dataclass, so that it can be a static argument.
`plan` returns the visited steps and their coefficients, computed once in
NumPy; `step` computes one of them.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.diffusion import schedules

Plan = tuple[np.ndarray, dict[str, np.ndarray]]  # int32[S], and float32[S]

_FEW_STEPS = 15  # fewer steps end with one of first order (DPM-Solver++)
_MIN_ALPHA = 2.0**-24  # a_T of diffusers' DPM solver where it would be 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ddim:
  """DDIM (Song et al., arXiv 2010.02502).

  Attributes:
    eta: share of DDPM's noise, 0 for none (the paper's equation 12).
    official: step as diffusers does, for parity: each step leads T // count
      steps down, whichever is visited next, and the predicted noise is not
      changed where `clip` bounds the image.
  """

  eta: float = 0.0
  official: bool = False

  def plan(self, schedule: schedules.NoiseSchedule, count: int) -> Plan:
    """Returns the visited steps and the noise levels between them.

    Args:
      schedule: of the network.
      count: S, number of steps.

    Returns:
      Steps int32[S], and float32[S] by name: `a`, the cumulative alphas, and
      `a_next`, those of the next step.

    Raises:
      errors.UsageError: count does not fit the schedule.
    """
    steps = schedules.timesteps(schedule, count)
    table = schedules.alphas_cumprod(schedule)
    last = np.float32(1.0) if schedule.alpha_to_one else table[0]
    if self.official or schedule.spacing == "leading":
      before = steps - schedule.num_steps // count
      after = np.where(before >= 0, table[np.maximum(before, 0)], last)
    else:
      after = np.append(table[steps[1:]], last)
    a = table[steps]
    if schedule.prediction == "epsilon" and not a.all():
      raise errors.UsageError(
        "This schedule begins at pure noise (zero_snr), from which predicted"
        " noise gives no image: it needs prediction 'velocity' or 'sample', or"
        " the spacing 'leading', which does not visit that step."
      )
    return steps, {"a": a, "a_next": after.astype(np.float32)}

  def step(
    self,
    schedule: schedules.NoiseSchedule,
    output: jax.Array,
    z: jax.Array,
    previous: jax.Array,
    coefficients: Mapping[str, jax.Array],
    noise: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Computes one step.

    Args:
      schedule: its prediction and clip are used.
      output: float[B, ...], the network's.
      z: float[B, ...].
      previous: float[B, ...], the image predicted one step before; unused.
      coefficients: float[] by name, those of `plan` for this step.
      noise: float[B, ...], required if eta > 0.

    Returns:
      The next z and the predicted clean image.
    """
    del previous
    a, a_next = coefficients["a"], coefficients["a_next"]
    image = schedules.to_image(schedule, output, z, a)
    eps = schedules.to_eps(schedule, output, z, a)
    if schedule.clip is not None:
      image = schedules.bound(schedule, image)
      if not self.official:
        eps = (z - jnp.sqrt(a) * image) / jnp.sqrt(1 - a)
    sigma = self.eta * jnp.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    direction = jnp.sqrt(jnp.maximum(1 - a_next - sigma**2, 0.0)) * eps
    z = jnp.sqrt(a_next) * image + direction
    return (z if noise is None else z + sigma * noise), image


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpmSolver:
  """DPM-Solver++ (2M), deterministic (Lu et al., arXiv 2211.01095).

  The midpoint form with diffusers' conventions: in "leading" and "linspace"
  spacing the visited steps are those of count + 1 without the cleanest.

  Attributes:
    to_zero: whether the last step ends without noise, not at that of step 0.
    lower_order_final: whether with fewer than 15 steps the last one is of
      first order even if it does not end without noise.
    official: ignore a number as `clip`, as diffusers does, whose solver
      supports only dynamic thresholding.
    spacing: replaces the schedule's. Where a scheduler's file has none,
      diffusers' DDIM uses "leading" and its DPM solver "linspace".
  """

  to_zero: bool = True
  lower_order_final: bool = True
  official: bool = False
  spacing: str | None = None
  eta = 0.0  # no field: this solver adds no noise

  def plan(self, schedule: schedules.NoiseSchedule, count: int) -> Plan:
    """Returns the visited steps and their coefficients.

    Args:
      schedule: of the network.
      count: S, number of steps.

    Returns:
      Steps int32[S], and float32[S] by name: `a`, the cumulative alphas, and
      `keep`, `new`, `old` of z' = keep z + new x - old x_previous.

    Raises:
      errors.UsageError: count does not fit the schedule.
    """
    if self.spacing is not None:
      schedule = dataclasses.replace(schedule, spacing=self.spacing)
    steps = _dpm_timesteps(schedule, count)
    table = schedules.alphas_cumprod(schedule).astype(np.float64)
    if schedule.zero_snr:
      table[-1] = _MIN_ALPHA
    a = table[steps]
    ends = np.append(a, 1.0 if self.to_zero else table[0])
    alpha, sigma = np.sqrt(ends), np.sqrt(1 - ends)
    with np.errstate(divide="ignore"):  # without noise it is at infinity
      h = np.diff(np.log(alpha) - np.log(sigma))
    gain = -alpha[1:] * np.expm1(-h)
    # The second order's share; the first step has no previous image.
    second_order = np.zeros(count)
    second_order[1:] = h[1:] / h[:-1] / 2
    if self.to_zero or (self.lower_order_final and count < _FEW_STEPS):
      second_order[-1] = 0.0
    coefficients = {
      "a": a,
      "keep": sigma[1:] / sigma[:-1],
      "new": gain * (1 + second_order),
      "old": gain * second_order,
    }
    return steps, {k: v.astype(np.float32) for k, v in coefficients.items()}

  def step(
    self,
    schedule: schedules.NoiseSchedule,
    output: jax.Array,
    z: jax.Array,
    previous: jax.Array,
    coefficients: Mapping[str, jax.Array],
    noise: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Computes one step; see `Ddim.step`."""
    del noise
    a, keep, new, old = (coefficients[k] for k in ("a", "keep", "new", "old"))
    image = schedules.to_image(schedule, output, z, a)
    if not self.official or isinstance(schedule.clip, tuple):
      image = schedules.bound(schedule, image)
    z = keep * z + new * image - old * previous
    return z, image


def _dpm_timesteps(schedule, count):
  """Returns steps int32[count] from noisy to clean, without repetitions."""
  schedules.check_count(schedule, count)
  total = schedule.num_steps
  if schedule.spacing == "leading":
    steps = np.arange(1, count + 1)[::-1] * (total // (count + 1))
    steps = steps + schedule.steps_offset
  elif schedule.spacing == "trailing":
    steps = np.round(np.arange(total, 0, -total / count)[:count]) - 1
  else:
    steps = np.linspace(0, total - 1, count + 1).round()[:0:-1]
  if (np.diff(steps) >= 0).any() or not 0 <= steps[-1] <= steps[0] < total:
    raise errors.UsageError(
      f"DPM-Solver++ cannot take {count} steps of a schedule with {total} steps"
      f" and {schedule.spacing!r} spacing: it visits each step once. Use fewer"
      " steps."
    )
  return steps.astype(np.int32)


Solver = Ddim | DpmSolver
OFFICIAL = Ddim(official=True)
NAMES = ("ddim", "dpm++")


def named(name: str, *, eta: float = 0.0, official: bool = True) -> Solver:
  """Returns a solver by its name.

  Args:
    name: one of `NAMES`.
    eta: share of DDPM's noise, for "ddim" only.
    official: whether to step as diffusers does.

  Raises:
    errors.UsageError: the name is unknown, or the solver has no eta.
  """
  if name not in NAMES:
    raise errors.UsageError(
      f"The solver {name!r} is unknown: give one of {', '.join(NAMES)}."
    )
  if name == "ddim":
    return Ddim(eta=eta, official=official)
  if eta:
    raise errors.UsageError(
      f"eta={eta} adds noise, but the solver 'dpm++' is deterministic: leave"
      " eta at 0, or use 'ddim'."
    )
  return DpmSolver(official=official)
