"""Every format of docs/data.md: into packed batches, and prepared and back."""

import pytest

from lavit_jax.core import vocabulary
from lavit_jax.data import examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.sources import kinds
from lavit_jax.jobs.prepare import job, looks
from tests.data import documented, fakes
from tests.jobs import here

_PATHS = {
  "my.jsonl": {"image_text", "text_image", "edit", "document", "text"},
  "prose/{00..01}.jsonl.gz": {"text"},
  "obelics.parquet": {"document"},
  "mmc4.jsonl": {"document"},
  "llava.json": {"document"},
  "preferences.jsonl": {"document"},
  "bagel.parquet": {"edit"},
  "coco/captions_val2017.json": {"image_text", "text_image"},
  "web/{00000..00001}.tar": {"image_text", "text_image"},
  "tables/train-*.parquet": {"image_text", "text_image"},
  "my_dataset": {"image_text", "text_image"},
  "my_saved": {"image_text", "text_image"},
  "my_pets": {"image_text", "text_image"},
  "my_texts": {"image_text", "text_image"},
}
_TFDS = {
  "kind": "tfds",
  "path": "",
  "train_split": "train",
  "data_dir": "",
  "image_feature": "image",
  "text_feature": "caption",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  documented.write(root)
  return root


@pytest.fixture(autouse=True)
def _here(root, monkeypatch):
  """Runs what other processes do in this one."""
  monkeypatch.setenv("LAVIT_INDEXES", str(root / "indexes"))
  here.patch(monkeypatch)


def _every(source):
  """Every example of each task, with its images' bytes."""
  seen = lambda part: (
    (looks.encoded(source, part.image), part.write, part.weight)
    if isinstance(part, examples.ImagePart)
    else part
  )
  return {
    task: sorted(
      repr(list(map(seen, source.example(task, i).parts)))
      for i in range(source.num_examples(task))
    )
    for task in source.tasks()
  }


def _check(config, folder, tasks):
  config = config | {"image_size": fakes.SIZE, "seed": 0}
  source = kinds.build(config, "train")
  assert set(source.tasks()) == tasks
  batches = pipeline.packed_rows(
    source,
    fakes.Cache([3] * source.num_images),
    fakes.Words(),
    vocabulary.Vocabulary(fakes.Words.size, fakes.CODES),
    mixture=dict.fromkeys(source.tasks(), 1.0),
    length=64,
    slots=4,
    batch_size=2,
    window=8,
  )
  batch = batches[0]
  assert batch["weights"].any()
  assert not batches.faults[0].bad
  job.prepare(config, folder, quiet=True)
  path = str(folder)
  again = kinds.build(
    {"kind": "arrayrecord", "path": path, "held_out_path": path}
    | {"image_size": fakes.SIZE, "seed": 0},
    "train",
  )
  assert _every(again) == _every(source)


@pytest.mark.parametrize("name", _PATHS)
def test_a_format(name, root, tmp_path):
  path = str(root / name)
  kind = kinds.kind_of(path)
  config = {"kind": kind, "path": path, "held_out_path": path}
  _check(config, tmp_path / "out", _PATHS[name])


def test_tfds(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  documented.write_tfds(tmp_path)
  name = str(tmp_path / "tfds" / "tiny_images" / "1.0.0")
  config = _TFDS | {"name": name, "held_out_path": ""}
  _check(config, tmp_path / "out", {"image_text", "text_image"})
