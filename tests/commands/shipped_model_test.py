"""Commands on the shipped model itself: class LaVIT takes what they give it.

The networks are replaced, since nothing here depends on what they compute;
`tests/jobs/quickstart_test.py` runs them.
"""

import json

import numpy as np
import pytest
from PIL import Image

from lavit_jax.infer import text_generation
from lavit_jax.infer.loading import visual
from lavit_jax.infer.tasks import image_tasks, text_tasks
from tests.commands import fakes

pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture
def files(monkeypatch, tmp_path):
  """Works in a folder with images and visual tokens; replaces networks."""
  monkeypatch.chdir(tmp_path)
  Image.new("RGB", (48, 48), (9, 90, 9)).save("a.png")
  (tmp_path / "codes.json").write_text('[{"image": "a", "codes": [5, 6]}]')

  def write_texts(prompter, inputs, config, *, count=1, **unused):
    row = [text_generation.Text("a square", -1.0)] * count
    return [row for prompt in inputs if prompter.parse(prompt)]

  def write_codes(prompter, inputs, *unused, **unused_options):
    return [np.array([5, 6]) for prompt in inputs if prompter.parse(prompt)]

  def decode(decoder, visual, codes, *unused, progress, **unused_options):
    progress(1, 1)
    return [np.zeros((48, 48, 3)) for _ in codes]

  def tokenize(self, batch, *, count, **unused):
    keep = np.arange(36) < 2
    return [{"keep": keep, "codes": np.array([5, 6])} for _ in batch[:count]]

  monkeypatch.setattr(text_tasks.text_generation, "write", write_texts)
  monkeypatch.setattr(image_tasks.image_generation, "write", write_codes)
  monkeypatch.setattr(image_tasks.decoders, "decode", decode)
  monkeypatch.setattr(visual.VisualTokenizer, "tokenize", tokenize)


@pytest.mark.parametrize(
  "argv",
  [
    ("caption", "a.png", "a.png"),
    ("caption", "a.png", "--prompt", "a", "--count", "2"),
    ("answer", "a.png", "how many?", "which colour?"),
    ("tokenize", "a.png"),
    ("generate", "a ring", "a star", "--count", "2"),
    ("generate", "a ring", "--ids", "--negative", "a star"),
    ("synthesize", "a.png", "make it red", "--steps", "3"),
    ("reconstruct", "a.png"),
    ("reconstruct", "--codes", "codes.json"),
    ("info",),
  ],
  ids=" ".join,
)
def test_a_command_works_on_the_shipped_model(files, argv, capsys):
  status, out, err = fakes.run(capsys, *argv, "--json")
  assert status == 0, err
  rows = json.loads(out)
  assert rows
  for row in rows if isinstance(rows, list) else []:
    if "file" in row:
      assert Image.open(row["file"]).size == (48, 48)
