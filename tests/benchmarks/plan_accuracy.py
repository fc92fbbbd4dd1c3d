"""The step time that `plan` predicts for this machine, against the measured one.

  python tests/benchmarks/plan_accuracy.py [--sizes char] [--turns 3]

The sizes are those of peers.py. Each turn calibrates the operations and then times the
step, so that both see the same machine; the median ratio is shown.
"""

import argparse
import statistics
import sys

from train_speed import Peer, peers  # makes this clone importable

from flaxlm.parallel import AXES
from flaxlm.planning import calibrate, roofline


def compare(name: str) -> tuple[float, roofline.Prediction]:
  """Returns (measured seconds of a step, Prediction) of one turn."""
  config = peers.config_of(name)
  machine = calibrate.measured_hardware(calibrate.measure([config]))
  peer = Peer("flaxlm", name)
  seconds = statistics.median(1 / peer.turn(1.0) for _ in range(3))
  peer.end()
  found = roofline.predict(config, dict.fromkeys(AXES, 1), machine)
  return seconds, found


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  sizes = list(peers.SIZES)
  parser.add_argument("--sizes", nargs="*", default=sizes, choices=sizes)
  parser.add_argument("--turns", type=int, default=3)
  args = parser.parse_args()
  print(
    f"{'size':<12}{'measured':>10}{'predicted':>11}{'ratio':>7}  of each turn; terms"
  )
  worst = 0.0
  for name in args.sizes:
    turns = [compare(name) for _ in range(args.turns)]
    ratios = [found.mid / seconds for seconds, found in turns]
    ratio = statistics.median(ratios)
    seconds, found = turns[ratios.index(ratio)] if args.turns % 2 else turns[0]
    terms = ", ".join(f"{n} {s:.4f}" for n, s in found.terms.flat().items() if s)
    print(
      f"{name:<12}{seconds:>9.4f}s{found.mid:>10.4f}s{ratio:>7.2f}  "
      + " ".join(f"{r:.2f}" for r in ratios)
      + f"; {terms}",
      flush=True,
    )
    worst = max(worst, abs(ratio - 1))
  print(f"worst error {worst:.0%}")
  return int(worst > 0.3)


if __name__ == "__main__":
  sys.exit(main())
