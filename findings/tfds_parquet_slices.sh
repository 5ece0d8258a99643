#!/usr/bin/env bash
# tensorflow-datasets 4.9.10 (pyarrow 26.0.1), Python 3.11, Linux x86-64.
#
# as_data_source ignores the slice of a split where a dataset was prepared as
# parquet: split="train[:2]" and "train[2:]" both have every record of the
# files they touch, so that a held-out slice lies inside the training slice.
# info.splits[...] tells the right numbers, and array_record has them. Nothing
# is said; the error for other formats names array_record and parquet as the
# two that have random access.
#
# Seen: "array_record 2 4 told 2 4" and "parquet 6 6 told 2 4" (of 6 records).
# Exits 0 while that is so, 1 once parquet is sliced too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
  tensorflow-datasets==4.9.10 pyarrow==26.0.1 array-record==0.8.6 numpy==2.4.6
cat > "$folder/try.py" << 'EOF'
import sys, tempfile
import numpy as np
import tensorflow_datasets as tfds


class Six(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  code_path = None

  def _info(self):
    features = tfds.features.FeaturesDict({"id": np.int64})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(6):
      yield i, {"id": i}


found = {}
for kind in ("array_record", "parquet"):
  builder = Six(data_dir=tempfile.mkdtemp(), file_format=kind)
  builder.download_and_prepare()
  halves = ("train[:2]", "train[2:]")
  read = [len(builder.as_data_source(split=s)) for s in halves]
  told = [builder.info.splits[s].num_examples for s in halves]
  print(kind, *read, "told", *told)
  found[kind] = read, told
right, every = [2, 4], [6, 6]
same = found == {"array_record": (right, right), "parquet": (every, right)}
sys.exit(0 if same else 1)
EOF
"$folder/venv/bin/python" "$folder/try.py" 2> "$folder/log" || {
  status=$?
  tail -5 "$folder/log" >&2
  exit "$status"
}
