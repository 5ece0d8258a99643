import fnmatch
import http.server
import threading
import types

import pytest

from lavit_jax.core import errors
from lavit_jax.port.formats import official_layout
from lavit_jax.port.reading import hub

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
  """Returns the files of the release that the patterns of some parts match."""
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
  assert not asked(list(official_layout.PARTS)) & set(PIXELS)
  assert asked(["lowres_pixels"]) == {
    "language_model/config.json",
    "pixel_decoding/unet/diffusion_pytorch_model.bin",
  }


def test_files_of_a_plain_llama_are_downloaded_too():
  patterns = hub.patterns(None)
  for file in (
    "config.json",
    "tokenizer.model",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
  ):
    assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def test_a_pipeline_of_stable_diffusion_is_downloaded_too():
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
  """Returns the requests to a hub that has the files in `calls.files`."""

  class Calls(list):
    files = ()

  calls = Calls()

  def download(repo, allow_patterns, ignore_patterns, local_files_only):
    assert local_files_only == (not calls.files)
    calls.append((repo, allow_patterns, ignore_patterns))
    return str(tmp_path)

  def told(self, repo, timeout):
    assert 0 < timeout <= 10
    if not calls.files:
      raise ConnectionError("no route to host")
    files = [types.SimpleNamespace(rfilename=name) for name in calls.files]
    return types.SimpleNamespace(siblings=files)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.setattr(huggingface_hub.HfApi, "model_info", told)
  return calls


def test_an_id_is_resolved_from_the_cache_without_a_network(calls, tmp_path):
  assert hub.resolve("rain1011/LaVIT-7B-v2", ["encoder"]) == tmp_path
  assert calls == [("rain1011/LaVIT-7B-v2", hub.patterns(["encoder"]), [])]


def test_of_weights_in_two_forms_only_one_is_downloaded(calls):
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


class Requests(http.server.BaseHTTPRequestHandler):
  """Answers every request with one status, and records it."""

  def do_GET(self):
    self.server.asked.append(self.path)
    if self.server.status:
      self.send_response(self.server.status)
      self.send_header("Content-Length", "0")
      self.end_headers()
    self.close_connection = True

  do_HEAD = do_GET

  def log_message(self, *unused):
    pass


@pytest.fixture
def server(tmp_path, monkeypatch):
  """Starts a hub on this machine, with an empty cache."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Requests)
  server.asked, server.status = [], None
  threading.Thread(target=server.serve_forever, daemon=True).start()
  constants = huggingface_hub.constants
  place = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setattr(constants, "ENDPOINT", place)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  yield server
  server.shutdown()
  server.server_close()


@pytest.mark.parametrize("status", [None, 404, 503])
def test_a_failing_hub_gets_one_request_and_one_error(
  server, status, capfd, caplog
):
  server.status = status  # None: the connection is cut
  with pytest.raises(errors.CheckpointError) as caught:
    hub.resolve("owner/name")
  asked = [path for path in server.asked if "owner" in path]
  assert asked == ["/api/models/owner/name"]
  message = str(caught.value)
  assert "owner/name is no local path and could not be downloaded" in message
  assert "the same command again" in message
  assert (capfd.readouterr().err, caplog.records) == ("", [])


def test_without_a_network_files_in_the_cache_are_used(server, tmp_path):
  folder = tmp_path / "hub/models--owner--name"
  (folder / "snapshots/abc").mkdir(parents=True)
  (folder / "refs").mkdir()
  (folder / "refs/main").write_text("abc")
  assert hub.resolve("owner/name") == folder / "snapshots/abc"
