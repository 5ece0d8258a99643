"""Values read page by page are those that PyArrow reads."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lavit_jax.data.indexes.tables import tables
from lavit_jax.data.indexes.tables.parquet import footer, pages, thrift

CODECS = ("none", "snappy", "zstd", "gzip", "lz4", "brotli")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pages_of(path, leaf):
  """Pages of a leaf of each row group."""
  schema = pq.read_metadata(path).schema
  numbers = {schema.column(i).path: i for i in range(len(schema))}
  level = schema.column(numbers[leaf]).max_definition_level
  file = tables.Bytes(path)
  for group in footer.groups_of(footer.data_of(file)):
    yield pages.Pages(file, group.chunks[numbers[leaf]], level)


def _values(rng, count):
  some = [rng.randbytes(rng.choice((0, 1, 50, 3000))) for _ in range(9)]
  fresh = lambda: rng.randbytes(rng.choice((0, 7, 200, 9000)))
  return [
    None if rng.random() < 0.1 else rng.choice((rng.choice(some), fresh()))
    for _ in range(count)
  ]


def write(rng, path, codec):
  """Writes a column and a record of bytes, in some way; returns the values."""
  values = _values(rng, rng.choice((1, 40, 400)))
  records = [
    None if rng.random() < 0.1 else {"bytes": value, "path": "x"}
    for value in values
  ]
  kind = rng.choice((pa.binary(), pa.large_binary()))
  made = pa.table({"a": pa.array(values, kind), "b": pa.array(records, IMAGE)})
  if None not in values:
    field = made.schema.field("a").with_nullable(False)
    made = made.cast(pa.schema([field, made.schema.field("b")]))
  pq.write_table(
    made,
    path,
    compression=codec,
    row_group_size=rng.choice((7, 100, 1000)),
    data_page_size=rng.choice((100, 5000, 1 << 20)),
    data_page_version=rng.choice(("1.0", "2.0")),
    use_dictionary=rng.choice((True, False)),
    dictionary_pagesize_limit=rng.choice((100, 5000, 1 << 20)),
    write_page_checksum=rng.choice((True, False)),
    write_page_index=rng.choice((True, False)),
    write_statistics=rng.choice((True, False)),
    write_batch_size=rng.choice((1, 10, 1024)),
  )
  return values, [record and record["bytes"] for record in records]


@pytest.mark.parametrize("large", [4 << 20, 0])
@pytest.mark.parametrize("codec", CODECS)
def test_values_are_those_of_pyarrow(tmp_path, codec, large, monkeypatch):
  """With large = 0 each value is read alone, where nothing is packed."""
  monkeypatch.setattr(pages, "_LARGE", large)
  monkeypatch.setattr(pages, "_FAR", large and 4096)
  rng, read = random.Random(codec), 0
  path = tmp_path / "a.parquet"
  for _ in range(12):
    values, inner = write(rng, path, codec)
    for leaf, expected in (("a", values), ("b.bytes", inner)):
      try:
        list(pages_of(path, leaf))
      except thrift.Odd:
        continue
      read += 1
      found = []
      for group, found_pages in enumerate(pages_of(path, leaf)):
        count = pq.read_metadata(path).row_group(group).num_rows
        numbers = rng.sample(range(count), count)
        some = {j: found_pages.value(j) for j in numbers}
        found += [some[j] for j in range(count)]
      assert found == expected
  if codec in ("lz4", "brotli"):
    assert not read
  elif large:
    assert read == 24
  elif codec == "none":
    assert read > 2  # those without a dictionary


@pytest.mark.parametrize("codec", ["none", "snappy"])
def test_mutated_pages_are_odd_or_those_of_pyarrow(tmp_path, codec):
  rng = random.Random(codec)
  path, outcomes = tmp_path / "a.parquet", {"read": 0, "odd": 0}
  for _ in range(100):
    write(rng, path, codec)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 20))):
      data[rng.randrange(4, max(5, len(data) - 2000))] = rng.randrange(256)
    path.write_bytes(data)
    try:
      expected = pq.ParquetFile(path, page_checksum_verification=True)
      expected = expected.read(columns=["a"])["a"].to_pylist()
    except (OSError, pa.ArrowException):
      expected = None
    try:
      found = []
      for group, found_pages in enumerate(pages_of(path, "a")):
        count = pq.read_metadata(path).row_group(group).num_rows
        found += [found_pages.value(j) for j in range(count)]
    except (thrift.Odd, OSError, pa.ArrowException):
      outcomes["odd"] += 1
      continue
    outcomes["read"] += 1
    assert expected is None or found == expected
  assert min(outcomes.values()) > 5


@pytest.mark.parametrize(
  "encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"]
)
def test_other_encodings_are_left_to_pyarrow(tmp_path, encoding):
  made = pa.table({"a": pa.array([b"x", b"xy"])})
  path = tmp_path / "a.parquet"
  encodings = {"use_dictionary": False, "column_encoding": {"a": encoding}}
  pq.write_table(made, path, **encodings)
  with pytest.raises(thrift.Odd):
    list(pages_of(path, "a"))


@pytest.mark.parametrize("batch", [1, 1024])
def test_of_a_value_only_its_page_is_read(tmp_path, monkeypatch, batch):
  """Of a large page, as PyArrow writes of 1024 rows, only the value itself."""
  rng = random.Random(0)
  values = [rng.randbytes(60_000) for _ in range(100)]
  path = tmp_path / "a.parquet"
  pq.write_table(
    pa.table({"a": values}),
    path,
    use_dictionary=False,
    data_page_size=40_000,
    write_batch_size=batch,
    compression="none",
  )
  (lone,) = pages_of(path, "a")
  sizes, real = [], tables.Bytes.read

  def read(self, start, stop):
    sizes.append(stop - start)
    return real(self, start, stop)

  monkeypatch.setattr(tables.Bytes, "read", read)
  assert lone.value(57) == values[57]
  assert sum(sizes) < 100_000
  assert lone.nbytes < 500_000
