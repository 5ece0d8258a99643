"""What a run does where its loss or gradient is not finite.

`config.nonfinite = dict(policy=…, limit=N)`; absent: "stop".

  stop       the run ends with an error that names the step
  skip       the update is left out, as if the batch had not been there; more
             than `limit` in a row end the run
  roll_back  back to the newest checkpoint, and on with the batches after the
             bad one; more than `limit` from one checkpoint end the run
"""

import dataclasses
import math

from lavit_jax.core import errors

POLICIES = ("stop", "skip", "roll_back")


@dataclasses.dataclass(frozen=True)
class Policy:
  """`config.nonfinite`, checked."""

  policy: str = "stop"
  limit: int = 0

  def __post_init__(self):
    whole = isinstance(self.limit, int) and not isinstance(self.limit, bool)
    if self.policy not in POLICIES or not whole or self.limit < 0:
      raise errors.ConfigError(
        f"config.nonfinite has policy={self.policy!r}, limit={self.limit!r}:"
        f" expected a policy of {POLICIES}, and as limit a whole number, how"
        " many bad steps in a row are borne."
      )
    if self.policy != "stop" and not self.limit:
      raise errors.ConfigError(
        f"config.nonfinite.policy={self.policy!r} with limit=0 would bear no"
        " bad step. Set config.nonfinite.limit above 0, or policy='stop'."
      )


def policy_of(config) -> Policy:
  """The policy of a config.

  Raises:
    errors.ConfigError: unknown fields or values.
  """
  given = dict(config.get("nonfinite", {}))
  if unknown := sorted(set(given) - {"policy", "limit"}):
    raise errors.ConfigError(
      f"config.nonfinite has fields {unknown}; expected policy and limit."
    )
  return Policy(**given)


class RollBack(Exception):
  """Carries the bad step to where the run can go back."""

  def __init__(self, step: int):
    super().__init__(f"step {step}")
    self.step = step


class Watch:
  """Judges the metrics of every step in turn."""

  def __init__(self, policy: Policy, stage: str):
    self._policy, self._stage = policy, stage
    self._seen = -1  # newest step that was judged
    self._in_a_row = 0
    self._rolled_back: dict[int | None, int] = {}  # by checkpoint

  def check(self, step: int, metrics) -> None:
    """Does nothing for a good step; each step counts once.

    Args:
      step: that the metrics are of.
      metrics: with `loss`, and `grad_norm` if it counts.

    Raises:
      RollBack: under that policy.
      errors.LavitError: the run cannot go on.
    """
    if step <= self._seen:
      return
    self._seen = step
    names = ("loss", "grad_norm")
    values = {name: float(metrics[name]) for name in names if name in metrics}
    if self._policy.policy == "stop":
      values.pop("grad_norm", None)  # clipping can bring it back
    bad = {k: v for k, v in values.items() if not math.isfinite(v)}
    self._in_a_row = self._in_a_row + 1 if bad else 0
    if not bad:
      return
    if self._policy.policy == "roll_back":
      raise RollBack(step)
    if self._in_a_row > self._policy.limit:
      raise errors.LavitError(self._message(step, bad))

  def _message(self, step, bad):
    shown = ", ".join(f"{name} {value}" for name, value in bad.items())
    if self._policy.policy == "skip":
      return (
        f"Stage {self._stage!r} has had {self._in_a_row} steps in a row that"
        f" are not finite, the last of them step {step} ({shown}); they were"
        f" left out, but config.nonfinite.limit is {self._policy.limit}. Lower"
        " the learning rate of this phase (config.phases), or look at the"
        " batches that batches.jsonl names."
      )
    return (
      f"The loss of stage {self._stage!r} is {bad['loss']} at step {step}."
      " Lower the learning rate of this phase (config.phases), or look at the"
      " batch: batches.jsonl names its hash. config.nonfinite can leave such"
      " steps out."
    )

  def rolled_back(self, bad: int, to: int | None) -> None:
    """Notes that the run goes on from a checkpoint after a bad step.

    Args:
      bad: the step.
      to: the checkpoint's step; None for the start of the run.

    Raises:
      errors.LavitError: too many times from there.
    """
    self._seen = to or 0
    self._seen -= 1
    self._rolled_back[to] = self._rolled_back.get(to, 0) + 1
    if self._rolled_back[to] > self._policy.limit:
      raise errors.LavitError(
        f"Stage {self._stage!r} was not finite at step {bad} once more, after"
        f" {self._policy.limit} times back to the checkpoint of step {to}"
        " (config.nonfinite.limit) with later batches. Lower the learning rate"
        " of this phase (config.phases)."
      )


def check_result(config, workdir, step: int, metrics) -> None:
  """Raises LavitError for weights that cannot be what was trained.

  Args:
    config: of the run.
    workdir: the run's, an `epath.Path`.
    step: the last.
    metrics: held-out ones; `loss` is looked at, if it is there.
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
