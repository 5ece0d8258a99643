import dataclasses
import json
import os
import pathlib
import sys

import numpy as np
import pytest

from lavit_jax.core import errors

pytest.importorskip("torch", reason="writes PyTorch files")

import torch

from lavit_jax.data.sources import shapes
from lavit_jax.infer import pipeline
from lavit_jax.port import importing
from lavit_jax.port.diffusers import config, scheduler_config
from lavit_jax.port.formats import official_layout
from lavit_jax.port.verify import specimen
from tests.golden import load
from tests.port import pixel_sources

pytestmark = pytest.mark.slow


def states(folder):
  """Returns {file: {name: tensor}} of all weights that an import reads."""
  found = {
    path.relative_to(folder).as_posix(): pixel_sources.load(path)
    for path in sorted(folder.rglob("*"))
    if path.suffix in (".bin", ".safetensors")
  }
  uncond = "pixel_decoding/uncond_embeddings.bin"
  return found | {uncond: {"": found[uncond]}}


def described(folder):
  """Returns the parsed JSON files of the pixel decoders, by folder."""
  found = {}
  for name in official_layout.PIXEL_FOLDERS.values():
    for kind, read in (
      ("unet", config.unet_config),
      ("vae", config.vae_config),
    ):
      path = folder / name / kind / "config.json"
      found[f"{name}/{kind}"] = read(json.loads(path.read_text()))
    found[name] = scheduler_config.load(folder / name / "scheduler")
  return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return specimen.write(tmp_path_factory.mktemp("specimen") / "source", seed=3)


@pytest.fixture(scope="module")
def lavit(source, tmp_path_factory):
  model = tmp_path_factory.mktemp("specimen") / "model"
  report = importing.run(source, model, quiet=True)
  assert set(report["parts"]) == set(official_layout.ALL_PARTS) - {"safety"}
  return pipeline.LaVIT.load(model)


def test_names_are_those_of_the_official_release(source):
  """All of them, except those of layers that it does not have."""
  manifest = json.loads((load.ROOT / "manifest.json").read_text())
  manifest = {file.replace("-*", ""): found for file, found in manifest.items()}
  found = {
    file: state
    for file, state in states(source).items()
    if "pixel_decoding" not in file
  }
  assert set(found) == set(manifest)
  for file, state in found.items():
    wanted = {
      name.replace("{i}", str(i))
      for name, (depth, _) in manifest[file].items()
      for i in range(2 if depth else 1)
    }
    assert set(state) == wanted


def test_images_get_different_tokens_and_captions(lavit):
  """Some patches are kept and some are not, so that a demo shows something."""
  scenes = shapes.ShapesSource("held_out", size=4, image_size=56)
  images = [scenes.image(i) for i in range(4)]
  tokens = lavit.tokenize(images)
  assert all(0 < row["keep"].sum() < row["keep"].size for row in tokens)
  assert len({tuple(row["keep"]) for row in tokens}) > 1
  assert len(set(np.concatenate([row["codes"] for row in tokens]))) > 4
  captions = lavit.caption(images, max_new_tokens=8)
  assert len(set(captions)) > 1
  assert all(captions)


def test_different_codes_make_different_images(lavit):
  codes = [np.arange(7), np.arange(100, 112)]
  drawn = lavit.draw_codes(codes, seed=0, steps=2)
  one, two = (np.asarray(image, np.float32) for image in drawn)
  assert one.shape == (32, 32, 3)
  assert one.std() > 5
  assert np.abs(one - two).mean() > 1


def test_weights_depend_on_the_seed_alone(source, tmp_path):
  ours = states(source)
  same = states(specimen.write(tmp_path / "same", seed=3))
  other = states(specimen.write(tmp_path / "other", seed=4))
  for file, state in ours.items():
    for name, tensor in state.items():
      assert torch.equal(tensor, same[file][name])
      assert not torch.equal(tensor, other[file][name])


def test_parts_that_share_names_do_not_share_values(source):
  """The reading branch has its own weights, and so has each decoder."""
  found, files = states(source), official_layout.FILES
  for one, two in (("tokenizer", "overlay"), ("lowres", "highres")):
    one, two = found[files[one]], found[files[two]]
    shared = [n for n in one if n in two and one[n].shape == two[n].shape]
    assert len(shared) >= 40
    assert not any(torch.equal(one[name], two[name]) for name in shared)


def test_a_folder_with_content_is_refused(tmp_path):
  (tmp_path / "mine").write_text("here")
  with pytest.raises(errors.UsageError, match="overwritten"):
    specimen.write(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(errors.UsageError, match=r"lavit_jax\[torch\]"):
    specimen.write(tmp_path / "source")
  assert not list(tmp_path.iterdir())


@pytest.mark.shared
@pytest.mark.skipif(
  not os.environ.get("LAVIT_SHARED"),
  reason="needs LAVIT_SHARED, the folder with the recordings",
)
def test_shapes_and_dtypes_are_those_of_the_recorded_checkpoint(source):
  golden = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden/a/checkpoint"
  ours, theirs = (
    {
      file: {name: (t.shape, t.dtype) for name, t in state.items()}
      for file, state in states(folder).items()
    }
    for folder in (source, golden)
  )
  assert {f: n for f, n in ours.items() if "uncond" not in f} == {
    f: n for f, n in theirs.items() if "uncond" not in f
  }
  made, recorded = described(source), described(golden)
  for name in made:
    if name.endswith("vae"):
      side = {"sample_size": 64}  # no weight depends on it
      made[name] = dataclasses.replace(made[name], **side)
  assert made == recorded
