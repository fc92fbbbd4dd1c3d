"""The output of a plan, for people and for programs."""

import json
import re
from xml.etree import ElementTree

import pytest

from configs import gpt2_124m
from flaxlm.parallel import AXES
from flaxlm.parallel.hardware import parse_hardware
from flaxlm.planning import page as pages
from flaxlm.planning import scaling, table
from flaxlm.planning.collectives import expected_collectives
from flaxlm.planning.roofline import budget, predict

SIZES = dict.fromkeys(AXES, 1) | {"fsdp": 8}


@pytest.fixture
def plan():
  config, hardware = gpt2_124m.get_config(), parse_hardware("h100x8")
  messages = expected_collectives(config, SIZES, hardware)
  found = predict(config, SIZES, hardware, messages)
  return table.Plan(
    "<gpt2> & co", "h100x8", SIZES, "counted",
    {"parameters": 2**30, "temporaries": 3 * 2**30}, 80e9, messages, found,
    budget(found, hardware, 1e10), ("a <note>",),
  )  # fmt: skip


def test_the_table_tells_all(plan):
  text = table.plan_table(plan)
  for part in ("fits", "4.00 GiB of 74.51 GiB", "all-gather", "USD", "kWh", "assumed"):
    assert part in text
  assert re.search(r"step +[\d.]+ \([\d.]+ to [\d.]+\) s", text)
  assert re.search(r"fits +yes", text)
  small = plan._replace(available=2**31)
  assert re.search(r"fits +NO", table.plan_table(small)) and not small.fits


def test_json_has_plain_values(plan):
  found = json.loads(json.dumps(table.plan_to_json(plan), allow_nan=False))
  assert found["fits"] is True and found["memory"]["parameters"] == 2**30
  assert found["prediction"]["mid"] == plan.prediction.mid
  assert found["collectives"][0]["link"] == "nvlink"
  assert json.loads(json.dumps(table.plan_to_json(plan._replace(budget=None))))


@pytest.mark.faults
def test_the_page_stands_alone_and_escapes(plan):
  page = pages.plan_page(plan)
  assert "&lt;gpt2&gt; &amp; co" in page and "<gpt2>" not in page
  assert "a &lt;note&gt;" in page
  assert not re.search(r"(src|href)=|https?://|<script", page)
  drawings = re.findall(r"<svg.*?</svg>", page, re.S)
  assert len(drawings) == 2
  memory, _ = map(ElementTree.fromstring, drawings)
  bars = [r for r in memory.iter("rect") if r.find("title") is not None]
  widths = [float(r.get("width")) for r in bars]
  assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
  limit = next(memory.iter("line"))
  assert widths[0] / (float(limit.get("x1")) - 110) == pytest.approx(
    2**30 / 80e9, rel=0.02
  )


def test_bars_reach_past_a_limit_that_is_too_small():
  drawing = ElementTree.fromstring(
    pages.bars([("per chip", {"x": 3.0, "y": 1.0})], 2.0, "limit", str)
  )
  limit = next(drawing.iter("line"))
  assert float(limit.get("x1")) == 110 + 320


def test_numbers_keep_three_digits():
  assert table.digits(0.012345) == "0.0123"
  assert table.digits(12345.6) == "12,346"
  assert table.band(1.5, 2, 3.25, "s") == "2.00 (1.50 to 3.25) s"


def test_weak_scaling_as_table_and_plot():
  def config_for(n):
    config = gpt2_124m.get_config()
    config.step.accumulation_steps = 1
    config.data.batch_size = 8 * n
    return config, dict.fromkeys(AXES, 1) | {"fsdp": n}

  found = scaling.scaling(
    config_for, lambda n: parse_hardware(f"h100x{n}"), (8, 64, 512)
  )
  rates = [one.tokens_per_second for _, one in found]
  assert rates == sorted(rates)
  lines = scaling.scaling_table(found).splitlines()
  assert len(lines) == 4 and "100%" in lines[1]
  each = [one.tokens_per_second / n for n, one in found]
  assert each[0] > each[2]  # the network is slower than NVLink
  page = pages.scaling_page("<plan>", {"gpt2 <124M>": found})
  assert "&lt;plan&gt;" in page and "gpt2 &lt;124M&gt;" in page
  drawing = ElementTree.fromstring(re.search(r"<svg.*</svg>", page, re.S).group())
  assert len(list(drawing.iter("polyline"))) == 2
