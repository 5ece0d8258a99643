import pathlib

import numpy as np
import pytest

from lavit_jax.data import examples
from tests.data import fakes


def test_vqa_learns_only_the_answer():
  example = examples.vqa("k", 3, "What color?", "red")
  assert [p.weight for p in example.parts] == [0.0, 0.0, 4.0]
  assert example.parts[1].text == "Question: What color? Answer:"
  assert not example.parts[0].write


def test_a_dialogue_learns_every_answer():
  turns = [("What color?", "red"), ("How many?", "2")]
  example = examples.dialogue("k", 3, turns)
  assert example.task == "vqa"
  assert [p.weight for p in example.parts] == [0.0, 0.0, 4.0, 0.0, 4.0]
  assert example.parts[3].text == "Question: How many? Answer:"
  assert example.parts[4].text == " 2"


def test_edit_reads_the_first_image_and_writes_the_second():
  first, _, second = examples.edit("k", 3, "make it red", 4).parts
  assert (first.image, first.write, second.image, second.write) == (
    3,
    False,
    4,
    True,
  )


_PROTOCOLS = """
from lavit_jax.data import examples, sequences
from lavit_jax.data.caches import codes
from lavit_jax.data.sources import (
  filtered, jsonl, mixed, prepared, shapes, tfds, webdataset
)
from lavit_jax.data.sources.tables import hf, json_lines, parquet
from tests.data import fakes

def check(
  shapes_source: shapes.ShapesSource,
  jsonl_source: jsonl.JsonlSource,
  tfds_source: tfds.TfdsSource,
  tars: webdataset.WebDatasetSource,
  tables: parquet.ParquetSource,
  folder: hf.HfSource,
  lines: json_lines.JsonLinesSource,
  written: prepared.PreparedSource,
  mixture: mixed.MixedSource,
  kept: filtered.FilteredSource,
  fake_source: fakes.Source,
  cache: codes.CodeCache,
  fake_cache: fakes.Cache,
) -> None:
  sources: list[examples.Source]
  sources = [shapes_source, jsonl_source, tfds_source, tars, fake_source]
  sources += [tables, folder, lines, written, mixture, kept]
  encoded: list[examples.HasEncodedImages] = [jsonl_source, tfds_source, tars]
  encoded += [tables, folder, mixture, kept]
  stored: list[examples.HasStorage] = [tfds_source, tars, tables, folder]
  contents: list[examples.HasContents] = [tfds_source, tars, tables, folder]
  contents += [mixture, kept]
  fingerprints: list[examples.HasFingerprint] = [tars, tables, folder, mixture]
  fields: list[examples.HasFields] = [tars, tables, folder]
  usable: list[examples.HasUsable] = [mixture, kept]
  caches: list[sequences.Codes] = [cache, fake_cache]
"""


_WRONG = "wrong: examples.Source = codes.Meta('', '', 1, 1, 1)"


def test_all_sources_and_caches_have_the_signatures_of_their_protocols(
  tmp_path,
):
  """Mypy finds nothing but one error that is put there.

  By the project's own configuration and cache, so that it reads anew only what
  has changed since mypy ran last.
  """
  api = pytest.importorskip("mypy.api")
  (tmp_path / "check.py").write_text(_PROTOCOLS + _WRONG)
  root = pathlib.Path(__file__).parents[2]
  options = ["--config-file", str(root / "pyproject.toml")]
  options += ["--cache-dir", str(root / ".mypy_cache")]
  out, _, _ = api.run([*options, str(tmp_path / "check.py")])
  found = [line for line in out.splitlines() if "check.py" in line]
  assert len(found) == 1, out  # of other files mypy itself tells
  assert 'variable has type "Source"' in found[0]


def test_the_fake_source_is_a_source():
  assert isinstance(fakes.Source({}), examples.Source)


def test_the_fingerprint_depends_on_number_size_and_order_of_images():
  source = fakes.Source({})
  same, fewer, larger = fakes.Source({}), fakes.Source({}, 19), fakes.Source({})
  larger.image_size = 8
  other = fakes.Source({})
  other.image_key = lambda i: f"image{other.num_images - i}"
  prints = [examples.fingerprint(s) for s in (source, fewer, larger, other)]
  assert examples.fingerprint(same) == prints[0]
  assert len(set(prints)) == 4
  assert np.all([len(p) == 32 for p in prints])
