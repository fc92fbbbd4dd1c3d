"""Counters of a server, in the text format of Prometheus."""

import bisect
import collections
import time

_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds
_HELP = {
  "time_to_first_token_seconds": "from the request to its first token",
  "inter_token_latency_seconds": "between tokens of a text, on average",
  "e2e_request_latency_seconds": "from the request to its end",
}


class Metrics:
  """What a server has done since it started."""

  def __init__(self):
    self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
    self._histograms = {name: [0] * (len(_BOUNDS) + 1) for name in _HELP}
    self._sums = dict.fromkeys(_HELP, 0.0)

  def count(self, name: str, labels: str = "", by: int = 1) -> None:
    self.counts[name, labels] += by

  def observe(self, name: str, seconds: float) -> None:
    self._histograms[name][bisect.bisect_left(_BOUNDS, seconds)] += 1
    self._sums[name] += seconds

  def ended(self, request) -> None:
    """Counts a request that has ended."""
    now, made = time.monotonic(), len(request.tokens)
    self.count("request_success_total", f'{{finished_reason="{request.finish}"}}')
    self.count("prompt_tokens_total", by=len(request.prompt))
    self.count("generation_tokens_total", by=made)
    self.count("prefix_cache_hits_total", by=request.reused)
    self.observe("e2e_request_latency_seconds", now - request.asked_at)
    if request.first_at:
      wait = request.first_at - request.asked_at
      self.observe("time_to_first_token_seconds", wait)
      if made > 1:
        mean = (now - request.first_at) / (made - 1)
        self.observe("inter_token_latency_seconds", mean)

  def text(self, gauges: dict[str, float]) -> str:
    """Returns all of it, with the values of now."""
    lines = []
    for name, value in gauges.items():
      lines += [f"# TYPE flaxlm_{name} gauge", f"flaxlm_{name} {value:g}"]
    for (name, labels), value in sorted(self.counts.items()):
      kind = f"# TYPE flaxlm_{name} counter"
      lines += [kind] * (kind not in lines) + [f"flaxlm_{name}{labels} {value}"]
    for name, counts in self._histograms.items():
      lines += [f"# HELP flaxlm_{name} {_HELP[name]}"]
      lines += [f"# TYPE flaxlm_{name} histogram"]
      total = 0
      for bound, number in zip((*_BOUNDS, "+Inf"), counts, strict=True):
        total += number
        lines.append(f'flaxlm_{name}_bucket{{le="{bound}"}} {total}')
      lines += [
        f"flaxlm_{name}_sum {self._sums[name]:g}",
        f"flaxlm_{name}_count {total}",
      ]
    return "\n".join(lines) + "\n"
