"""Stored settings and fingerprints are compared with those of a run."""

import dataclasses
import logging

import ml_collections
import pytest

from lavit_jax.core import agreement, errors
from lavit_jax.models import llama
from lavit_jax.models.pixels import unet


def _changed(value):
  """Returns another value of the same type."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, str):
    return value + "x"
  if isinstance(value, tuple):
    return (*value, 1)
  return value * 2 if value else 1


@pytest.mark.parametrize("config", [llama.LLAMA2_7B, unet.SD15_UNET])
def test_every_field_but_those_of_computation_is_found(config):
  for field in dataclasses.fields(config):
    other = dataclasses.replace(config)  # past the checks of its fields
    old = getattr(config, field.name)
    if dataclasses.is_dataclass(old):
      continue
    object.__setattr__(other, field.name, _changed(old))
    found = agreement.fields(config, other, "model.net.")
    names = [d.name for d in found]
    free = field.name in agreement.COMPUTED
    assert names == ([] if free else [f"model.net.{field.name}"])
    if found:
      assert (found[0].stored, found[0].current) == (old, _changed(old))


def test_fields_of_fields_are_named_by_their_path():
  details = dataclasses.replace(unet.SD15_UNET.details, norm_eps=1e-3)
  other = dataclasses.replace(unet.SD15_UNET, details=details)
  (found,) = agreement.fields(other, unet.SD15_UNET, "model.unet.")
  assert found.name == "model.unet.details.norm_eps"
  assert found.way_out == "give --config.model.unet.details.norm_eps=0.001"


def test_fingerprints_are_compared_where_both_sides_have_them():
  found = agreement.fingerprints(
    {"a": "1", "b": "2"}, {"b": "3", "c": "4"}, "mend"
  )
  assert [(d.name, d.stored, d.current) for d in found] == [("b", "2", "3")]


def test_a_difference_is_an_error_until_it_is_accepted(caplog):
  differ = [
    agreement.Difference("model.llm.rope_theta", 1e6, 1e4, "give this"),
    agreement.Difference("encoder", "a", "b", "give that"),
  ]
  accept = agreement.accepted(ml_collections.ConfigDict())
  with pytest.raises(errors.DataError) as caught:
    agreement.settle(differ, accept, what="The thing", error=errors.DataError)
  for words in (
    "model.llm.rope_theta is 1000000.0 there, 10000.0 here",
    "encoder is 'a' there, 'b' here",
    "Either give this and give that; or",
    "--config.accept=encoder,model.llm.rope_theta",
  ):
    assert words in str(caught.value)
  config = ml_collections.ConfigDict({"accept": "encoder, other"})
  with pytest.raises(errors.ConfigError, match="rope_theta is"):
    agreement.settle(differ, agreement.accepted(config), what="The thing")
  config.accept = "model.llm.rope_theta,encoder"
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    agreement.settle(differ, agreement.accepted(config), what="The thing")
  assert len(caplog.records) == 2
  assert "10000.0 here, as config.accept allows" in caplog.text


def test_accepted_differences_must_be_a_string_of_names():
  config = ml_collections.ConfigDict({"accept": ("encoder",)})
  with pytest.raises(errors.ConfigError, match="commas"):
    agreement.accepted(config)
