"""How a run computes the networks that it reads from a model directory.

A part on disk says what a network is: sizes and weights. How it is computed,
in which dtype and with what kept for the backward pass, is the run's to say,
in `config.model.compute`, one entry a network:

  compute = dict(
    encoder=dict(dtype="bfloat16", remat="none", unroll=1),
    merger=dict(dtype="bfloat16", remat="full", unroll=1),
  )

So a step is the same program whether a part was imported (its part.json then
says float32), was trained here, or is not there at all (`AbstractArtifacts`):
the one that `lavit compile` measures. Networks whose sizes are in the run's
config have these fields among them. What is left out has its usual value.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lavit_jax.core import errors
from lavit_jax.models import layers
from lavit_jax.models.pixels import vae
from lavit_jax.models.tokenizer import tokenizer

DEFAULTS = {"dtype": "float32", "remat": "none", "unroll": 1}
_DTYPES = ("float32", "bfloat16", "float16")
_PARTS = ("selector", "merger", "quantizer", "decoder")


def applied(
  config, *, trained: Sequence[str] = (), **networks
) -> dict[str, Any]:
  """The networks' configs, computed as the run says.

  Args:
    config: of the run.
    trained: names of those of the networks that change, or in whose dtype
      something is computed that does.
    **networks: all that the stage reads, each a config as a part has it: of a
      network, or a `tokenizer.TokenizerConfig`, whose four parts then are
      computed alike (its encoder is a network of its own).

  Returns:
    The same names and configs, with other dtype, remat and unroll.

  Raises:
    errors.ConfigError: config.model.compute names a network that the stage
      does not read, a field that is unknown or that the network has not, or
      a value that there is not, or with which it cannot be trained.
  """
  chosen = config.model.get("compute", {})
  chosen = {name: dict(fields) for name, fields in chosen.items()}
  if unknown := sorted(set(chosen) - set(networks)):
    raise errors.ConfigError(
      f"model.compute names {unknown}, but stage {config.stage!r} reads"
      f" {sorted(networks)} from its model directory. Change or remove them:"
      " a network that the stage trains has dtype and remat beside its sizes."
    )
  for name, fields in chosen.items():
    _check(name, networks[name], fields, name in trained)
  return {
    name: _computed(network, DEFAULTS | chosen.get(name, {}))
    for name, network in networks.items()
  }


def _check(name, network, chosen, trained) -> None:
  """Raises ConfigError for what is said of one network and cannot be."""
  has = _has(network)
  if unknown := sorted(set(chosen) - has):
    raise errors.ConfigError(
      f"model.compute.{name} has {unknown}: expected some of {sorted(has)},"
      " which are all that this network has. Remove or rename them."
    )
  fields = DEFAULTS | chosen
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
      f"model.compute.{name}.unroll={unroll!r}: expected how many layers a"
      " step of the scan has, a whole number of 1 or more."
    )
  if trained and fields["dtype"] == "float16":
    raise errors.ConfigError(
      f"model.compute.{name}.dtype='float16', but a phase trains in it, and"
      " small gradients are zero in float16: the loss is not scaled. Set it to"
      " 'bfloat16' or 'float32'."
    )


def _has(network) -> set[str]:
  """Those of `DEFAULTS` that a network, or a part of it, has."""
  if isinstance(network, tokenizer.TokenizerConfig):
    return set().union(*(_has(getattr(network, part)) for part in _PARTS))
  return set(DEFAULTS) & {field.name for field in dataclasses.fields(network)}


def _computed(network, fields):
  """A network's config with those of the fields that it has."""
  if isinstance(network, tokenizer.TokenizerConfig):
    made = {name: _computed(getattr(network, name), fields) for name in _PARTS}
    return dataclasses.replace(network, **made)
  has = {field.name for field in dataclasses.fields(network)}
  fields = {name: value for name, value in fields.items() if name in has}
  if isinstance(network, vae.VaeConfig):  # else its dtype might not count
    fields["force_upcast"] = False
  return dataclasses.replace(network, **fields)
