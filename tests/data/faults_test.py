import logging

import pytest

from lavit_jax import errors
from lavit_jax.data import faults


def test_each_bad_sample_is_named_once_and_counted_every_time(caplog):
  log = faults.FaultLog("pictures", 1.0)
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      log.fault("a.jpg", "cut off")
  assert caplog.text.count("a.jpg") == 1
  assert "cut off" in caplog.text
  assert (log.bad, log.seen) == (3, 3)
  assert "a.jpg" in log.summary()


def test_a_run_stops_past_the_share_and_not_before():
  log = faults.FaultLog("pictures", 0.1)
  log.good(270)
  for i in range(30):
    log.fault(f"{i}.jpg", "bad")
  with pytest.raises(
    errors.DataError, match=r"31 of 301 pictures.*0\.1.*0\.jpg"
  ):
    log.fault("30.jpg", "bad")


def test_a_few_bad_samples_at_the_start_stop_nothing():
  log = faults.FaultLog("pictures", 0.1)
  for i in range(50):
    log.fault(f"{i}.jpg", "bad")
  with pytest.raises(errors.DataError):
    log.check()


def test_share_must_be_a_share():
  with pytest.raises(errors.ConfigError, match=r"limit_share=1\.5"):
    faults.FaultLog("pictures", 1.5)
