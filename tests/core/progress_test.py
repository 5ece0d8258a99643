"""Progress: lines in a log and in a terminal, with a clock that tests set."""

import io
import re

import pytest

from lavit_jax.core import progress


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock():
  return Clock()


def run(bar, clock, steps, *, seconds=1.0, wait=0.25):
  for step in steps:
    with bar.waiting():
      clock.now += wait * seconds
    clock.now += (1 - wait) * seconds
    bar.update(step, examples=8, tokens=600, metrics={"loss": 1 / step})


def test_a_log_gets_complete_lines_without_carriage_returns(clock):
  stream = io.StringIO()
  with progress.Progress(
    35, label="pixels", every=10, stream=stream, clock=clock
  ) as bar:
    run(bar, clock, range(1, 36))
  lines = stream.getvalue().splitlines()
  assert "\r" not in stream.getvalue()
  assert "\x1b" not in stream.getvalue()
  assert [line.split()[2] for line in lines] == [
    "10/35", "20/35", "30/35", "35/35",
  ]  # fmt: skip
  assert lines[1] == (
    "pixels  57%  20/35  20s gone  15s left  8 ex/s  600 tok/s  data wait 25%"
    "  loss 0.05"
  )
  assert lines[-1].startswith("pixels 100%  35/35  35s gone  8 ex/s")


def test_a_terminal_line_is_redrawn_in_place_and_fits(clock, monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  stream = Terminal()
  with progress.Progress(4, label="vq", stream=stream, clock=clock) as bar:
    run(bar, clock, range(1, 5))
  text = stream.getvalue()
  assert text.count("\n") == 1
  assert text.endswith("\n")
  drawn = [line.removesuffix("\x1b[K") for line in text.split("\r")[1:]]
  assert all(len(line.rstrip("\n")) <= 59 + len("\x1b[K") for line in drawn)
  assert re.search("█{12}░{12}", drawn[1])
  assert "100%" in drawn[3]
  assert "█" * 24 in drawn[3]


def test_the_first_step_and_pauses_are_left_out_of_the_rates(clock):
  bar = progress.Progress(10, stream=io.StringIO(), clock=clock)
  clock.now += 500  # compilation
  bar.update(1, examples=8)
  assert bar.rates() == {}
  clock.now += 2
  with bar.paused():
    clock.now += 60  # evaluation
  bar.update(2, examples=8, tokens=10)
  assert bar.rates() == {
    "steps_per_second": 0.5,
    "examples_per_second": 4.0,
    "tokens_per_second": 5.0,
    "data_wait_share": 0.0,
  }


def test_rates_follow_the_last_half_minute(clock):
  bar = progress.Progress(1000, stream=io.StringIO(), clock=clock)
  run(bar, clock, range(1, 21), seconds=10.0)
  run(bar, clock, range(21, 200), seconds=0.5)
  assert bar.rates()["steps_per_second"] == pytest.approx(2.0)
  assert bar.rates()["data_wait_share"] == pytest.approx(0.25)


def test_rates_of_a_resumed_run_count_only_its_new_steps(clock):
  stream = io.StringIO()
  bar = progress.Progress(100, start=90, every=1, stream=stream, clock=clock)
  run(bar, clock, range(91, 96), seconds=2.0)
  last = stream.getvalue().splitlines()[-1]
  assert last.startswith("95%  95/100  10s gone  10s left  4 ex/s")


def test_a_printed_line_does_not_break_the_bar(clock):
  stream = Terminal()
  bar = progress.Progress(4, stream=stream, clock=clock)
  run(bar, clock, [1])
  bar.print("skipped bad.jpg")
  assert "\r\x1b[Kskipped bad.jpg\n\r" in stream.getvalue()
  log = io.StringIO()
  progress.Progress(4, stream=log, clock=clock).print("skipped bad.jpg")
  assert log.getvalue() == "skipped bad.jpg\n"


def test_a_stage_of_no_steps_prints_nothing(clock):
  stream = io.StringIO()
  progress.Progress(0, stream=stream, clock=clock).close()
  assert stream.getvalue() == ""


@pytest.mark.parametrize(
  ("seconds", "words"),
  [(0, "0s"), (59.6, "1m00s"), (150, "2m30s"), (3599.7, "1h00m"), (-1, "0s")],
)
def test_durations_round_without_a_sixty(seconds, words):
  assert progress.duration(seconds) == words


@pytest.mark.parametrize(
  ("value", "words"),
  [(0.5, "0.5"), (12.34, "12.3"), (999.7, "1k"), (1234, "1.23k"), (5e7, "50M")],
)
def test_quantities_have_three_digits(value, words):
  assert progress.quantity(value) == words


def test_a_log_says_that_the_step_is_compiled(clock):
  stream = io.StringIO()
  with progress.Progress(9, label="pixels", stream=stream, clock=clock) as bar:
    bar.compiling()
    assert stream.getvalue().startswith("pixels: compiling the step")
    run(bar, clock, range(1, 10), seconds=2.0)
  _, *others = stream.getvalue().splitlines()
  assert others
  assert not [line for line in others if "compiling" in line]


def test_a_terminal_shows_compiling_until_the_first_step_is_done(clock):
  stream = Terminal()
  bar = progress.Progress(9, label="pixels", stream=stream, clock=clock)
  bar.compiling()
  assert stream.getvalue().endswith("\x1b[K")
  run(bar, clock, range(1, 3))
  shown = stream.getvalue().split("\r")[1:]
  assert "compiling" in shown[0]
  assert len(shown) == 3
  bar.close()


def test_an_interrupted_compilation_ends_its_line(clock):
  stream = Terminal()
  with progress.Progress(9, label="pixels", stream=stream, clock=clock) as bar:
    bar.compiling()
  assert stream.getvalue().endswith("\n")
