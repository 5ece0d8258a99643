import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")

from lavit_jax.core import errors, image_io
from lavit_jax.data import examples
from lavit_jax.data.batching import pipeline
from lavit_jax.data.images import image_bytes
from lavit_jax.data.sources import caption_counts, kinds, tfds


def _png(value):
  file = io.BytesIO()
  Image.new("RGB", (6, 4), (value, 0, 0)).save(file, "PNG")
  return io.BytesIO(file.getvalue())


class TinyImages(tensorflow_datasets.core.GeneratorBasedBuilder):
  """Six images; the text features are one text and a sequence of them."""

  VERSION = tensorflow_datasets.core.Version("1.0.0")
  code_path = None  # no checksums, no licence file beside the code

  def _info(self):
    features = tensorflow_datasets.features
    return tensorflow_datasets.core.DatasetInfo(
      builder=self,
      features=features.FeaturesDict(
        {
          "image": features.Image(encoding_format="png"),
          "depth": features.Image(encoding_format="png"),
          "caption": features.Text(),
          "captions": features.Sequence({"text": features.Text()}),
          "id": np.int64,
          "label": features.ClassLabel(names=["cat", "dog"]),
        }
      ),
    )

  def _split_generators(self, manager):
    del manager
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(6):
      yield (
        i,
        {
          "image": _png(40 * i),
          "depth": _png(40 * i),
          "caption": f"number {i}",
          "captions": [{"text": f"one {i}"}, {"text": f"two {i}"}],
          "id": i,
          "label": i % 2,
        },
      )


_CAPTIONS = (1, 5, 5, 0, 5, 5)  # of each record


class RaggedImages(TinyImages):
  """The same with more or fewer captions a record."""

  def _generate_examples(self):
    for i, (key, record) in enumerate(super()._generate_examples()):
      texts = [{"text": f"{j} of {i}"} for j in range(_CAPTIONS[i])]
      yield key, record | {"captions": texts}


def _prepare(directory, kind, file_format):
  builder = kind(data_dir=directory, file_format=file_format)
  settings = tensorflow_datasets.download.DownloadConfig(num_shards=3)
  builder.download_and_prepare(download_config=settings)
  return directory


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tfds")
  return _prepare(directory, TinyImages, "array_record")


@pytest.fixture(scope="module")
def ragged_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("ragged")
  return _prepare(directory, RaggedImages, "array_record")


@pytest.fixture(scope="module")
def parquet_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("parquet")
  return _prepare(directory, TinyImages, "parquet")


@pytest.fixture(autouse=True)
def _own_counts(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _source(data_dir, **kwargs):
  settings = dict(name="tiny_images", split="train", image_size=8)
  return tfds.TfdsSource(data_dir=data_dir, **(settings | kwargs))


def test_images_and_texts_are_of_the_same_record(data_dir):
  source = _source(data_dir)
  assert isinstance(source, examples.Source)
  assert source.num_images == source.num_examples("image_text") == 6
  seen = set()
  for i in range(6):
    pixels, (caption,) = source.image(i), source.captions(i)
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
    number = int(caption.split()[1])
    assert pixels[0, 0].tolist() == [40 * number, 0, 0]
    seen.add(number)
    example = source.example("image_text", i)
    assert example == examples.image_text(source.image_key(i), i, caption)
  assert seen == set(range(6))


def test_each_of_several_captions_is_an_example(data_dir):
  source = _source(data_dir, text_feature="captions/text")
  assert source.num_examples("text_image") == 12
  texts = {source.example("text_image", i).parts[0].text for i in range(12)}
  assert texts == {f"{w} {i}" for w in ("one", "two") for i in range(6)}


def _ragged(ragged_dir, **kwargs):
  settings = dict(name="ragged_images", text_feature="captions/text")
  return _source(ragged_dir, **(settings | kwargs))


def test_every_caption_is_one_example_however_many_a_record_has(ragged_dir):
  source = _ragged(ragged_dir)
  found = []
  for task in source.tasks():
    assert source.num_examples(task) == sum(_CAPTIONS)
    for i in range(sum(_CAPTIONS)):
      example = source.example(task, i)
      (text,) = [p for p in example.parts if isinstance(p, examples.TextPart)]
      (image,) = [p for p in example.parts if isinstance(p, examples.ImagePart)]
      number = int(text.text.split()[-1])
      assert source.image(image.image)[0, 0, 0] == 40 * number
      found.append((task, text.text))
  wanted = [f"{j} of {i}" for i, n in enumerate(_CAPTIONS) for j in range(n)]
  assert sorted(found) == sorted((t, w) for t in source.tasks() for w in wanted)
  assert len(kinds.sentences(source, 1000)) == 2 * sum(_CAPTIONS)


def test_records_without_captions_still_count_as_images(ragged_dir):
  source = _ragged(ragged_dir)
  assert source.num_images == 6
  assert sorted(len(source.captions(i)) for i in range(6)) == sorted(_CAPTIONS)
  assert len(pipeline.image_batches(source, 2)) == 3


@pytest.mark.parametrize("first", range(6))
def test_the_first_record_does_not_decide_the_number_of_captions(
  ragged_dir, first
):
  source = _ragged(ragged_dir, split=f"train[{first}:]")
  counts = [len(source.captions(i)) for i in range(source.num_images)]
  assert source.num_examples("text_image") == sum(counts)


def test_captions_are_counted_once_for_the_same_data(ragged_dir, monkeypatch):
  counted = []
  count = tfds.TfdsSource._read_captions
  spy = lambda self, i: counted.append(i) or count(self, i)
  monkeypatch.setattr(tfds.TfdsSource, "_read_captions", spy)
  assert _ragged(ragged_dir).num_examples("image_text") == sum(_CAPTIONS)
  assert sorted(counted) == list(range(6))
  _ragged(ragged_dir).num_examples("image_text")
  assert len(counted) == 6  # read from the file of counts
  part = _ragged(ragged_dir, split="train[:3]")
  expected = sum(len(part.captions(i)) for i in range(3))
  assert part.num_examples("image_text") == expected
  assert len(list(caption_counts.folder().iterdir())) == 2


@pytest.mark.parametrize("spoil", [b"", b"nonsense"])
def test_a_damaged_file_of_counts_is_written_again(ragged_dir, spoil):
  _ragged(ragged_dir).num_examples("image_text")
  (path,) = caption_counts.folder().iterdir()
  path.write_bytes(spoil)
  assert _ragged(ragged_dir).num_examples("image_text") == sum(_CAPTIONS)


def test_a_text_that_is_not_utf8_is_dropped_and_logged(data_dir, monkeypatch):
  source = _source(data_dir, text_feature="captions/text")
  texts = {"text": [b"fine", b"b\xffd"]}
  record = source._records[2] | {"captions": texts}
  monkeypatch.setattr(source, "_records", {2: record})
  assert source.captions(2) == ["fine"]
  assert "train[2]" in source.faults.summary()


@pytest.mark.parametrize("split", ["train[:2]", "train[2:]", "train[1:2]"])
def test_slices_of_parquet_are_those_of_array_record(
  data_dir, parquet_dir, split
):
  pixels = lambda s: [s.image(i)[0, 0, 0] for i in range(s.num_images)]
  one, other = _source(data_dir, split=split), _source(parquet_dir, split=split)
  assert one.num_images == other.num_images < 6
  assert pixels(one) == pixels(other)
  assert one.captions(0) == other.captions(0)


@pytest.mark.parametrize("name", ["data_dir", "parquet_dir"])
def test_a_slice_and_the_remaining_records_share_nothing(name, request, caplog):
  folder = request.getfixturevalue(name)
  config = dict(kind="tfds", name="tiny_images", data_dir=str(folder))
  config |= dict(image_feature="image", text_feature="caption", image_size=8)
  halves = dict(train_split="train[:4]", held_out_split="train[4:]")
  train, held_out = kinds.pair(config | halves)
  seen = [
    {s.captions(i)[0] for i in range(len(s._records))}
    for s in (train, held_out)
  ]
  assert [len(s) for s in seen] == [4, 2]
  assert not seen[0] & seen[1]
  assert tfds.overlap(train, held_out) == 0
  assert not caplog.records
  kinds.pair(config | halves | dict(held_out_split="train[3:]"))
  assert "1 of 3 held-out records are in the training" in caplog.text


@pytest.mark.parametrize("file_format", ["tfrecord", "riegeli"])
def test_a_format_that_needs_tensorflow_is_refused(
  data_dir, tmp_path, file_format
):
  folder = tmp_path / "tiny_images" / "1.0.0"
  shutil.copytree(data_dir / "tiny_images" / "1.0.0", folder)
  fields = json.loads((folder / "dataset_info.json").read_text())
  fields["fileFormat"] = file_format
  (folder / "dataset_info.json").write_text(json.dumps(fields))
  said = rf"file format .*{file_format}.* not.*array_record and parquet"
  with pytest.raises(errors.DataError, match=f"(?i){said}"):
    tfds.TfdsSource(str(folder), "train", image_size=8)


def test_other_data_have_another_digest(data_dir, ragged_dir):
  digests = [
    _source(data_dir).contents(),
    _source(data_dir, split="train[:2]").contents(),
    _source(data_dir, split="train[2:]").contents(),
    _source(data_dir, text_feature="captions/text").contents(),
    _ragged(ragged_dir).contents(),
  ]
  assert len(set(digests)) == 5
  assert _source(data_dir).contents() == digests[0]


def test_image_fingerprints_differ_by_feature_and_preparation(
  data_dir, parquet_dir
):
  """Though depth has the very bytes of image; texts are no matter."""
  known = image_bytes.of(_source(data_dir))
  assert image_bytes.of(_source(data_dir, image_feature="depth")) != known
  assert image_bytes.of(_source(parquet_dir)) != known
  texts = _source(data_dir, text_feature="captions/text")
  assert image_bytes.of(texts) == known


def test_a_prepared_folder_and_a_slice_can_be_named(data_dir):
  folder = str(data_dir / "tiny_images" / "1.0.0")
  source = tfds.TfdsSource(folder, "train[:2]", image_size=8)
  assert source.num_images == 2
  assert source.name == "tfds:tiny_images/1.0.0:train[:2]"


def test_a_broken_image_is_an_image_error_with_its_record(
  data_dir, monkeypatch
):
  source = _source(data_dir)
  record = source._records[2] | {"image": b"not an image"}
  monkeypatch.setattr(source, "_records", {2: record})
  with pytest.raises(image_io.ImageError, match=r"tiny_images.*train\[2\]"):
    source.image(2)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"name": "no_such_dataset_here"}, "cannot be opened"),
    ({"split": "test"}, "Unknown split 'test'"),
    ({"text_feature": "words"}, r"no feature 'words'.*caption"),
    ({"text_feature": "captions/words"}, r"'words' is not one of \['text'\]"),
    ({"image_feature": "photo"}, "no feature 'photo'"),
    ({"text_feature": "captions"}, r"group of \['text'\].*'captions/text'"),
    ({"text_feature": "label"}, "'label' holds .*, a int.*, expected a text"),
    ({"text_feature": "id"}, "'id' holds .*, a int.*, expected a text"),
    ({"image_feature": "id"}, "'id' holds a int.*, expected an encoded"),
  ],
)
def test_missing_datasets_splits_and_features_are_reported(
  data_dir, changes, said
):
  with pytest.raises(errors.DataError, match=said):
    _source(data_dir, **changes)


def test_a_record_whose_only_text_is_not_utf8_has_no_captions(
  data_dir, monkeypatch
):
  source = _source(data_dir, limit_share=0.5)
  broken = source._records[2] | {"caption": b"caf\xe9"}
  records = [source._records[i] for i in range(6)]
  records[2] = broken
  monkeypatch.setattr(source, "_records", records)
  source._captions.cache_clear()
  assert [len(source.captions(i)) for i in range(6)] == [1, 1, 0, 1, 1, 1]
  assert list(source.faults.names) == [source.image_key(2)]
  assert "not UTF-8" in source.faults.reasons[source.image_key(2)]


def test_reading_needs_no_tensorflow(data_dir):
  code = (
    "import sys; from lavit_jax.data.sources import tfds;"
    "s = tfds.TfdsSource(sys.argv[1], 'train', image_size=8);"
    "s.image(0), s.captions(0); assert 'tensorflow' not in sys.modules"
  )
  folder = str(data_dir / "tiny_images" / "1.0.0")
  subprocess.run([sys.executable, "-c", code, folder], check=True)
