"""A model that answers at once, and ways to run a command on it."""

import types

import numpy as np
from PIL import Image

from lavit_jax.commands import main
from lavit_jax.infer import text_generation

CONFIG = """
import ml_collections

def get_config():
  cfg = ml_collections.ConfigDict()
  cfg.steps = 3
  cfg.batch_size = 8
  cfg.mesh = dict(data=-1)
  cfg.model = dict(width=16)
  return cfg
"""


class Model:
  """Records the last call; draws what it was asked for."""

  def __init__(self):
    self.loaded = self.how = self.called = None
    self.num_parameters = 10_000_000

  def load(self, name, *, dtype, quantize, check_safety=True):
    self.loaded, self.how = name, (dtype, quantize)
    self.checked = check_safety
    return self

  def _record(self, name, *args, **options):
    self.called = (name, *args, options)

  def tokenize(self, images, **options):
    self._record("tokenize", images, **options)
    keep = np.array([True, False, False, True])
    return [{"keep": keep, "codes": np.array([5, 301])} for _ in images]

  def caption(self, images, **options):
    self._record("caption", images, **options)
    return [f"an image {i}" for i, _ in enumerate(images)]

  def answer(self, images, questions, **options):
    self._record("answer", images, questions, **options)
    return [question[:1] for question in questions]

  def write(self, prompts, *, count, **options):
    self._record("write", prompts, count, **options)
    return [
      [text_generation.Text(f"text {i}", 1.0 - i) for i in range(count)]
      for _ in prompts
    ]

  def write_codes(self, prompts, **options):
    self._record("write_codes", prompts, **options)
    return [np.array([5, 301 + i]) for i in range(len(prompts))]

  def synthesize_batch(self, prompts, *, progress, **options):
    progress(1, 2)
    self._record("synthesize_batch", prompts, **options)
    drawn = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(prompts))]
    drawn[-1].info["withheld"] = "nude" in prompts
    return drawn

  def reconstruct(self, images, *, progress, **options):
    progress(2, 2)
    self._record("reconstruct", images, **options)
    return [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(images))]

  def draw_codes(self, codes, *, progress, **options):
    self._record("draw_codes", codes, **options)
    return [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(codes))]

  def info(self):
    need = {"missing": [], "weights_bytes": 14_200_000_000, "cache_bytes": 0}
    return {
      "parts": {"llm": {"parameters": 3}},
      "tasks": ["caption", "answer"],
      "memory": {"caption": need},
    }


def stand_in(monkeypatch, name, *commands, **members):
  """Gives command modules another module under the name of an import."""
  module = types.SimpleNamespace(**members)
  for command in commands:
    monkeypatch.setattr(command, name, module)


def run(capsys, *argv):
  status = main.main(argv)
  out, err = capsys.readouterr()
  return status, out, err


def failed(capsys, *argv):
  """The paragraph of a command that must fail as the user's mistake."""
  status, out, err = run(capsys, *argv)
  assert status == 2
  assert out == ""
  assert err.count("\n") == 1
  assert err.startswith("lavit: ")
  return err


def raising(error):
  def fail(*unused, **unused_options):
    raise error

  return fail
