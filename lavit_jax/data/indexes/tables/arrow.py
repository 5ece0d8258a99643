"""What Arrow's types and the metadata of a schema say about columns.

PyArrow is imported where it is used: it is an extra.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.data.records import columns

_FEATURES = b"huggingface"  # key of a schema's metadata


def library() -> Any:
  """Returns the module pyarrow.

  Raises:
    errors.DataError: it is not installed.
  """
  try:
    import pyarrow  # optional extra
  except ImportError as error:
    raise errors.DataError(
      "Parquet and Arrow files need PyArrow, which is not installed:"
      " pip install 'lavit_jax[parquet]'"
    ) from error
  return pyarrow


def parquet() -> Any:
  """Returns the module pyarrow.parquet.

  Raises:
    errors.DataError: it is not installed.
  """
  library()
  import pyarrow.parquet  # optional extra

  return pyarrow.parquet


def features_of(
  schema: Any, stated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Returns the features that the library `datasets` knows columns as.

  Args:
    schema: of a table; its metadata are lost once pandas has written it.
    stated: features from elsewhere, for a schema without.

  Returns:
    Column -> feature, such as {"_type": "Image"}; {} where there are none.
  """
  found: Any = None
  try:
    found = json.loads((schema.metadata or {})[_FEATURES])["info"]["features"]
  except (KeyError, TypeError, ValueError, RecursionError):
    found = stated
  return dict(found) if isinstance(found, Mapping) else {}


def columns_of(
  schema: Any, stated: Mapping[str, Any] | None = None
) -> list[columns.Column]:
  """Returns the columns of a schema; see `features_of`."""
  features = features_of(schema, stated)
  return [_column(field, features.get(field.name)) for field in schema]


def _column(field, feature) -> columns.Column:
  kind, many = kind_of(field.type)
  feature = _unlisted(feature)
  kind_of_feature = feature.get("_type")
  classes: tuple[str, ...] = ()
  names = feature.get("names")
  named = isinstance(names, list) and all(isinstance(n, str) for n in names)
  if kind_of_feature == "ClassLabel" and kind == "number" and named:
    kind, classes = "class", tuple(names)
  marked = kind_of_feature == "Image"
  if kind == "image" and kind_of_feature and not marked:
    kind = "other"  # sounds and films are stored alike
  return columns.Column(field.name, kind, many, classes, marked)


def _unlisted(feature) -> dict[str, Any]:
  """Returns a feature, or that of the items if it is one of lists."""
  if isinstance(feature, list) and len(feature) == 1:
    return _unlisted(feature[0])
  if not isinstance(feature, dict):
    return {}
  inner = feature.get("feature")
  return _unlisted(inner) if isinstance(inner, dict | list) else feature


def kind_of(type_: Any) -> tuple[str, bool]:
  """Returns the kind of a column of a type, and whether it is of lists."""
  types = library().types
  if hasattr(type_, "storage_type"):
    return kind_of(type_.storage_type)
  if types.is_dictionary(type_):
    return kind_of(type_.value_type)
  if is_text(type_):
    return "text", False
  if is_bytes(type_):
    return "bytes", False
  if types.is_struct(type_):
    inner = {field.name: field.type for field in type_}
    of_bytes = inner.get("bytes")
    # Of pictures that are all in files, pandas writes the type "null".
    if of_bytes and (is_bytes(of_bytes) or types.is_null(of_bytes)):
      return "image", False
    return "record", False
  if is_list(type_):
    kind, many = kind_of(type_.value_type)
    return ("other" if many else kind), True
  if types.is_integer(type_) or types.is_floating(type_):
    return "number", False
  return "other", False


def has_no_bytes(type_: Any) -> bool:
  """Returns whether a type is of images of which none is in the table."""
  types = library().types
  if is_list(type_):
    return has_no_bytes(type_.value_type)
  if not types.is_struct(type_):
    return False
  index = type_.get_field_index("bytes")
  return index >= 0 and types.is_null(type_.field(index).type)


def is_text(type_: Any) -> bool:
  """Returns whether a type is one of texts."""
  types = library().types
  return (
    types.is_string(type_)
    or types.is_large_string(type_)
    or types.is_string_view(type_)
  )


def is_bytes(type_: Any) -> bool:
  """Returns whether a type is one of bytes."""
  types = library().types
  return (
    types.is_binary(type_)
    or types.is_large_binary(type_)
    or types.is_binary_view(type_)
    or types.is_fixed_size_binary(type_)
  )


def is_list(type_: Any) -> bool:
  """Returns whether a type is one of lists."""
  types = library().types
  return (
    types.is_list(type_)
    or types.is_large_list(type_)
    or types.is_fixed_size_list(type_)
    or types.is_list_view(type_)
    or types.is_large_list_view(type_)
  )


def marks_of(column: Any) -> Any:
  """Returns a column of lists with True in place of each item, null of a null.

  Args:
    column: pyarrow.ChunkedArray of lists; a null becomes an empty list.
  """
  import pyarrow.compute as compute  # optional extra

  library_ = library()
  lengths = compute.fill_null(compute.list_value_length(column), 0)
  stops = np.cumsum(lengths.to_numpy())
  valid = compute.is_valid(compute.list_flatten(column)).combine_chunks()
  none = library_.scalar(None, library_.bool_())
  marks = compute.if_else(valid, True, none)
  return library_.ListArray.from_arrays(
    library_.array(np.r_[0, stops], library_.int32()), marks
  )


def as_bytes(type_: Any) -> Any:
  """Returns a type with bytes in place of texts, of the same layout."""
  library_ = library()
  types = library_.types
  if types.is_string(type_):
    return library_.binary()
  if types.is_large_string(type_):
    return library_.large_binary()
  if types.is_string_view(type_):
    return library_.binary_view()
  if types.is_struct(type_):
    inner = [field.with_type(as_bytes(field.type)) for field in type_]
    return library_.struct(inner)
  if types.is_list(type_):
    field = type_.value_field
    return library_.list_(field.with_type(as_bytes(field.type)))
  return type_


def words_of(error: Exception) -> str:
  """Returns the first sentence of an error of PyArrow, on one line."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text[:200]
