"""The report page: complete, escaped, and in need of nothing beside it."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from lavit_jax.evaluate.report import page, plots

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
VOID = {"meta", "img", "line", "rect", "circle", "polyline", "!doctype"}


class Checker(html.parser.HTMLParser):
  """Fails on tags that are not closed in order; collects texts and images."""

  def __init__(self):
    super().__init__()
    self.open, self.texts, self.images, self.ids, self.links = (
      [],
      [],
      [],
      [],
      [],
    )

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.images += [attrs["src"]] if tag == "img" else []
    self.ids += [attrs["id"]] if "id" in attrs else []
    self.links += [attrs["href"]] if "href" in attrs else []
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    pass

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts += [data.strip()] if data.strip() else []


def parse(report):
  checker = Checker()
  checker.feed(page.render(report))
  assert checker.open == []
  return checker


def full_report():
  return page.Report(
    title="A <b>run</b>",
    subtitle="of & all",
    metrics=[
      page.Metric(name="t2i", value=0.3, low=0.35, note="shuffled 0.1"),
      page.Metric(name="kept", value=0.3, low=0.28, high=0.4),
      page.Metric(name="perplexity", value=311.4),
    ],
    facts={"parameters": 3_214_000, "seed": 0},
    seconds={"encoder": 90.0, "tokenizer": 150.0},
    sections=[
      page.Section(
        title="What is kept",
        text="<script>alert(1)</script>",
        blocks=[
          page.Figure(image=IMAGE, caption="a figure"),
          page.Figure(image=plots.bar_chart({"one": 1.0}), title="a chart"),
          page.Table(
            columns=["selection", "gain", "sample"],
            rows=[["learned", 0.91, IMAGE], ["random", None, "–"]],
          ),
          page.Gallery(
            labels=("image", "reference", "model"),
            rows=[(IMAGE, "a <red> circle", "a blue one")] * 2,
            right=[True, False],
          ),
        ],
      )
    ],
    curves={
      "pretrain": {
        "train/loss": [(0, 2.0), (1, 1.0)],
        "eval/loss": [(1, 1.5)],
        "lr": [(0, 1.0), (1, 0.5)],
        "never": [],
      }
    },
  )


def test_every_part_stands_on_the_page_and_tags_are_closed():
  checker = parse(full_report())
  for text in ("a figure", "learned", "0.910", "3,214,000", "1.5 min", "lr"):
    assert text in checker.texts, text
  assert "never" not in checker.texts
  assert checker.texts.count("eval") == 1  # one chart of the two losses


def test_texts_are_escaped():
  text = page.render(full_report())
  assert "<script" not in text
  assert "A &lt;b&gt;run&lt;/b&gt;" in text
  assert "a &lt;red&gt; circle" in text


def test_the_page_needs_nothing_beside_it():
  text = page.render(full_report())
  assert not re.search(r"https?://|@import|url\(|<link|<script", text)
  checker = parse(full_report())
  assert all(src.startswith("data:image/png;base64,") for src in checker.images)


def test_images_are_embedded_bit_by_bit():
  sources = parse(full_report()).images
  assert len(sources) == 4  # figure, table, two cards
  for source in sources:
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(Image.open(io.BytesIO(data)), IMAGE)


def test_links_of_the_head_lead_to_sections():
  checker = parse(full_report())
  assert checker.links == ["#what-is-kept", "#training"]
  assert checker.links == [f"#{id_}" for id_ in checker.ids]


@pytest.mark.parametrize(
  ("low", "high", "met"),
  [
    (None, None, None),
    (0.5, None, True),
    (0.6, None, False),
    (None, 0.4, False),
    (0.4, 0.5, True),
  ],
)
def test_a_metric_is_met_within_its_bounds(low, high, met):
  metric = page.Metric(name="x", value=0.5, low=low, high=high)
  assert metric.met is met
  text = page.render(page.Report(title="t", metrics=[metric]))
  assert ('"metric met"' in text) is (met is True)
  assert ('"metric missed"' in text) is (met is False)


def test_a_value_that_is_no_number_misses_its_bound():
  assert page.Metric(name="x", value=float("nan"), low=0.1).met is False


def test_build_writes_one_file_and_overwrites_it(tmp_path):
  directory = tmp_path / "run" / "report"
  page.build(page.Report(title="first"), directory)
  path = page.build(page.Report(title="second"), directory)
  assert path == directory / "index.html"
  assert list(directory.iterdir()) == [path]
  text = path.read_text(encoding="utf-8")
  assert "second" in text
  assert "first" not in text


def test_a_gallery_row_that_fits_no_labels_is_refused():
  with pytest.raises(
    ValueError, match=r"'edits': row 1 has 1 entries.*2 labels"
  ):
    page.Gallery(title="edits", labels=("a", "b"), rows=[("x", "y"), ("z",)])
  with pytest.raises(ValueError, match="1 marks"):
    page.Gallery(labels=("a",), rows=[("x",), ("y",)], right=[True])
