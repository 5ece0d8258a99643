import logging

import pytest

from lavit_jax.core import errors
from lavit_jax.data import faults


def test_each_bad_sample_is_logged_once_and_counted_every_time(caplog):
  log = faults.FaultLog("images", 1.0)
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      log.fault("a.jpg", "cut off")
  assert caplog.text.count("a.jpg") == 1
  assert "cut off" in caplog.text
  assert (log.bad, log.seen) == (3, 3)
  assert "a.jpg" in log.summary()


def test_a_run_stops_above_the_share_and_not_before():
  log = faults.FaultLog("images", 0.1)
  log.good(270)
  for i in range(30):
    log.fault(f"{i}.jpg", "bad")
  with pytest.raises(errors.DataError, match=r"31 of 301 images.*0\.1.*0\.jpg"):
    log.fault("30.jpg", "bad")


def test_a_few_bad_samples_at_the_start_do_not_stop_the_run():
  log = faults.FaultLog("images", 0.1)
  for i in range(50):
    log.fault(f"{i}.jpg", "bad")
  with pytest.raises(errors.DataError):
    log.check()


def test_a_tally_only_logs_the_count(caplog):
  log = faults.Tally("long ones")
  with caplog.at_level(logging.INFO):
    for i in range(300):
      log.count(f"doc {i}", "split")
  assert log.seen == 300
  assert log.summary() == "300 long ones, such as doc 0 (split)"
  warned = [r for r in caplog.records if r.levelno == logging.WARNING]
  assert [r.getMessage()[:4].strip() for r in warned] == ["1 lo", "100"]
  assert len(caplog.records) < 60


def test_a_share_must_be_between_0_and_1():
  with pytest.raises(errors.ConfigError, match=r"limit_share=1\.5"):
    faults.FaultLog("images", 1.5)
