"""Recordings with other lengths, beams and sizes than in tests/golden."""

import json
import os
import pathlib

import numpy as np
import pytest

pytest.importorskip("torch", reason="imports PyTorch files")

from lavit_jax.infer.decoding import beam
from lavit_jax.infer.presets import official
from lavit_jax.port import importing
from lavit_jax.port.verify import recorded_networks, recorded_search, verify
from tests.port import sources

pytestmark = pytest.mark.slow

IMAGES = 2
END, BASE = 2, 9.0  # </s>, and what all hidden states have in common


def failed(model, folder):
  rows = verify.run(model, folder)
  assert rows
  return {(r.array, r.note) for r in rows if r.status != "pass"}


def save(folder, name, arrays, described):
  folder.mkdir(exist_ok=True)
  np.savez(folder / f"{name}.npz", **arrays)
  (folder / f"{name}.json").write_text(json.dumps(described))
  return folder


# A checkpoint of other sizes ------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """Returns (directory, parts) of a model whose texts and images end early."""
  root = tmp_path_factory.mktemp("small")
  state = sources.state()
  weights = state[sources.LLM]
  weights["model.embed_tokens.weight"][:, 0] += BASE
  weights["model.norm.weight"][0] = 1.0
  head = weights["lm_head.weight"]
  head[512:32000, 0] = -BASE  # ids that tokenizer.model has no words for
  for end, height in ((END, BASE), (32001, 1.1 * BASE)):
    head[end] = 0
    head[end, 0] = height
  source = sources.write(root / "source", state)
  importing.run(source, root / "model", quiet=True)
  return root / "model", verify.Parts(root / "model")


def random_inputs(model):
  """Returns pixels and noise of a few images."""
  rng = np.random.default_rng(0)
  side, patches = model.config.vit.image_size, model.config.num_patches
  pixels = rng.standard_normal((IMAGES, 3, side, side), np.float32)
  gumbel = -np.log(rng.exponential(size=(IMAGES, patches, 2)))
  return {"in_pixels": pixels, "in_gumbel": gumbel.astype(np.float32)}


def traced_search(model, rows, **settings):
  """Returns a traced search, cut after the step in which all prompts end."""
  found = beam.beam_search(
    model.llm,
    model.language["llm"],
    prompt=model.prompt(rows),
    suppress=official.suppress_for_text(model.vocab),
    eos_id=END,
    pad_id=END,
    trace=True,
    **official.CAPTION | settings,
  )
  done = np.asarray(found.step_done)
  steps = int((~done.all(1)).sum())
  length = int(found.lengths[:, 0].max())
  tokens = np.asarray(found.tokens)[:, 0, :length]
  arrays = {
    "sequences": np.insert(tokens, 0, 1, axis=1),
    "sequences_scores": found.scores[:, 0],
    "step_done": done[:steps].astype(int),
  }
  for name in ("scores", "tokens", "beams"):
    arrays[f"step_{name}"] = np.asarray(getattr(found, f"step_{name}"))[:steps]
  return {f"out_{name}": np.array(value) for name, value in arrays.items()}


def recorded_caption(model, **settings):
  """Returns arrays and JSON of captions that were searched with settings."""
  arrays = random_inputs(model)
  rows = model.reading_rows(
    arrays["in_pixels"].transpose(0, 2, 3, 1), arrays["in_gumbel"]
  )
  arrays |= traced_search(model, rows, **settings)
  words = [
    model.text.decode([int(i) for i in row[1:]])
    for row in arrays["out_sequences"]
  ]
  row = {"prompt": "", "decoded": words}
  row["caption"] = [official.clean_caption(text) for text in words]
  return arrays, {"caption": row}


@pytest.mark.parametrize(
  ("settings", "steps"),
  [
    ({}, range(9, 36)),  # all end before the longest length
    ({"max_new_tokens": 5}, [5]),
    ({"num_beams": 3, "max_new_tokens": 12}, range(1, 13)),
  ],
)
def test_a_search_runs_with_the_recorded_length_and_beams(
  small, tmp_path, settings, steps
):
  directory, parts = small
  settings = {"min_new_tokens": 8} | settings
  settings["min_new_tokens"] = min(8, settings.get("max_new_tokens", 8))
  arrays, described = recorded_caption(parts.model, **settings)
  assert len(arrays["out_step_scores"]) in steps
  beams = settings.get("num_beams", 2)
  assert arrays["out_step_scores"].shape[2] == 2 * beams
  folder = save(tmp_path / "r", "caption", arrays, described)
  assert failed(directory, folder) == set()
  arrays["out_step_tokens"][2, 0, 0] += 1  # one id of one step
  save(folder, "caption", arrays, described)
  assert {array for array, _ in failed(directory, folder)} == {
    "out_step_tokens"
  }


def test_settings_that_no_array_shows_are_read_from_the_json(small, tmp_path):
  directory, parts = small
  arrays, described = recorded_caption(
    parts.model, min_new_tokens=3, length_penalty=0.5
  )
  folder = save(tmp_path / "r", "caption", arrays, described)
  assert failed(directory, folder)
  described["caption"] |= {"min_length": 3, "length_penalty": 0.5}
  save(folder, "caption", arrays, described)
  assert failed(directory, folder) == set()


@pytest.mark.parametrize("longest", [None, 7])
def test_image_ids_are_generated_with_the_recorded_length(
  small, tmp_path, longest
):
  directory, parts = small
  model = parts.model
  prompts = ["a red bird", "a cat"]
  rows = [official.encode(model.text, text) for text in prompts]
  rows = [[*row, model.vocab.image_begin] for row in rows]
  name = "out_sequences_nocfg"
  arrays = {name: np.zeros((2, 1 + (longest or 200)))}
  ids = recorded_search._generate(
    arrays, model, rows, "_nocfg", guidance=1.0, min_new_tokens=20
  )
  ended = (ids == model.vocab.image_end).any(1)
  assert ended.all() == (longest is None)
  length = longest or int((ids == model.vocab.image_end).argmax(1).max())
  arrays = {name: ids[:, : 1 + length]}
  folder = save(tmp_path / "r", "t2i_tokens", arrays, {"prompts": prompts})
  assert failed(directory, folder) == set()
  arrays[name][0, 3] += 1
  save(folder, "t2i_tokens", arrays, {"prompts": prompts})
  assert {array for array, _ in failed(directory, folder)} == {name}


def test_decoders_without_recordings_are_not_needed(tmp_path):
  source = sources.write(tmp_path / "source")
  importing.run(source, tmp_path / "model", only=["lowres"], quiet=True)
  rng = np.random.default_rng(1)
  arrays = {
    "in_quantized": rng.standard_normal((5, 6), np.float32),
    "in_token_nums": np.array([2, 3]),
  }
  parts = verify.Parts(tmp_path / "model")
  arrays["out_lowres"] = np.zeros(())
  made = recorded_networks.CHECKS["decoder"](arrays, parts)
  arrays["out_lowres"] = np.asarray(made["out_lowres"][0])
  (tmp_path / "r").mkdir()
  np.savez(tmp_path / "r" / "decoder.npz", **arrays)
  assert failed(tmp_path / "model", tmp_path / "r") == set()


# What the official code has recorded, cut -----------------------------------


@pytest.fixture(scope="module")
def golden():
  if not os.environ.get("LAVIT_SHARED"):
    pytest.skip("needs LAVIT_SHARED, the folder with the recordings")
  return pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden" / "a"


@pytest.fixture(scope="module")
def imported(golden, tmp_path_factory):
  directory = tmp_path_factory.mktemp("golden") / "model"
  only = ["encoder", "tokenizer", "llm"]
  importing.run(golden / "checkpoint", directory, only=only, quiet=True)
  return directory


def one_image(golden):
  """Returns the second image of caption.npz alone: it ends after 22 steps."""
  with np.load(golden / "caption.npz") as file:
    arrays = {
      n: a for n, a in file.items() if not n.endswith(("prompt", "ids"))
    }
  described = json.loads((golden / "caption.json").read_text("utf-8"))[
    "caption"
  ]
  described |= {name: described[name][1:] for name in ("decoded", "caption")}
  steps = int((arrays["out_step_done"][:, 1] == 0).sum())
  used = arrays["out_attention_mask"][1].astype(bool)
  cut = {}
  for name, array in arrays.items():
    if name.startswith("out_step_"):
      cut[name] = array[:steps, 1:]
    elif name in ("out_sequences", "out_sequences_scores"):
      cut[name] = array[1:]
    elif name.startswith("out_"):  # prompts, shorter by their padding
      cut[name] = array[1:, used]
    elif name.startswith("in_"):
      cut[name] = array[1:]
  last = 1 + np.flatnonzero(cut["out_sequences"][0] != END).max()
  cut["out_sequences"] = cut["out_sequences"][:, : last + 1]
  return cut, {"caption": described}, steps


@pytest.mark.shared
@pytest.mark.slow
def test_an_image_that_ended_early_passes_alone(golden, imported, tmp_path):
  arrays, described, steps = one_image(golden)
  assert steps == 22
  folder = save(tmp_path / "r", "caption", arrays, described)
  assert failed(imported, folder) == set()


# Kept: the drawings without guidance; the others are of the same code.
LEFT = ("gumbel", "cols", "ids", "mask", "_mm", "sequences", "scores5")


@pytest.mark.shared
@pytest.mark.slow
def test_image_ids_that_were_cut_earlier_pass(golden, imported, tmp_path):
  with np.load(golden / "t2i_tokens.npz") as file:
    arrays = dict(file)
  arrays = {n: a for n, a in arrays.items() if n.endswith(LEFT)}
  for name in [n for n in arrays if n.startswith("out_sequences")]:
    arrays[name] = arrays[name][:, :13]
  for name in [n for n in arrays if n.startswith("out_scores5")]:
    arrays[name] = arrays[name][:3]
  described = json.loads((golden / "t2i_tokens.json").read_text("utf-8"))
  folder = save(tmp_path / "r", "t2i_tokens", arrays, described)
  os.symlink(golden / "preprocess", folder / "preprocess")
  assert failed(imported, folder) == set()


@pytest.mark.shared
def test_defaults_here_are_those_of_the_official_classes(golden):
  described = json.loads((golden / "t2i_tokens.json").read_text("utf-8"))
  assert recorded_search.image_defaults({}) == {
    name: described["mm_defaults"][name]
    for name in ("min_length", "guidance_scale_for_llm")
  }
