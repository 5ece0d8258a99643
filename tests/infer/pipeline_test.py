"""class LaVIT on a micro model: shapes, batches, seeds, bad input."""

import dataclasses
import functools
import inspect
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import checkpoints
from lavit_jax.data.sources import shapes
from lavit_jax.infer import pipeline
from lavit_jax.infer.pixels import options
from lavit_jax.infer.presets import rules
from lavit_jax.infer.tasks import image_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lavit(micro_runs):
  return pipeline.LaVIT.load(micro_runs / "model")


@pytest.fixture(scope="module")
def images():
  source = shapes.ShapesSource("held_out", size=8)
  return [source.image(i) for i in range(6)]


def test_tokens_are_one_code_for_each_kept_patch(lavit, images):
  rows = lavit.tokenize(images)
  for row in rows:
    assert row["keep"].shape == (36,)
    assert row["keep"].sum() == len(row["codes"]) >= 1
    assert row["codes"].min() >= 0
    assert row["codes"].max() < lavit.visual.num_codes


def test_one_image_is_tokenized_as_in_a_batch(lavit, images):
  alone = lavit.tokenize(images[2])
  among = lavit.tokenize(images)[2]
  np.testing.assert_array_equal(alone["keep"], among["keep"])
  np.testing.assert_array_equal(alone["codes"], among["codes"])


def test_paths_pil_and_arrays_are_the_same_image(lavit, images, tmp_path):
  path = tmp_path / "scene.png"
  PIL.Image.fromarray(images[0]).save(path)
  forms = [images[0], str(path), path, PIL.Image.open(path)]
  codes = [lavit.tokenize(form)["codes"] for form in forms]
  for other in codes[1:]:
    np.testing.assert_array_equal(codes[0], other)


def test_budget_and_seed_choose_the_selection(lavit, images):
  assert [
    len(row["codes"]) for row in lavit.tokenize(images[:3], budget=5)
  ] == [5, 5, 5]
  one, same = (lavit.tokenize(images[0], seed=1) for _ in range(2))
  np.testing.assert_array_equal(one["keep"], same["keep"])
  others = [lavit.tokenize(images[0], seed=s)["keep"] for s in range(2, 8)]
  assert any((one["keep"] != other).any() for other in others)
  with pytest.raises(errors.UsageError, match="budget=37"):
    lavit.tokenize(images[0], budget=37)
  with pytest.raises(errors.UsageError, match="give one"):
    lavit.tokenize(images[0], budget=3, seed=1)


def test_captions_and_answers_come_one_for_one(lavit, images):
  captions = lavit.caption(images, max_new_tokens=4)
  assert len(captions) == len(images)
  assert lavit.caption(images[1], max_new_tokens=4) == captions[1]
  answers = lavit.answer(images[0], ["how many?", "what color?"])
  assert len(answers) == 2
  with pytest.raises(errors.UsageError, match="6 images and 2 questions"):
    lavit.answer(images, ["how many?", "what color?"])


def test_a_drawing_is_a_function_of_prompt_and_seed(lavit):
  kwargs = dict(steps=2, max_new_tokens=6)
  both = lavit.generate(["a red circle", "a blue ring"], seed=3, **kwargs)
  assert [image.size for image in both] == [(48, 48)] * 2
  alone = lavit.generate("a red circle", seed=3, **kwargs)
  assert np.abs(np.asarray(alone, int) - np.asarray(both[0], int)).max() <= 1
  second = lavit.generate("a blue ring", seed=4, **kwargs)
  assert np.abs(np.asarray(second, int) - np.asarray(both[1], int)).max() <= 1
  other = lavit.write_codes([["a red circle"]], seed=99)[0]
  mine = lavit.write_codes([["a red circle"]], seed=3)[0]
  assert len(mine) != len(other) or (mine != other).any()


def test_several_drawings_of_a_prompt_take_the_next_seeds(lavit):
  kwargs = dict(steps=2, max_new_tokens=6)
  told = []
  both = lavit.generate(
    ["a red circle", "a blue ring"],
    count=2,
    seed=3,
    progress=lambda *now: told.append(now),
    **kwargs,
  )
  assert [len(row) for row in both] == [2, 2]
  assert told == [(1, 2), (2, 2)]
  (alone,) = lavit.generate(["a blue ring"], seed=6, **kwargs)
  difference = np.asarray(alone, int) - np.asarray(both[1][1], int)
  assert np.abs(difference).max() <= 1
  with pytest.raises(errors.UsageError, match="count=0"):
    lavit.generate("x", count=0)


@pytest.mark.parametrize(
  ("method", "configs"),
  [
    ("caption", [rules.TextGenerationConfig]),
    ("answer", [rules.TextGenerationConfig]),
    ("write", [rules.TextGenerationConfig]),
    ("write_codes", [rules.ImageGenerationConfig]),
    ("draw_codes", [options.PixelOptions]),
    ("reconstruct", [options.PixelOptions]),
    ("generate", [rules.ImageGenerationConfig, options.PixelOptions]),
    ("synthesize", [rules.ImageGenerationConfig, options.PixelOptions]),
    ("synthesize_batch", [rules.ImageGenerationConfig, options.PixelOptions]),
  ],
)
def test_every_option_is_an_argument_whose_default_is_the_preset_s(
  method, configs
):
  """Which an editor shows; `None` leaves it to the preset."""
  arguments = inspect.signature(getattr(pipeline.LaVIT, method)).parameters
  for config in configs:
    for field in dataclasses.fields(config):
      assert arguments[field.name].default is None
  kinds = {argument.kind for argument in arguments.values()}
  assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_options_reach_what_generates(lavit, monkeypatch):
  configs = []

  def write(prompter, inputs, *rest, **unused):
    configs.extend(x for x in rest if dataclasses.is_dataclass(x))
    return [np.array([1])] * len(inputs)

  def decode(decoder, visual, codes, seed, settings, **unused):
    configs.append(settings)
    return [np.zeros((4, 4, 3))] * len(codes)

  monkeypatch.setattr(image_tasks.image_generation, "write", write)
  monkeypatch.setattr(image_tasks.decoders, "decode", decode)
  for call in (
    functools.partial(lavit.generate, "a ring"),
    functools.partial(lavit.synthesize, ["a ring"]),
    functools.partial(lavit.synthesize_batch, [["a ring"]]),
    functools.partial(lavit.synthesize_batch, ["a ring"]),
  ):
    call(top_k=3, guidance_scale=5.0, steps=7, ratio="1:1")
    tokens, pixels = configs
    assert (tokens.top_k, tokens.mixed_guidance_scale) == (3, 5.0)
    assert tokens.temperature == lavit.rules.draw.temperature
    assert (pixels.steps, pixels.ratio, pixels.solver) == (7, "1:1", "ddim")
    configs.clear()


def test_an_unknown_argument_is_named(lavit):
  with pytest.raises(TypeError, match="guidance_scales"):
    lavit.generate("x", guidance_scales=3.0)
  with pytest.raises(TypeError, match="max_batches"):
    pipeline.LaVIT.load("tiny", max_batches=3)


def test_on_a_cpu_the_layers_of_every_network_are_one_loop():
  lavit = pipeline.LaVIT.load("tiny")
  meta = checkpoints.read_meta(lavit.directory, "encoder")
  assert meta["vit"]["unroll"] > 1
  config = lavit.visual.config
  networks = (
    config.vit,
    config.merger,
    config.decoder,
    lavit._llm.model.config,
  )
  assert [network.unroll for network in networks] == [1] * 4


def test_opening_a_model_imports_no_kernels_and_nothing_of_training():
  code = (
    "import sys; from lavit_jax.infer import pipeline\n"
    "heavy = {'grain', 'optax', 'tensorflow_datasets'} & set(sys.modules)\n"
    "heavy |= {n for n in sys.modules if 'splash_attention' in n}\n"
    "assert not heavy, heavy"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True)
  assert done.returncode == 0, done.stderr.decode()


def test_codes_written_are_codes(lavit):
  for codes in lavit.write_codes([["a red circle"], ["a ring"]], seed=5):
    assert 1 <= len(codes) <= 36
    assert codes.min() >= 0
    assert codes.max() < lavit.visual.num_codes


def test_images_and_text_mix_in_a_prompt(lavit, images):
  drawn = lavit.synthesize(
    [images[0], "make the circle red", images[1]], steps=2
  )
  assert drawn.size == (48, 48)


def test_the_continuous_tokens_of_a_prompt_are_read(lavit, images):
  """Another image in the prompt changes what comes out."""
  prompter = lavit._prompter
  rows = [
    prompter.rows([prompter.parse([image, "describe"])], form="continuous")
    for image in images[:2]
  ]
  for prompt in (prompter.padded(row, 8) for row in rows):
    kept = prompt["use_embeds"][0]
    assert kept.any()
    assert np.abs(prompt["embeds"][0][kept]).max() > 0
    assert (prompt["embeds"][0][~kept] == 0).all()
    assert not (kept & ~prompt["mask"][0]).any()


def test_bad_input_is_named(lavit, images, tmp_path):
  with pytest.raises(image_io.ImageError, match=r"nothing\.png"):
    lavit.caption(tmp_path / "nothing.png")
  with pytest.raises(errors.UsageError, match="No image"):
    lavit.tokenize([])
  with pytest.raises(errors.UsageError, match="empty"):
    lavit.synthesize([])
  with pytest.raises(errors.UsageError, match="tokens long"):
    lavit.generate("red circle " * 2000)
  with pytest.raises(errors.UsageError, match="visual tokens"):
    lavit.draw_codes([np.zeros(0, np.int32)])
  with pytest.raises(errors.UsageError, match="codes run from 0"):
    lavit.draw_codes([np.array([10_000])])


def test_a_missing_model_says_what_to_give(tmp_path):
  with pytest.raises(errors.CheckpointError, match="no model directory"):
    pipeline.LaVIT.load(tmp_path)


def test_info_lists_parts_and_tasks(lavit):
  info = lavit.info()
  assert list(info["parts"]) == ["encoder", "tokenizer", "pixels", "llm"]
  assert all(info["tasks"].values())
