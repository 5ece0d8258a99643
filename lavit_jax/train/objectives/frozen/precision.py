"""How a run computes the networks that it reads from a model directory.

A stored part says which network it is: sizes and weights. How the network is
computed (dtype, and which activations are kept for the backward pass) is the
run's choice, in `config.model.compute`, one entry a network:

  compute = dict(
    encoder=dict(dtype="bfloat16", remat="none", unroll=1),
    merger=dict(dtype="bfloat16", remat="full", unroll=1),
  )

So the step is the same program whether a part was imported (its part.json then
says float32), was trained here, or is missing (`AbstractArtifacts`), and it is
the one that `lavit compile` measures. Networks whose sizes are in the run's
config have these fields beside their sizes. Missing fields take `DEFAULTS`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from lavit_jax.core import errors
from lavit_jax.models import layers
from lavit_jax.models.pixels import vae
from lavit_jax.models.tokenizer import tokenizer

DEFAULTS = {"dtype": "float32", "remat": "none", "unroll": 1}
_DTYPES = ("float32", "bfloat16", "float16")
_PARTS = ("selector", "merger", "quantizer", "decoder")


def applied(
  config: ml_collections.ConfigDict,
  *,
  trained: Sequence[str] = (),
  **networks: Any,
) -> dict[str, Any]:
  """Returns the configs of networks with the run's dtype, remat and unroll.

  Args:
    config: of the run.
    trained: names of those networks that are trained, or in whose dtype
      something is computed that is.
    **networks: all that the stage reads, each the config of a stored network,
      or a `tokenizer.TokenizerConfig`, whose four parts then are computed alike
      (its encoder is a network by itself).

  Returns:
    The same names with the changed configs.

  Raises:
    errors.ConfigError: config.model.compute names a network that the stage does
      not read, a field that the network does not have, or a value that is
      unknown or cannot be trained with.
  """
  compute = config.model.get("compute", {})
  compute = {name: dict(fields) for name, fields in compute.items()}
  if unknown := sorted(set(compute) - set(networks)):
    raise errors.ConfigError(
      f"model.compute names {unknown}, but stage {config.stage!r} reads"
      f" {sorted(networks)} from its model directory. Change or remove them:"
      " a network that the stage trains has dtype and remat beside its sizes."
    )
  for name, fields in compute.items():
    _check(name, networks[name], fields, name in trained)
  return {
    name: _with_fields(network, DEFAULTS | compute.get(name, {}))
    for name, network in networks.items()
  }


def _check(
  name: str, network: Any, compute: Mapping[str, Any], trained: bool
) -> None:
  """Raises ConfigError if one entry of model.compute is not possible."""
  available = _fields_of(network)
  if unknown := sorted(set(compute) - available):
    raise errors.ConfigError(
      f"model.compute.{name} has {unknown}, but this network has only"
      f" {sorted(available)}. Remove or rename them."
    )
  fields = DEFAULTS | dict(compute)
  allowed = {"dtype": _DTYPES, "remat": tuple(layers.REMAT)}
  for field, values in allowed.items():
    if fields[field] not in values:
      raise errors.ConfigError(
        f"model.compute.{name}.{field}={fields[field]!r}: expected one of"
        f" {values}."
      )
  unroll = fields["unroll"]
  if not isinstance(unroll, int) or isinstance(unroll, bool) or unroll < 1:
    raise errors.ConfigError(
      f"model.compute.{name}.unroll={unroll!r}: expected the number of layers"
      " in a step of the scan, an integer of 1 or more."
    )
  if trained and fields["dtype"] == "float16":
    raise errors.ConfigError(
      f"model.compute.{name}.dtype='float16', but a phase trains in it, and"
      " small gradients are zero in float16: the loss is not scaled. Set it to"
      " 'bfloat16' or 'float32'."
    )


def _fields_of(network: Any) -> set[str]:
  """Returns those of `DEFAULTS` that a network, or a part of it, has."""
  if isinstance(network, tokenizer.TokenizerConfig):
    parts = (_fields_of(getattr(network, part)) for part in _PARTS)
    return set[str]().union(*parts)
  return set(DEFAULTS) & {field.name for field in dataclasses.fields(network)}


def _with_fields(network: Any, fields: Mapping[str, Any]) -> Any:
  """Returns a network's config with those of the fields that it has."""
  if isinstance(network, tokenizer.TokenizerConfig):
    parts = {
      name: _with_fields(getattr(network, name), fields) for name in _PARTS
    }
    return dataclasses.replace(network, **parts)
  names = {field.name for field in dataclasses.fields(network)}
  changes = {name: value for name, value in fields.items() if name in names}
  if isinstance(network, vae.VaeConfig):  # else its dtype might not count
    changes["force_upcast"] = False
  return dataclasses.replace(network, **changes)
