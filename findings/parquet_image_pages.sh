#!/bin/bash
# PyArrow 26.0.1 looks at the size of a Parquet page only after every 1,024
# values (`write_batch_size`): a row group of up to as many encoded images is
# one page, however large, whatever `data_page_size` says. A reader that wants
# one image has to get, and where it is compressed to unpack, all of them. The
# same data with `write_batch_size=1` have a page for each image.
#
# Seen 2026-11-30, Python 3.11:
#   by default: 1 pages of 100 images of 100 KB
#   batches of 1: 100 pages
# Exits 0 where this is so, and 1 where it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q pyarrow==26.0.1
cat > "$place/pages.py" <<'PYTHON'
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq

images = [os.urandom(100_000) for _ in range(100)]
table = pa.table({"image": pa.array(images, pa.binary())})


def pages(**options):
  """Number of data pages of the one column: of gaps between its values."""
  path = os.path.join(sys.argv[1], "images.parquet")
  pq.write_table(
    table,
    path,
    compression="none",
    use_dictionary=False,
    data_page_size=1 << 16,
    **options,
  )
  chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
  with open(path, "rb") as file:
    file.seek(chunk.data_page_offset)
    data = file.read(chunk.total_compressed_size)
  starts = [data.find(image[:64]) for image in images]
  gaps = [b - (a + 4 + len(images[0])) for a, b in zip(starts, starts[1:])]
  # Within a page one value follows the other, each after four bytes of length.
  return 1 + sum(gap > 0 for gap in gaps)


default, single = pages(), pages(write_batch_size=1)
print(f"by default: {default} pages of 100 images of 100 KB")
print(f"batches of 1: {single} pages")
sys.exit(0 if (default, single) == (1, 100) else 1)
PYTHON
"$place/venv/bin/python" "$place/pages.py" "$place"
