"""FLOPs by network: named scopes of a traced function, summed by pattern."""

import collections
import re
from collections.abc import Mapping

_CAUSAL = re.compile(r"\bcausal_over_(\d+)_keys\b")


def by_network(
  counts: Mapping[str, float],
  patterns: Mapping[str, str],
  *,
  segments: Mapping[str, float | None] | None = None,
) -> dict[str, float]:
  """Sums FLOPs over the scopes of each network.

  Causal attention counts the keys that a token sees: all pairs are multiplied
  in the form that is traced, but a kernel leaves the others out.

  Args:
    counts: {scope: FLOPs}, see `jaxpr.count`.
    patterns: {network: regular expression}; a scope belongs to the first
      network whose expression is found in it.
    segments: {network: length of the document that a token is in, averaged
      over tokens}; whole rows where it is None or missing.

  Returns:
    {network: FLOPs}, in the order of `patterns`, without zeros.

  Raises:
    ValueError: a scope belongs to no network.
  """
  total: dict[str, float] = collections.defaultdict(float)
  for scope, flops in counts.items():
    network = _first(scope, patterns)
    total[network] += flops * visible(scope, (segments or {}).get(network))
  return {name: float(total[name]) for name in patterns if total.get(name)}


def visible(scope: str, segment: float | None = None) -> float:
  """Returns the share of the keys that a token sees, averaged over tokens.

  Token i of a causal document of s tokens sees i + 1, on average (s + 1) / 2.

  Args:
    scope: see `jaxpr.count`; outside of causal attention all keys are seen.
    segment: s; None for documents as long as the row.
  """
  found = _CAUSAL.search(scope)
  if not found:
    return 1.0
  keys = int(found[1])
  return ((segment or keys) + 1) / (2 * keys)


def _first(scope: str, patterns: Mapping[str, str]) -> str:
  for network, pattern in patterns.items():
    if re.search(pattern, scope):
      return network
  raise ValueError(
    f"The scope {scope!r} multiplies matrices, but belongs to none of the"
    f" networks {list(patterns)}. Add a pattern for it."
  )
