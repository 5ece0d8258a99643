"""The house's rules of importing hold; docs/import_map.py states them."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def import_map():
  path = ROOT / "docs" / "import_map.py"
  spec = importlib.util.spec_from_file_location("import_map", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_no_rule_is_broken(import_map):
  assert import_map.broken() == []


def _house(tmp_path, **files):
  for name, text in files.items():
    path = tmp_path / "lavit_jax" / (name.replace("__", "/") + ".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return tmp_path


@pytest.mark.parametrize(
  ("files", "said"),
  [
    (
      {
        "core__a": "from lavit_jax.core import b",
        "core__b": "import lavit_jax.core.a",
      },
      [
        "circle of modules: lavit_jax.core.a lavit_jax.core.b",
        "circle in lavit_jax.core: a b",
      ],
    ),
    (
      {"core__a": "from lavit_jax.train import b", "train__b": ""},
      ["core imports train, which is not on a lower floor"],
    ),
    (
      {"models__a": "from lavit_jax.data import b", "data__b": ""},
      ["models imports data, which is not on a lower floor"],
    ),
    (
      {"new__a": "from lavit_jax.data import b", "data__b": ""},
      ["new or data is on no floor: add it to LAYERS"],
    ),
    (
      {"core__a": "def f():\n  import os\n  import torch  # optional extra"},
      ["lavit_jax.core.a: line 2 imports in a function: import os"],
    ),
    (
      {"core__a": "def f():\n  def g():\n    import os  # optional extra"},
      [
        "lavit_jax.core.a: line 3 imports in a function:"
        " import os  # optional extra"
      ],
    ),
    (
      {"core__a": "from . import b", "core__b": "from lavit_jax import LaVIT"},
      [
        "lavit_jax.core.a: line 1 imports relatively: give the whole name",
        "lavit_jax.core.b: line 1 imports from lavit_jax itself",
      ],
    ),
    (
      {"core__a": "import lavit_jax", "core__b": "import tests.micro"},
      [
        "lavit_jax.core.a: line 1 imports lavit_jax itself",
        "lavit_jax.core.b: line 1 imports tests, which is not installed",
      ],
    ),
    (
      {f"core__m{i:02}": "" for i in range(13)},
      [
        "lavit_jax.core has 13 entries, more than 12: "
        + " ".join(f"m{i:02}" for i in range(13))
      ],
    ),
    (
      {
        "core__a__x": "from lavit_jax.core.b import y",
        "core__b__y": "",
        "core__b__z": "from lavit_jax.core.a import w",
        "core__a__w": "",
      },
      ["circle in lavit_jax.core: a b"],
    ),
  ],
)
def test_each_rule_can_be_broken(import_map, tmp_path, files, said):
  assert import_map.broken(_house(tmp_path, **files)) == said


def test_the_page_shows_the_layers_that_are_checked(import_map):
  page = (ROOT / "docs" / "architecture.md").read_text()
  block = page.split("## Layers")[1].split("```text")[1].split("```")[0]
  shown = [re.split(r" {4,}", line)[0] for line in block.strip().splitlines()]
  assert tuple(tuple(line.split()) for line in shown) == import_map.LAYERS
