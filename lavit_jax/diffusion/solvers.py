"""Solvers of sampling: from noise to an image in few steps.

A solver is a frozen dataclass of two methods, and hashable, so that it can be
a static argument. `plan` gives the visited steps and their numbers, computed
once in numpy; `step` goes one of them.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.diffusion import schedules

_FEW = 15  # fewer steps end with one of first order (DPM-Solver++)
_LEAST = 2.0**-24  # a_T of diffusers' DPM solver where it would be 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ddim:
  """DDIM (Song et al., arXiv 2010.02502).

  Attributes:
    eta: share of DDPM's noise, 0 for none (the paper's equation 12).
    official: step as diffusers does, for parity: each step goes T // count
      down from its own, whichever is visited next, and the predicted noise
      stays what it was where `clip` bounds the image.
  """

  eta: float = 0.0
  official: bool = False

  def plan(self, schedule: schedules.NoiseSchedule, count: int):
    """The visited steps and the levels between which they lead.

    Returns:
      int32[S], and a dict of `a` float32[S], the cumulative alphas there, and
      `a_next` float32[S], those a step on.

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
        "This schedule begins at pure noise (zero_snr), where predicted noise"
        " says nothing of the image: it needs prediction 'velocity' or"
        " 'sample', or the spacing 'leading', which does not visit that step."
      )
    return steps, {"a": a, "a_next": after.astype(np.float32)}

  def step(self, schedule, output, z, previous, now, noise=None):
    """One step; `now` holds this step's numbers of `plan`.

    Args:
      schedule: its prediction and clip are used.
      output: float[B, ...], the network's.
      z: float[B, ...].
      previous: float[B, ...], the image predicted a step ago; unused.
      now: dict of float[].
      noise: float[B, ...], needed where eta > 0.

    Returns:
      The next z and the predicted clean image.
    """
    del previous
    a, a_next = now["a"], now["a_next"]
    image = schedules.to_image(schedule, output, z, a)
    eps = schedules.to_eps(schedule, output, z, a)
    if schedule.clip is not None:
      image = schedules.bound(schedule, image)
      if not self.official:
        eps = (z - jnp.sqrt(a) * image) / jnp.sqrt(1 - a)
    spread = self.eta * jnp.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    towards = jnp.sqrt(jnp.maximum(1 - a_next - spread**2, 0.0)) * eps
    z = jnp.sqrt(a_next) * image + towards
    return (z if noise is None else z + spread * noise), image


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpmSolver:
  """DPM-Solver++ (2M), deterministic (Lu et al., arXiv 2211.01095).

  The midpoint form in diffusers' conventions: in "leading" and "linspace"
  spacing the visited steps are those of count + 1 without the cleanest.

  Attributes:
    to_zero: the last step ends without noise, not at that of step 0.
    lower_order_final: with fewer than 15 steps the last is of first order
      even if it does not end at zero.
    official: a number as `clip` is not heeded, as in diffusers, whose solver
      knows dynamic thresholding alone.
    spacing: instead of the schedule's. Where a scheduler's file names none,
      diffusers' DDIM takes "leading" and its DPM solver "linspace".
  """

  to_zero: bool = True
  lower_order_final: bool = True
  official: bool = False
  spacing: str | None = None
  eta = 0.0  # no field: this solver adds no noise

  def plan(self, schedule: schedules.NoiseSchedule, count: int):
    """The visited steps and the weights of what a step adds up.

    Returns:
      int32[S], and a dict of float32[S]: `a`, the cumulative alphas, and
      `keep`, `new`, `old`: z' = keep z + new x - old x_before.

    Raises:
      errors.UsageError: count does not fit the schedule.
    """
    if self.spacing is not None:
      schedule = dataclasses.replace(schedule, spacing=self.spacing)
    steps = _dpm_timesteps(schedule, count)
    table = schedules.alphas_cumprod(schedule).astype(np.float64)
    if schedule.zero_snr:
      table[-1] = _LEAST
    a = table[steps]
    ends = np.append(a, 1.0 if self.to_zero else table[0])
    alpha, sigma = np.sqrt(ends), np.sqrt(1 - ends)
    with np.errstate(divide="ignore"):  # the end without noise is at infinity
      h = np.diff(np.log(alpha) - np.log(sigma))
    gain = -alpha[1:] * np.expm1(-h)
    half = np.zeros(count)  # of the second order; the first step has no past
    half[1:] = h[1:] / h[:-1] / 2
    if self.to_zero or (self.lower_order_final and count < _FEW):
      half[-1] = 0.0
    numbers = {
      "a": a,
      "keep": sigma[1:] / sigma[:-1],
      "new": gain * (1 + half),
      "old": gain * half,
    }
    return steps, {k: v.astype(np.float32) for k, v in numbers.items()}

  def step(self, schedule, output, z, previous, now, noise=None):
    """One step; arguments and results are those of `Ddim.step`."""
    del noise
    image = schedules.to_image(schedule, output, z, now["a"])
    if not self.official or isinstance(schedule.clip, tuple):
      image = schedules.bound(schedule, image)
    z = now["keep"] * z + now["new"] * image - now["old"] * previous
    return z, image


def _dpm_timesteps(schedule, count):
  """int32[count], from noisy to clean; UsageError where one comes twice."""
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
      f"DPM-Solver++ cannot take {count} steps of a schedule of {total} in"
      f" {schedule.spacing!r} spacing: it visits each step once. Give fewer."
    )
  return steps.astype(np.int32)


Solver = Ddim | DpmSolver
OFFICIAL = Ddim(official=True)
NAMES = ("ddim", "dpm++")


def named(name: str, *, eta: float = 0.0, official: bool = True) -> Solver:
  """A solver by its name in `NAMES`, stepping as diffusers does.

  Raises:
    errors.UsageError: there is none of that name, or it takes no eta.
  """
  if name not in NAMES:
    raise errors.UsageError(
      f"No solver is called {name!r}: give one of {', '.join(NAMES)}."
    )
  if name == "ddim":
    return Ddim(eta=eta, official=official)
  if eta:
    raise errors.UsageError(
      f"eta={eta} asks for added noise, but the solver 'dpm++' is"
      " deterministic: leave eta at 0, or use 'ddim'."
    )
  return DpmSolver(official=official)
