"""Policies for a loss or gradient that is not finite.

`config.nonfinite = dict(policy=…, limit=N)`; without it the policy is "stop".

  stop       the run ends with an error that names the step
  skip       the update is left out, as if the batch had not existed; more than
             `limit` such steps in a row end the run
  roll_back  the run goes back to the newest checkpoint, and on with the batches
             after the bad one; more than `limit` times from one checkpoint end
             the run
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath

from lavit_jax.core import errors

POLICIES = ("stop", "skip", "roll_back")


@dataclasses.dataclass(frozen=True)
class Policy:
  """`config.nonfinite`, checked.

  Attributes:
    policy: one of `POLICIES`.
    limit: see the module.
  """

  policy: str = "stop"
  limit: int = 0

  def __post_init__(self) -> None:
    """Raises ConfigError for unknown values."""
    whole = isinstance(self.limit, int) and not isinstance(self.limit, bool)
    if self.policy not in POLICIES or not whole or self.limit < 0:
      raise errors.ConfigError(
        f"config.nonfinite has policy={self.policy!r}, limit={self.limit!r}:"
        f" expected a policy of {POLICIES}, and as limit the number of bad"
        " steps in a row that are allowed, an integer of 0 or more."
      )
    if self.policy != "stop" and not self.limit:
      raise errors.ConfigError(
        f"config.nonfinite.policy={self.policy!r} with limit=0 allows no bad"
        " step. Set config.nonfinite.limit above 0, or policy='stop'."
      )


def policy_of(config: ml_collections.ConfigDict) -> Policy:
  """Returns the policy of a config.

  Raises:
    errors.ConfigError: unknown fields or values.
  """
  fields = dict(config.get("nonfinite", {}))
  if unknown := sorted(set(fields) - {"policy", "limit"}):
    raise errors.ConfigError(
      f"config.nonfinite has fields {unknown}; expected policy and limit."
    )
  return Policy(**fields)


class RollBack(Exception):
  """Raised at a bad step, to where the run can go back.

  Attributes:
    step: the bad step.
  """

  def __init__(self, step: int):
    super().__init__(f"step {step}")
    self.step = step


class Watch:
  """Checks the metrics of every step in turn."""

  def __init__(self, policy: Policy, stage: str):
    self._policy, self._stage = policy, stage
    self._newest = -1  # step that was checked
    self._bad_in_a_row = 0
    self._roll_backs: dict[int | None, int] = {}  # their number by checkpoint

  def check(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Does nothing for a good step; a step that was checked is not again.

    Args:
      step: that the metrics are of.
      metrics: with `loss`, and `grad_norm` if it counts.

    Raises:
      RollBack: the step is bad, and the policy is "roll_back".
      errors.LavitError: the step is bad, and the run cannot go on.
    """
    if step <= self._newest:
      return
    self._newest = step
    names = ("loss", "grad_norm")
    values = {name: float(metrics[name]) for name in names if name in metrics}
    if self._policy.policy == "stop":
      values.pop("grad_norm", None)  # training may recover: it is clipped
    bad = {k: v for k, v in values.items() if not math.isfinite(v)}
    self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
    if not bad:
      return
    if self._policy.policy == "roll_back":
      raise RollBack(step)
    if self._bad_in_a_row > self._policy.limit:
      raise errors.LavitError(self._message(step, bad))

  def _message(self, step: int, bad: Mapping[str, float]) -> str:
    """Returns the error message of a step at which the run ends."""
    shown = ", ".join(f"{name} {value}" for name, value in bad.items())
    if self._policy.policy == "skip":
      return (
        f"Stage {self._stage!r} has had {self._bad_in_a_row} steps in a row"
        f" that are not finite, the last of them step {step} ({shown}). Their"
        " updates were left out, but config.nonfinite.limit is"
        f" {self._policy.limit}. Lower the learning rate of this phase"
        " (config.phases), or look at the batches that batches.jsonl names."
      )
    return (
      f"The loss of stage {self._stage!r} is {bad['loss']} at step {step}."
      " Lower the learning rate of this phase (config.phases), or look at the"
      " batch: batches.jsonl names its hash. config.nonfinite can leave such"
      " steps out."
    )

  def rolled_back(self, bad_step: int, checkpoint: int | None) -> None:
    """Notes that the run goes on from a checkpoint after a bad step.

    Args:
      bad_step: the step.
      checkpoint: the checkpoint's step; None for the start of the run.

    Raises:
      errors.LavitError: the limit of that checkpoint is exceeded.
    """
    self._newest = (checkpoint or 0) - 1
    count = self._roll_backs.get(checkpoint, 0) + 1
    self._roll_backs[checkpoint] = count
    if count > self._policy.limit:
      raise errors.LavitError(
        f"Stage {self._stage!r} was not finite at step {bad_step}, after it had"
        f" gone back to the checkpoint of step {checkpoint} and on with later"
        f" batches {self._policy.limit} times (config.nonfinite.limit). Lower"
        " the learning rate of this phase (config.phases)."
      )


def check_result(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  step: int,
  metrics: Mapping[str, float],
) -> None:
  """Checks that the held-out loss at the end of a run is finite.

  Args:
    config: of the run.
    workdir: of the run.
    step: the last.
    metrics: held-out metrics; `loss` is checked if it is there.

  Raises:
    errors.LavitError: it is not, so the weights are not to be exported.
  """
  loss = metrics.get("loss", 0.0)
  if math.isfinite(loss):
    return
  raise errors.LavitError(
    f"The held-out loss of stage {config.stage!r} at its last step, {step}, is"
    f" {loss}: nothing was written to {config.model_dir}. Either the weights"
    " went wrong in the last steps, or the checkpoint"
    f" {workdir / 'checkpoints' / str(step)} is damaged: remove it, and give"
    " the same command again to go on from the one before."
  )
