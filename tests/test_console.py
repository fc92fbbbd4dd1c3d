"""Numbers and durations in a form that is easy to read."""

from flaxlm import console


def test_short_numbers_and_durations():
  shown = [
    console.short_number(n) for n in (0, 12.3, 999, 999_600, 1234, 124e6, 3.2e12)
  ]
  assert shown == ["0", "12.3", "999", "1M", "1.23k", "124M", "3.2T"]
  times = [console.duration(s) for s in (0.2, 59.4, 59.6, 61, 3600, 90000, 200000)]
  assert times == ["0s", "59s", "1m00s", "1m01s", "1h00m", "25h00m", "2d07h"]
