"""What tests of commands share."""

import pytest
from PIL import Image

from lavit_jax.commands import common, read
from lavit_jax.core import compiled_programs
from tests.commands import fakes


@pytest.fixture
def nothing_kept(monkeypatch):
  """No command changes how this process compiles, or keeps programs."""
  monkeypatch.setattr(compiled_programs, "keep", lambda **unused: None)
  monkeypatch.setattr(compiled_programs, "keep_none", lambda: None)
  monkeypatch.setattr(compiled_programs, "compile_quickly", lambda: None)


@pytest.fixture
def model(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("LAVIT_DEBUG", raising=False)
  monkeypatch.setattr(common, "note_scenes", lambda *unused: None)
  for i, name in enumerate(("a.png", "b c.png")):
    Image.new("RGB", (8, 8), (0, 0, 10 * i)).save(tmp_path / name)
  model = fakes.Model()
  fakes.stand_in(
    monkeypatch,
    "pipeline",
    common,
    read,
    LaVIT=model,
    resolve="resolved {}".format,
  )
  return model
