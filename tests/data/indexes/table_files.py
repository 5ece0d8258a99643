"""Writes tables as the library `datasets` 5.2.0 does, and plain ones."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(seed=0, format="PNG", size=(8, 6), **kwargs):
  """Encoded bytes of an image of noise."""
  pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format, **kwargs)
  return file.getvalue()


def embedded(count, start=0, path="{}.png"):
  """Cells of images that are in the table."""
  numbers = range(start, start + count)
  return [{"bytes": encoded(i), "path": path.format(i)} for i in numbers]


def features(**kinds):
  """Metadata of a schema: image, a list of class names, or another type."""
  found = {}
  for name, kind in kinds.items():
    if isinstance(kind, list):
      found[name] = {"names": kind, "_type": "ClassLabel"}
    elif kind == "image":
      found[name] = {"_type": "Image"}
    elif kind == "images":
      found[name] = {"feature": {"_type": "Image"}, "_type": "List"}
    else:
      found[name] = {"dtype": kind, "_type": "Value"}
  return found


def table(columns, types=None, **kinds):
  """A table of such columns; images as `datasets` knows them by `kinds`."""
  types = dict(types or {})
  types |= {name: IMAGE for name, kind in kinds.items() if kind == "image"}
  types |= {
    name: pa.list_(IMAGE) for name, kind in kinds.items() if kind == "images"
  }
  arrays = {
    name: pa.array(values, types.get(name)) for name, values in columns.items()
  }
  made = pa.table(arrays)
  if not kinds:
    return made
  info = {"info": {"features": features(**kinds)}}
  return made.replace_schema_metadata({"huggingface": json.dumps(info)})


def parquet(path, columns, types=None, rows=3, options=None, **kinds):
  """Writes a Parquet file with row groups of so many rows."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(
    table(columns, types, **kinds), path, row_group_size=rows, **(options or {})
  )
  return path


def captioned(folder, count, rows=4, **options):
  """Files 0.parquet … of images with captions, as `datasets` embeds them."""
  for f in range(count):
    columns = {
      "image": embedded(rows, f * rows),
      "caption": [f"image {f * rows + k}" for k in range(rows)],
    }
    parquet(
      folder / f"{f}.parquet",
      columns,
      image="image",
      caption="string",
      options={
        "compression": {"image.bytes": "none", "caption": "snappy"},
        "use_dictionary": ["caption"],
        "write_page_index": True,
        **options,
      },
    )
  return folder


def saved(folder, columns, files=1, types=None, batch=3, **kinds):
  """Writes a folder as `save_to_disk` does."""
  folder.mkdir(parents=True, exist_ok=True)
  whole = table(columns, types, **kinds)
  step, names = -(-len(whole) // files), []
  for f in range(files):
    names.append(f"data-{f:05d}-of-{files:05d}.arrow")
    part = whole.slice(f * step, step)
    with pa.ipc.new_stream(folder / names[-1], whole.schema) as writer:
      writer.write_table(part, max_chunksize=batch)
  state = {
    "_data_files": [{"filename": name} for name in names],
    "_fingerprint": "af0123c2b80afe88",
    "_format_columns": None,
    "_format_kwargs": {},
    "_format_type": None,
    "_output_all_columns": False,
    "_split": None,
  }
  (folder / "state.json").write_text(json.dumps(state, indent=2))
  info = {"citation": "", "description": "", "features": features(**kinds)}
  (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
  return folder


def without_words(path):
  """Writes a Parquet file again as pandas does: features are lost."""
  read = pq.read_table(path).replace_schema_metadata({"pandas": "{}"})
  arrays = []
  for name in read.column_names:
    column = read[name].combine_chunks()
    if (
      column.type == IMAGE
      and not pa.compute.struct_field(column, "bytes").drop_null().__len__()
    ):
      inner = [pa.nulls(len(column)), column.field("path")]
      column = pa.StructArray.from_arrays(inner, ["bytes", "path"])
    if pa.types.is_string(column.type):
      column = column.cast(pa.large_string())
    arrays.append(column)
  schema = pa.schema(
    [(n, a.type) for n, a in zip(read.column_names, arrays, strict=True)],
    {"pandas": "{}"},
  )
  pq.write_table(pa.table(arrays, schema=schema), path)
  return path
