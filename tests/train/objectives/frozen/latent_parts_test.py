"""Conditions of a U-Net, given and dropped; the U-Net a run starts from."""

import dataclasses
import json
import logging
import shutil

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.diffusion import schedules, stable_diffusion
from lavit_jax.models.pixels import vae
from lavit_jax.train.objectives.frozen import latent_checks, latent_parts
from tests.train import latent_micro


def _conditions(kind):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  conditions = {"tokens": draw(3, 5, 4)}
  if kind == "highres":
    conditions |= {"pooled": draw(3, 2), "sizes": draw(3, 6)}
  return conditions, draw(2, 4)


def test_lowres_without_a_condition_sees_the_unconditional_tokens_alone():
  conditions, uncond = _conditions("lowres")
  drop = jnp.array([False, True, False])
  given = latent_parts.unet_inputs("lowres", conditions, uncond, drop)
  rest, is_uncond = stable_diffusion.pad_uncond(uncond, conditions["tokens"])
  assert given["condition_mask"].tolist() == [
    [True] * 5,
    [True, True, False, False, False],
    [True] * 5,
  ]
  np.testing.assert_array_equal(given["condition_mask"][1], is_uncond[1])
  np.testing.assert_array_equal(given["condition"][1], rest[1])
  np.testing.assert_array_equal(given["condition"][0], conditions["tokens"][0])


def test_highres_without_a_condition_sees_zeros_and_its_sizes():
  conditions, _ = _conditions("highres")
  drop = jnp.array([False, True, False])
  given = latent_parts.unet_inputs("highres", conditions, None, drop)
  assert set(given) == {"condition", "pooled", "sizes"}
  assert not given["condition"][1].any()
  assert not given["pooled"][1].any()
  np.testing.assert_array_equal(given["sizes"], conditions["sizes"])
  for name, value in (("condition", "tokens"), ("pooled", "pooled")):
    np.testing.assert_array_equal(given[name][2], conditions[value][2])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A model directory with a U-Net of Stable Diffusion's schedule."""
  folder = tmp_path_factory.mktemp("start")
  schedule = schedules.STABLE_DIFFUSION
  latent_micro.save_kind(folder, "lowres", schedule=schedule)
  return folder


def _check(start, sizes=None, accept="", **schedule):
  run = {"start_from": str(start), "model": {"kind": "lowres"}}
  latent_checks.check_start(
    ml_collections.ConfigDict(run | {"accept": accept}),
    sizes or latent_micro.unet_config("lowres"),
    dataclasses.replace(schedules.STABLE_DIFFUSION, **schedule),
  )


_SCHEDULES = {
  "num_steps": 500,
  "kind": "linear",
  "beta_start": 0.001,
  "beta_end": 0.02,
  "zero_snr": True,
  "prediction": "velocity",
}


@pytest.mark.parametrize("name", _SCHEDULES)
def test_a_start_must_have_the_schedule_it_was_trained_with(start, name):
  _check(start)
  change = {name: _SCHEDULES[name]}
  message = rf"schedule\.{name} is .* there, .*{_SCHEDULES[name]}.* here"
  with pytest.raises(errors.ConfigError, match=message):
    _check(start, **change)
  _check(start, accept=f"model.schedule.{name}", **change)


def test_every_field_of_a_schedule_is_compared_or_of_sampling():
  """shift and betas are of other kinds: they change the table alone."""
  fields = {f.name for f in dataclasses.fields(schedules.NoiseSchedule)}
  known = {*_SCHEDULES, *latent_checks._SAMPLING, "shift", "betas"}
  assert fields == known


def test_how_it_is_sampled_and_how_it_is_written_down_may_differ(start):
  _check(start, spacing="trailing", steps_offset=0, clip=1.0, alpha_to_one=True)
  root = np.linspace(0.00085**0.5, 0.012**0.5, 1000)
  _check(start, betas=tuple(float(b) for b in root**2))
  with pytest.raises(errors.ConfigError, match=r"schedule\.betas"):
    _check(start, betas=tuple(float(b) for b in root))


def test_a_start_of_another_unet_names_every_field_and_the_way_out(start):
  sizes = latent_micro.unet_config("lowres")
  details = dataclasses.replace(sizes.details, norm_eps=1e-3, freq_shift=1.0)
  with pytest.raises(errors.ConfigError) as caught:
    _check(start, dataclasses.replace(sizes, details=details))
  assert "--config.model.unet.details.norm_eps=1e-05" in str(caught.value)
  assert "details.freq_shift is 0.0 there, 1.0 here" in str(caught.value)
  _check(start, dataclasses.replace(sizes, remat="full", scan=True))


def test_a_start_without_a_schedule_is_warned_of(start, tmp_path, caplog):
  other = shutil.copytree(start, tmp_path / "start")
  path = other / "lowres_pixels" / "part.json"
  meta = json.loads(path.read_text())
  del meta["schedule"]
  path.write_text(json.dumps(meta))
  with caplog.at_level(logging.WARNING):
    _check(other)
  assert "does not say its noise schedule" in caplog.text


def test_the_fingerprint_depends_on_the_groups_of_the_autoencoder():
  """No shape of a weight depends on them, but the latents do."""
  ones = {"kernel": np.ones(3, np.float32)}
  params = {"encoder": ones, "quant_conv": ones}
  sizes = dict(channels=(32, 64), layers_per_block=1)
  prints = {
    latent_parts.fingerprint(params, vae.VaeConfig(**sizes, groups=groups))
    for groups in (8, 16, 32)
  }
  assert len(prints) == 3


def test_fields_that_change_no_shape_are_compared(start):
  stored = latent_micro.unet_config("lowres")
  changes = {
    "groups": 8,
    "num_heads": (1, 1),
    "mid_attention": False,
    "ff_mult": 2,
    "attention": (True, True),
  }
  for name, value in changes.items():
    with pytest.raises(errors.ConfigError, match=rf"model\.unet\.{name} is"):
      _check(start, dataclasses.replace(stored, **{name: value}))
