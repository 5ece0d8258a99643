#!/usr/bin/env bash
# cykooz_resizer's "catmull_rom" convolution is the filter of Pillow's BICUBIC
# for 8-bit images, antialiased alike, and gives other pixels from the same
# pixels: most are equal, some are one level away, and where the filter
# overshoots at sharp edges up to ten or more. A model whose preprocessing was
# Pillow's sees other images through it. Seen with pillow 13.0.0 and
# cykooz_resizer 4.0.1 on a picture of noise and sharp stripes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet numpy==2.4.6 pillow==13.0.0 \
  cykooz_resizer==4.0.1
cat >"$work/run.py" <<'PY'
import cykooz_resizer as cr
import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
picture = rng.integers(0, 256, (256, 340, 3), np.uint8)
picture[:, ::7] = 255  # sharp edges, where the filter overshoots
picture[::5] = 0
side = 224
pillow = np.asarray(
  Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
).astype(int)

kind = cr.PixelType.U8x3
source = cr.ImageData(340, 256, kind, picture.tobytes())
target = cr.ImageData(side, side, kind)
bicubic = cr.ResizeAlg.convolution(cr.FilterType.catmull_rom)
cr.Resizer().resize(source, target, cr.ResizeOptions(resize_alg=bicubic))
other = np.frombuffer(target.get_buffer(), np.uint8).reshape(side, side, 3)

far = np.abs(pillow - other)
print(
  f"largest distance {far.max()}, mean {far.mean():.3f}, share of equal values"
  f" {(far == 0).mean():.3f}"
)
assert far.max() > 1, "it gives Pillow's pixels, but for rounding"
PY
"$work/env/bin/python" "$work/run.py"
