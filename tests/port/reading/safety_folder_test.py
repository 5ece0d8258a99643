"""Import, use and export of Stable Diffusion's safety checker."""

import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="writes PyTorch files")
transformers = pytest.importorskip("transformers", reason="makes the checker")
diffusers = pytest.importorskip(
  "diffusers.pipelines.stable_diffusion.safety_checker",
  reason="has the checker's class",
)

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import checkpoints
from lavit_jax.infer.pixels import safety
from lavit_jax.port import exporting, importing
from lavit_jax.port.reading import safety_folder
from lavit_jax.port.tables import safety_names
from tests.port import sources

_FOLDER = "pixel_decoding/safety_checker"
_TOWER = {
  "image_size": 32,
  "patch_size": 8,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def checker():
  """Returns diffusers' checker at small sizes, which withholds light images."""
  config = transformers.CLIPConfig(vision_config=_TOWER, projection_dim=16)
  torch.manual_seed(1)
  model = diffusers.StableDiffusionSafetyChecker(config).eval()
  with torch.no_grad():
    for value in model.parameters():
      value += 0.3 * torch.randn(value.shape)
    model.special_care_embeds_weights.fill_(2.0)
    model.concept_embeds_weights.fill_(2.0)
    dark, light = (_scores(model, _image(c)) for c in (0, 255))
    concept = int((light - dark).argmax())
    middle = (light[concept] + dark[concept]) / 2
    model.concept_embeds_weights[concept] = middle
  return model


def _image(level):
  return Image.new("RGB", (40, 32), (level, level, level))


def _scores(model, image):
  """Returns the cosines of an image with the concepts."""
  seen = image_io.normalize(safety.clip_square(image, 32))
  pixels = torch.from_numpy(seen.transpose(2, 0, 1)[None].copy())
  found = model.visual_projection(model.vision_model(pixels)[1])
  normal = torch.nn.functional.normalize
  return (normal(found) @ normal(model.concept_embeds).T)[0]


@pytest.fixture(params=["safetensors, new names", "bin, old names"])
def source(request, checker, tmp_path):
  """Writes a checkpoint of the checker alone, of either generation."""
  folder = tmp_path / "source" / _FOLDER
  checker.save_pretrained(folder)
  if request.param.startswith("bin"):
    state = checker.state_dict()
    if safety_names.generation(state) != safety_names.GENERATIONS[0]:
      state = {
        k.replace("vision_model.", "vision_model.vision_model.", 1): v
        for k, v in state.items()
      }
    # A counter that transformers wrote then, and that is passed over.
    state[f"{safety_names.GENERATIONS[0]}embeddings.position_ids"] = (
      torch.arange(17)[None]
    )
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
  return tmp_path / "source"


def test_it_is_imported_works_and_is_exported_again(source, checker, tmp_path):
  model = tmp_path / "model"
  importing.run(source, model, quiet=True, only=["safety"])
  assert checkpoints.parts_in(model) == ["safety"]
  given = [_image(0), _image(255), _image(0)]
  found = safety.Checker(model).check(given)
  assert [safety.is_withheld(p) for p in found] == [False, True, False]
  assert not np.asarray(found[1]).any()
  exporting.run(model, tmp_path / "back", format="official", quiet=True)
  here, there = source / _FOLDER, tmp_path / "back" / _FOLDER
  assert sorted(p.name for p in here.iterdir()) == sorted(
    p.name for p in there.iterdir()
  )
  for path in here.iterdir():
    if path.suffix == ".json":
      assert path.read_bytes() == (there / path.name).read_bytes()
  read = diffusers.StableDiffusionSafetyChecker.from_pretrained
  sources.assert_same_state(
    dict(read(there).state_dict()), dict(checker.state_dict())
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"vision_config": _TOWER | {"hidden_act": "gelu"}}, "quick_gelu"),
    ({"vision_config": _TOWER | {"patch_size": 5}}, "multiple of"),
    ({"vision_config": _TOWER | {"hidden_size": 64}}, "wrong shape"),
    ({"projection_dim": "wide"}, "projection_dim is 'wide'"),
    ({"vision_config": _TOWER | {"hidden_size": "32"}}, "hidden_size is '32'"),
    ({"vision_config": _TOWER | {"num_hidden_layers": 1.5}}, "num_hidden_l"),
  ],
)
def test_another_network_is_refused(source, tmp_path, change, message):
  path = source / _FOLDER / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.CheckpointError, match=message):
    importing.run(source, tmp_path / "model", quiet=True, only=["safety"])
  assert not (tmp_path / "model").exists()


_CLIP = {
  "crop_size": {"height": 32, "width": 32},
  "do_center_crop": True,
  "do_convert_rgb": True,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
  "resample": 3,
  "size": {"shortest_edge": 32},
}


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"size": 32, "crop_size": 32},
    {"image_mean": [0.5, 0.5, 0.5]},
    {"image_std": "x"},
    {"resample": 2},
    {"size": {"shortest_edge": 64}},
    {"do_center_crop": False},
    {"rescale_factor": 1 / 255},
    {"rescale_factor": 1.0},
    {"rescale_factor": None},
    {"rescale_factor": "1/255"},
    {"rescale_factor": 10**400},
    {"size": {"shortest_edge": [32]}},
    {"size": [32]},
    {"image_mean": {"red": 0.5}},
    {"image_mean": [10**400] * 3},
  ],
)
def test_images_are_prepared_as_the_checkpoint_says(tmp_path, change):
  file = "feature_extractor/preprocessor_config.json"
  (tmp_path / file).parent.mkdir()
  (tmp_path / file).write_text(json.dumps(_CLIP | change))
  check = lambda: safety_folder._check_images(tmp_path, file, 32)
  fine = ({}, {"size": 32, "crop_size": 32}, {"rescale_factor": 1 / 255})
  if change in fine:
    check()
    return
  (name,) = change
  with pytest.raises(errors.CheckpointError, match=f"{name} is"):
    check()


def test_the_settings_in_the_feature_extractors_folder_are_checked(
  source, tmp_path
):
  folder = source / "pixel_decoding" / "feature_extractor"
  folder.mkdir()
  settings = json.dumps(_CLIP | {"resample": 2})
  (folder / "preprocessor_config.json").write_text(settings)
  with pytest.raises(errors.CheckpointError, match="resample is 2"):
    importing.run(source, tmp_path / "model", quiet=True, only=["safety"])


def test_a_folder_without_files_says_what_is_missing(tmp_path):
  folder = tmp_path / "source" / _FOLDER
  folder.mkdir(parents=True)
  with pytest.raises(errors.CheckpointError, match=r"config\.json is missing"):
    importing.run(tmp_path / "source", tmp_path / "model", only=["safety"])
  folder.rmdir()
  with pytest.raises(errors.CheckpointError, match="safety_checker/config"):
    importing.run(tmp_path / "source", tmp_path / "model", only=["safety"])
  assert safety_folder.find(tmp_path / "source") is None
