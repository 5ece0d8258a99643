import fnmatch

import pytest

from lavit_jax import errors
from lavit_jax.port import hub, official

huggingface_hub = pytest.importorskip(
  "huggingface_hub", reason="downloads from the hub"
)

RELEASE = (
  "language_model/config.json",
  "language_model/pytorch_model-00001-of-00002.bin",
  "language_model/tokenizer.model",
  "language_model/visual_weight.bin",
  "visual_tokenizer/eva_vitg_psz14.bin",
  "visual_tokenizer/highres_tokenizer_decoder.bin",
  "visual_tokenizer/tokenizer_decoder.bin",
  "visual_tokenizer/tokenizer_encoder.bin",
)
PIXELS = (
  "pixel_decoding/unet/diffusion_pytorch_model.bin",
  "highres_pixel_decoding/vae/diffusion_pytorch_model.safetensors",
)


def asked(only):
  """Files of the release that the patterns of some parts match."""
  patterns = hub.patterns(only)
  return {
    file
    for file in RELEASE + PIXELS
    if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
  }


def test_only_what_the_parts_need_is_downloaded():
  assert asked(None) == set(RELEASE + PIXELS)
  assert asked(["lowres"]) == {
    "language_model/config.json",  # every .json, they are small
    "visual_tokenizer/tokenizer_decoder.bin",
  }
  assert "visual_tokenizer/highres_tokenizer_decoder.bin" not in asked(["llm"])
  assert "language_model/pytorch_model-00001-of-00002.bin" in asked(["llm"])
  assert not asked(list(official.PARTS)) & set(PIXELS)
  assert asked(["lowres_pixels"]) == {
    "language_model/config.json",
    "pixel_decoding/unet/diffusion_pytorch_model.bin",
  }


def test_files_of_a_plain_llama_are_asked_for_too():
  patterns = hub.patterns(None)
  for file in (
    "config.json",
    "tokenizer.model",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
  ):
    assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def test_a_pipeline_of_stable_diffusion_is_asked_for_too():
  patterns = hub.patterns(["lowres_pixels"])
  for file in (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "scheduler/scheduler_config.json",
  ):
    assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
  for file in ("v1-5-pruned.ckpt", "text_encoder/model.safetensors"):
    assert not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


@pytest.fixture
def calls(monkeypatch, tmp_path):
  """What is asked of a hub that has the files in `calls.files`."""

  class Calls(list):
    files = ()

  calls = Calls()

  def download(repo, allow_patterns, ignore_patterns):
    calls.append((repo, allow_patterns, ignore_patterns))
    return str(tmp_path)

  def listed(self, repo):
    if not calls.files:
      raise ConnectionError("no route to host")
    return list(calls.files)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
  return calls


def test_an_id_is_downloaded_also_where_only_the_cache_is(calls, tmp_path):
  assert hub.resolve("rain1011/LaVIT-7B-v2", ["encoder"]) == tmp_path
  assert calls == [("rain1011/LaVIT-7B-v2", hub.patterns(["encoder"]), [])]


def test_weights_that_are_there_twice_are_downloaded_once(calls):
  name = "diffusion_pytorch_model"
  read = {
    f"unet/{name}.bin",
    f"vae/{name}.safetensors",
    f"pixel_decoding/unet/{name}.fp16.bin",
    f"highres_pixel_decoding/unet/{name}.safetensors.index.json",
    f"highres_pixel_decoding/unet/{name}-00001-of-00002.safetensors",
  }
  left = {
    f"unet/{name}.safetensors",
    f"unet/{name}.non_ema.bin",
    f"unet/{name}.fp16.bin",
    f"vae/{name}.bin",
    f"pixel_decoding/unet/{name}.fp16.safetensors",
    f"highres_pixel_decoding/unet/{name}.fp16-00001-of-00002.safetensors",
    f"highres_pixel_decoding/unet/{name}.fp16.safetensors",
  }
  calls.files = sorted(read | left | {"README.md", "text_encoder/model.bin"})
  hub.resolve("owner/name")
  ((_, _, ignored),) = calls
  assert set(ignored) == left


def test_a_path_is_never_downloaded(monkeypatch, tmp_path):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "owner" / "name").mkdir(parents=True)
  assert hub.resolve("owner/name").is_dir()
  for wrong in ("./owner/other", "/no/where", "justaname", "a/b/c"):
    with pytest.raises(errors.UsageError, match="no such file"):
      hub.resolve(wrong)


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
  def fail(*args, **kwargs):
    raise ConnectionError("no route to host")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
  with pytest.raises(errors.CheckpointError, match="no route to host"):
    hub.resolve("owner/name")
