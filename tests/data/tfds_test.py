import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")

from lavit_jax import errors, images  # noqa: E402
from lavit_jax.data import examples, tfds  # noqa: E402


def _png(value):
  file = io.BytesIO()
  Image.new("RGB", (6, 4), (value, 0, 0)).save(file, "PNG")
  return io.BytesIO(file.getvalue())


class TinyPictures(tensorflow_datasets.core.GeneratorBasedBuilder):
  """Six pictures; the text features are one text and a sequence of them."""

  VERSION = tensorflow_datasets.core.Version("1.0.0")
  code_path = None  # no checksums, no licence file beside the code

  def _info(self):
    features = tensorflow_datasets.features
    return tensorflow_datasets.core.DatasetInfo(
      builder=self,
      features=features.FeaturesDict(
        {
          "image": features.Image(encoding_format="png"),
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
          "caption": f"number {i}",
          "captions": [{"text": f"one {i}"}, {"text": f"two {i}"}],
          "id": i,
          "label": i % 2,
        },
      )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tfds")
  builder = TinyPictures(data_dir=directory, file_format="array_record")
  builder.download_and_prepare()
  return directory


def _source(data_dir, **kwargs):
  settings = dict(name="tiny_pictures", split="train", image_size=8)
  return tfds.TfdsSource(data_dir=data_dir, **(settings | kwargs))


def test_pictures_and_texts_belong_together(data_dir):
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


def test_a_prepared_folder_and_a_slice_can_be_named(data_dir):
  folder = str(data_dir / "tiny_pictures" / "1.0.0")
  source = tfds.TfdsSource(folder, "train[:2]", image_size=8)
  assert source.num_images == 2
  assert source.name == "tfds:tiny_pictures/1.0.0:train[:2]"


def test_a_broken_picture_is_an_image_error_with_its_record(
  data_dir, monkeypatch
):
  source = _source(data_dir)
  record = source._records[2] | {"image": b"not a picture"}
  monkeypatch.setattr(source, "_records", {2: record})
  with pytest.raises(images.ImageError, match=r"tiny_pictures.*train\[2\]"):
    source.image(2)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"name": "no_such_dataset_here"}, "cannot be opened"),
    ({"split": "test"}, "Unknown split 'test'"),
    ({"text_feature": "words"}, r"no feature 'words'.*caption"),
    ({"text_feature": "captions/words"}, r"'words' is none of \['text'\]"),
    ({"image_feature": "photo"}, "no feature 'photo'"),
    ({"text_feature": "label"}, "'label' holds .*, a int.*, expected a text"),
    ({"text_feature": "id"}, "'id' holds .*, a int.*, expected a text"),
    ({"image_feature": "id"}, "'id' holds a int.*, expected an encoded"),
  ],
)
def test_what_is_not_there_is_named(data_dir, changes, said):
  with pytest.raises(errors.DataError, match=said):
    _source(data_dir, **changes)


def test_a_text_that_is_no_utf8_is_left_out_and_named(data_dir, monkeypatch):
  source = _source(data_dir, limit_share=0.5)
  broken = source._records[2] | {"caption": b"caf\xe9"}
  records = [source._records[i] for i in range(6)]
  records[2] = broken
  monkeypatch.setattr(source, "_records", records)
  source._captions.cache_clear()
  assert [len(source.captions(i)) for i in range(6)] == [1, 1, 0, 1, 1, 1]
  assert list(source.faults.names) == [source.image_key(2)]
  assert "no UTF-8" in source.faults.reasons[source.image_key(2)]


def test_reading_needs_no_tensorflow(data_dir):
  code = (
    "import sys; from lavit_jax.data import tfds;"
    "s = tfds.TfdsSource(sys.argv[1], 'train', image_size=8);"
    "s.image(0), s.captions(0); assert 'tensorflow' not in sys.modules"
  )
  folder = str(data_dir / "tiny_pictures" / "1.0.0")
  subprocess.run([sys.executable, "-c", code, folder], check=True)
