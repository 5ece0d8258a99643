"""Do both sides compute the same? Asked before anything is timed."""

import numpy as np

from side_by_side import cases

# Nearest codes may change places at float noise; the compact merger, which
# has no eps in its softmax, is a little another function.
_CODES_APART = {"reference": 0.002, "compact": 0.02}
_SCORES_APART = 1e-3


def first_calls(case, batch, sizes, found, judged) -> tuple[bool, str]:
  """Whether two first calls agree, and a line that says how far.

  Args:
    case: what was run.
    batch: rows.
    sizes: of the model.
    found: side to arrays that the first call gave.
    judged: side to arrays of `Side.judged`.
  """
  if case.kind == "tokenize":
    return _tokenized(case, found["torch"], found["ours"])
  faults = [
    f"{side} wrote {fault}"
    for side, arrays in found.items()
    if (fault := _fault(case, batch, sizes, arrays["ids"]))
  ]
  if faults:
    return False, "; ".join(faults)
  if case.kind == "draw":
    return _same_ids(judged["torch"], judged["ours"], "greedy guided ids")
  good, text = _same_ids(found["torch"], found["ours"], "ids of the best beam")
  apart = np.abs(judged["torch"]["scores"] - judged["ours"]["scores"]).max()
  return bool(good and apart < _SCORES_APART), f"{text}, scores {apart:.0e}"


def _fault(case, batch, sizes, ids):
  """What of the ids int[B, T] is not what was asked for, or ""."""
  shape = (batch, case.new_tokens)
  if ids.shape != shape:
    return f"ids of shape {ids.shape}, not {shape}"
  banned = cases.suppressed(case, sizes)
  banned[cases.eos_id(case, sizes)] = True
  wrong = ids[banned[ids]]
  return f"suppressed ids such as {wrong[0]}" if wrong.size else ""


def _same_ids(theirs, ours, what):
  same = (theirs["ids"] == ours["ids"]).all(1)
  if same.all():
    return True, f"{what} equal ({len(same)} rows)"
  row = int(np.flatnonzero(~same)[0])
  apart = theirs["ids"][row] != ours["ids"][row]
  token = int(apart.argmax())
  return False, (
    f"{what} differ in {(~same).sum()} of {len(same)} rows, first in row {row}"
    f" at token {token}: {theirs['ids'][row, token]} in PyTorch,"
    f" {ours['ids'][row, token]} here"
  )


def _tokenized(case, theirs, ours):
  kept = theirs["keep"].sum(1)
  counts = f"{kept.min()} to {kept.max()} of {theirs['keep'].shape[1]} kept"
  wrong = int((theirs["keep"] != ours["keep"]).sum())
  if wrong:
    return False, f"keep masks differ at {wrong} patches ({counts})"
  apart = float((theirs["codes"] != ours["codes"]).mean())
  limit = _CODES_APART[case.merger_form]
  return apart <= limit, (
    f"keep masks equal ({counts}), {apart:.2%} of {len(ours['codes'])} codes"
    f" differ (at most {limit:.1%} may)"
  )
