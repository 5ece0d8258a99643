"""Drawing by the pixel decoders of a model directory, options and errors."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.infer import pipeline
from lavit_jax.infer.pixels import decoders
from lavit_jax.infer.pixels import options as options_lib
from lavit_jax.infer.pixels import safety as safety_lib
from lavit_jax.models.pixels import safety
from tests.train import latent_micro

pytestmark = pytest.mark.slow

CODES = [np.array([1, 5, 9]), np.array([2]), np.arange(16)]
_QUICK = {"steps": 2}
_FACTOR = latent_micro.VAE.scale


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A micro model with both official decoders."""
  directory = tmp_path_factory.mktemp("decoders") / "model"
  latent_micro.save_model(directory)
  return directory


@pytest.fixture(scope="module")
def lavit(directory):
  return pipeline.LaVIT.load(directory)


def _arrays(images):
  return np.stack([np.asarray(p, np.int32) for p in images])


@pytest.fixture(scope="module")
def drawn(lavit):
  """By both decoders, as they do by default."""
  return {
    kind: lavit.draw_codes(CODES, seed=3, decoder=kind, **_QUICK)
    for kind in ("lowres", "highres")
  }


@pytest.mark.parametrize("kind", ["lowres", "highres"])
def test_a_image_is_its_seed_s_whatever_the_batch(lavit, drawn, kind):
  (alone,) = lavit.draw_codes(CODES[2:], seed=5, decoder=kind, **_QUICK)
  difference = _arrays([alone]) - _arrays(drawn[kind][2:])
  assert np.abs(difference).max() <= 1
  other = _arrays(drawn[kind])
  assert np.abs(np.diff(other, axis=0)).max() > 20  # and they do differ


def test_highres_is_the_default_and_sizes_are_in_proportion(lavit, drawn):
  (default,) = lavit.draw_codes(CODES[:1], seed=3, **_QUICK)
  difference = _arrays([default]) - _arrays(drawn["highres"][:1])
  assert np.abs(difference).max() <= 1
  assert default.size == (32, 32)  # the side its autoencoder was trained on
  (wide,) = lavit.draw_codes(CODES[:1], ratio="16:9", **_QUICK)
  assert abs(wide.width - 42) <= _FACTOR / 2  # 1344 x 768 at 32, not at 1024
  assert wide.width % _FACTOR == 0
  assert wide.height == 24
  (tall,) = lavit.draw_codes(
    CODES[:1], size=(36, 20), decoder="lowres", solver="dpm++", **_QUICK
  )
  assert tall.size == (20, 36)


def test_guidance_steps_sizes_and_solver_are_heeded(lavit, drawn):
  first = _arrays(drawn["highres"][:1])
  for change in (
    {"decoder_guidance_scale": 1},
    {"decoder_guidance_scale": 20.0},
    {"steps": 3},
    {"original_size": (500, 90)},
    {"crop": (9, 30)},
  ):
    made = lavit.draw_codes(CODES[:1], **{"seed": 3, **_QUICK, **change})
    assert np.abs(_arrays(made) - first).max() > 1, change


def test_the_solver_is_heeded(lavit):
  """Of four steps: of two, DPM-Solver++ takes both as DDIM does."""
  draw = lambda solver: _arrays(
    lavit.draw_codes(CODES[:1], seed=3, steps=4, solver=solver)
  )
  assert np.abs(draw("dpm++") - draw("ddim")).max() > 1


def test_tiles_draw_nearly_the_same(lavit, drawn):
  (tiled,) = lavit.draw_codes(CODES[:1], seed=3, tile=24, **_QUICK)
  difference = np.abs(_arrays([tiled]) - _arrays(drawn["highres"][:1]))
  assert 0 < difference.mean() < 40


def test_progress_counts_all_steps_of_all_images(lavit):
  told = []
  lavit.draw_codes(
    CODES * 2, seed=3, progress=lambda *now: told.append(now), **_QUICK
  )  # six images: four, then two
  assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
  lavit.draw_codes(CODES[:1], **_QUICK)
  assert len(told) == 4  # nobody is told of another call


def test_reconstruction_needs_no_language_model(lavit):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
  both = lavit.reconstruct(images, decoder="lowres", **_QUICK)
  assert [image.size for image in both] == [(32, 32)] * 2
  tokens = lavit.tokenize(images)
  again = lavit.draw_codes(
    [row["codes"] for row in tokens], decoder="lowres", **_QUICK
  )
  np.testing.assert_array_equal(_arrays(both), _arrays(again))


def test_bfloat16_networks_draw_about_the_same(directory, drawn):
  half = pipeline.LaVIT.load(directory, dtype="bfloat16")
  made = half.draw_codes(CODES, seed=3, **_QUICK)
  difference = np.abs(_arrays(made) - _arrays(drawn["highres"]))
  assert difference.mean() < 12


def test_where_layers_are_scanned_the_same_is_drawn(
  directory, lavit, drawn, monkeypatch
):
  made = pipeline.LaVIT.load(directory)
  with monkeypatch.context() as patch:
    patch.setattr(jax, "default_backend", lambda: "tpu")
    decoder = decoders.load(directory, "highres")
  middle = decoder.params["unet"]["mid_block"]["attentions_0"]
  assert "transformer_blocks" in middle
  monkeypatch.setitem(made._pixel_decoders, "highres", decoder)
  again = made.draw_codes(CODES, seed=3, decoder="highres", **_QUICK)
  assert np.abs(_arrays(again) - _arrays(drawn["highres"])).max() <= 1


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"ratio": "5:4"}, "1:1, 4:3"),
    ({"size": (31, 32)}, f"height=31 is not a multiple of {_FACTOR}"),
    ({"size": (32,)}, "height and width"),
    ({"size": (0, 32)}, "at least 1"),
    ({"size": (32, 32), "ratio": "1:1"}, "Leave one"),
    ({"solver": "euler"}, "ddim, dpm"),
    ({"steps": 0}, "steps=0"),
    ({"steps": 2000}, "1 to 1000"),
    ({"decoder": "sd3"}, "highres, lowres, pixels"),
    ({"decoder": "lowres", "crop": (1, 2)}, "does not take"),
    ({"crop": (-1, 2)}, "top and left"),
    ({"tile": 13}, f"multiple of {_FACTOR}"),
  ],
)
def test_bad_options_are_refused_before_anything_is_drawn(lavit, options, says):
  with pytest.raises(errors.UsageError, match=says):
    lavit.draw_codes(CODES, **options)


def test_bad_options_are_refused_before_anything_else_is_done(lavit):
  with pytest.raises(errors.UsageError, match="ddim, dpm"):
    lavit.reconstruct("nowhere.png", solver="euler")
  with pytest.raises(errors.UsageError, match="1 to 1000"):
    lavit.generate("without a language model", steps=1001)
  with pytest.raises(errors.UsageError, match="progress=5"):
    lavit.generate("without a language model", progress=5)
  for prompts in (None, "red", [3]):
    with pytest.raises(errors.UsageError, match="expected a list of"):
      lavit.synthesize_batch(prompts)
  with pytest.raises(errors.UsageError, match="expected a list of texts and"):
    lavit.synthesize("red")


@pytest.mark.parametrize(
  ("codes", "says"),
  [([], "0 visual tokens"), (range(17), "17 visual tokens"), ([99], "0 to 31")],
)
def test_words_that_are_none_are_refused(lavit, codes, says):
  with pytest.raises(errors.UsageError, match=says):
    lavit.draw_codes([*CODES, list(codes)], **_QUICK)


def test_missing_parts_and_networks_are_named(directory, tmp_path):
  copy = tmp_path / "model"
  shutil.copytree(directory, copy)
  shutil.rmtree(copy / "highres_pixels")
  lavit = pipeline.LaVIT.load(copy)
  assert decoders.available(lavit.parts) == ["lowres"]
  with pytest.raises(errors.CheckpointError, match="no highres_pixels"):
    lavit.draw_codes(CODES, decoder="highres")
  with pytest.raises(
    errors.CheckpointError, match="has the pixel decoder lowres"
  ):
    lavit.draw_codes(CODES, decoder="pixels")
  shutil.rmtree(copy / "lowres_pixels")
  latent_micro.save_kind(copy, "lowres", unets=False)
  with pytest.raises(errors.CheckpointError, match="no unet, uncond"):
    pipeline.LaVIT.load(copy).draw_codes(CODES, decoder="lowres")
  for part in ("lowres", "lowres_pixels", "highres"):
    shutil.rmtree(copy / part)
  with pytest.raises(errors.CheckpointError, match="Train or import"):
    pipeline.LaVIT.load(copy).draw_codes(CODES)


def test_squares_without_latents_take_no_ratio():
  tiny = pipeline.LaVIT.load("tiny")
  for options in ({"ratio": "4:3"}, {"size": (64, 64)}, {"tile": 8}):
    with pytest.raises(errors.UsageError, match="decoder"):
      tiny.draw_codes(CODES, decoder="pixels", **options)
  told = []
  (image,) = tiny.draw_codes(
    CODES[:1], solver="dpm++", steps=3, progress=lambda *now: told.append(now)
  )
  assert told[-1] == (3, 3)
  assert image.size == (48, 48)


@pytest.fixture
def guarded(directory, tmp_path):
  """The micro model with a checker that withholds light images."""
  copy = tmp_path / "guarded"
  shutil.copytree(directory, copy)
  config = safety.SafetyConfig(
    image_size=16,
    patch_size=8,
    width=8,
    depth=1,
    num_heads=2,
    mlp_dim=8,
    projection_dim=4,
    concepts=2,
    special=1,
  )
  net = safety.SafetyChecker(config)
  params = net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  import flax.linen as nn

  params = nn.meta.unbox(params)
  params["concept_embeds_weights"] = -2 * jnp.ones(2)  # whatever it is shown
  meta = {"safety": dataclasses.asdict(config)}
  checkpoints.save_part(copy, safety_lib.PART, params, meta)
  return copy


def test_what_the_safety_checker_withholds_is_black_and_named(guarded):
  lavit = pipeline.LaVIT.load(guarded)
  assert lavit.info()["safety_checker"]
  for image in lavit.draw_codes(CODES, size=(32, 20), **_QUICK):
    assert safety_lib.is_withheld(image)
    assert image.size == (20, 32)
    assert not np.asarray(image).any()
  free = pipeline.LaVIT.load(guarded, check_safety=False)
  free._pixel_decoders = lavit._pixel_decoders  # compiled already
  assert not free.info()["safety_checker"]
  for image in free.draw_codes(CODES, size=(32, 20), **_QUICK):
    assert not safety_lib.is_withheld(image)
    assert np.asarray(image).any()


def test_the_checker_sees_the_middle_of_a_image():
  from PIL import Image

  wide = Image.new("RGB", (96, 32))
  wide.paste((255, 255, 255), (32, 0, 64, 32))
  seen = safety_lib.clip_square(wide, 16)
  assert seen.shape == (16, 16, 3)
  assert seen.mean() > 240
  assert safety_lib.clip_square(Image.new("RGB", (7, 90)), 16).shape[0] == 16


def test_options_name_what_they_are():
  how = options_lib.PixelOptions(size=[32, 48])
  assert how.size == (32, 48)
  with pytest.raises(errors.UsageError, match="two whole numbers"):
    options_lib.PixelOptions(size="32x48")
