"""The command `flaxlm.plan`: what it prints, the change that fits, the search.

tests/planning compiles; here memory is counted, or the compiler is faked.
"""

import json
import math

import pytest

from flaxlm import plan
from flaxlm.config.load import config_to_json
from flaxlm.errors import ConfigError, MissingInputError, OutputError
from flaxlm.parallel.hardware import parse_hardware
from flaxlm.planning import calibrate, search
from flaxlm.planning.compile import Compiled, count_step

LLAMA = "--config=configs/llama2_7b.py"
GPUS = parse_hardware("h100x8")


@pytest.fixture
def small(tiny):
  """A config that fits easily on eight GPUs, so that there is a choice."""
  tiny.model.num_kv_heads = 4
  tiny.data.batch_size = 64
  tiny.model.dtype = "bfloat16"
  return tiny


def play(limit: float):
  """Returns a fake compiler: steps fit if a pass has fewer tokens than `limit`."""
  tried = []

  def step(config, hardware):
    result = count_step(config, hardware)
    tokens = config.data.batch_size * config.data.seq_len
    tokens /= config.step.accumulation_steps * result.sizes["tensor"]
    tokens /= 2 if config.model.remat == "full" else 1
    tried.append(config)
    return result._replace(memory={"all": tokens}, available=limit)

  return step, tried


def test_a_plan_is_a_table_or_json_and_a_page(capsys, tmp_path):
  page = tmp_path / "plan.html"
  command = [LLAMA, "--hardware=h100x64", f"--html={page}", "--tokens=1e12"]
  plan.main([*command, "--price=2"])
  text = capsys.readouterr().out
  for part in ("llama2_7b on h100x64", "fsdp 64", "MFU", "USD", "bound by"):
    assert part in text
  assert "<svg" in page.read_text()
  plan.main([*command, "--price=4", "--json"])
  (found,) = json.loads(capsys.readouterr().out)
  assert found["fits"] and found["how"] == "counted"
  hours = found["budget"]["device_hours"][1]
  assert found["budget"]["cost"][1] == pytest.approx(4 * hours)
  seconds = found["prediction"]["mid"] * 1e12 / found["prediction"]["tokens"]
  assert hours == pytest.approx(64 * seconds / 3600)


def test_several_configs_are_one_line_each(capsys):
  plan.main(
    [LLAMA, "--config=configs/mistral_7b.py", "--hardware=h100x64", "--no_compile"]
  )
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].startswith("| llama2_7b | h100x64 | fsdp 64 | yes |")
  assert len(lines) == 4 and {line.count("|") for line in lines} == {9}


def test_weak_scaling_keeps_the_rows_of_a_chip(capsys, tmp_path):
  page = tmp_path / "scaling.html"
  config = "--config=configs/gpt3_175b.py"
  plan.main([config, "--scaling", f"--html={page}"])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("gpt3_175b on v5p")
  counts = ["8", "32", "128", "512", "2,048", "8,192"]
  assert [line.split()[0] for line in lines[2:]] == counts
  assert "<svg" in page.read_text()
  # Beyond the largest slice, a slow network joins slices and efficiency falls.
  plan.main([LLAMA, "--hardware=v5e:8x8", "--scaling"])
  rates = [line.split()[5] for line in capsys.readouterr().out.splitlines()[2:]]
  small, large = (float(rate.replace(",", "")) for rate in (rates[2], rates[-1]))
  assert 0.5 * small < large < 1.01 * small


def test_overrides_and_the_hardware_of_the_config(capsys, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import llama2_7b\n\n\ndef get_config():\n"
    "  config = llama2_7b.get_config()\n  config.hardware = 'h100x64'\n"
    "  return config\n"
  )
  plan.main(
    [f"--config={file}", "--config.mesh.fsdp=32", "--config.step.accumulation_steps=16"]
  )
  text = capsys.readouterr().out
  assert "mine on h100x64" in text and "data 2 x fsdp 32" in text
  with pytest.raises(ConfigError, match=r"--hardware(.|\n)*config.hardware"):
    plan.main(["--config=configs/quickstart.py", "--config.hardware="])
  with pytest.raises(ConfigError, match="--config"):
    plan.main([])
  with pytest.raises(ConfigError, match="the 32 devices"):
    plan.main([LLAMA, "--hardware=h100x32"])


def test_what_does_not_fit_is_given_lines_to_paste(capsys):
  command = [LLAMA, "--hardware=h100x64", "--config.step.accumulation_steps=1"]
  command.append("--config.data.batch_size=2048")
  plan.main(command)
  text = capsys.readouterr().out
  assert "fits" in text and "NO" in text
  lines = text.split("The smallest change that fits")[1].splitlines()[1:]
  changes = [line.strip().removeprefix("config.").replace(" ", "") for line in lines]
  assert changes == ["step.accumulation_steps=2"]
  plan.main([*command, *(f"--config.{change}" for change in changes)])
  assert "smallest change" not in capsys.readouterr().out


def test_the_smallest_change_is_the_first_that_the_compiler_takes(small):
  tokens = 64 * 32
  for limit, expected in (
    (tokens / 4, {"step.accumulation_steps": 4}),  # passes of fewer rows come first
    (tokens / 8, {"step.accumulation_steps": 8}),  # down to one row per device
    (tokens / 16, {"step.accumulation_steps": 8, "model.remat": "full"}),
    (
      tokens / 64,  # then wider meshes, a row on two devices
      {
        "step.accumulation_steps": 16,
        "model.remat": "full",
        "mesh.data": 1,
        "mesh.fsdp": 4,
        "mesh.tensor": 2,
      },
    ),
  ):
    step, tried = play(limit)
    found = search.nearest_that_fits(small, GPUS, step)
    assert {key: found.changes[key] for key in expected} == expected
    assert set(found.changes) <= set(expected)
    assert [found.compiled.fits, len(tried) > 0] == [True, True]
  step, tried = play(1.0)
  assert search.nearest_that_fits(small, GPUS, step) is None
  assert len({config_to_json(config) for config in tried}) == len(tried)


def test_the_search_uses_every_chip_and_puts_the_fastest_first(small):
  meshes = list(search.meshes(small, GPUS))
  assert len(meshes) > 8
  for mesh in meshes:
    sizes = [size for key, size in mesh.items() if key.startswith("mesh.")]
    assert math.prod(sizes) == 8
  found = search.search(small, GPUS, count_step)
  assert 1 < len(found) <= 6
  times = [one.prediction.mid for one in found]
  assert times == sorted(times)
  slow = search.try_change(small, GPUS, {"step.accumulation_steps": 8}, count_step)
  assert times[0] < slow.prediction.mid
  # The lines are changes that lead to the config that was judged.
  best = search.changed(small, found[0].changes)
  assert search.judge(best, GPUS, count_step)[1] == found[0].prediction
  assert search.difference(small, GPUS, found[0].changes) == found[0].changes


def test_the_search_takes_the_compilers_word(small):
  step, tried = play(64 * 32 / 8)
  found = search.search(small, GPUS, step, compiles=4)
  assert len(tried) <= 8 and all(one.compiled.fits for one in found)
  assert all(isinstance(one.compiled, Compiled) for one in found)


def test_the_search_goes_on_after_what_does_not_fit_or_breaks_the_compiler(small):
  first = search.search(small, GPUS, count_step, compiles=1)[0].compiled
  factor, tried = 2 * first.available / first.peak, []

  def step(config, hardware):
    result = count_step(config, hardware)
    tried.append(result.peak)
    if len(tried) == 2:
      raise ConfigError("config.mesh", "x", "a step that libtpu can compile", "y")
    return result._replace(memory={"all": factor * result.peak})

  found = search.search(small, GPUS, step, compiles=2)
  assert found and len(tried) > 2
  # The fastest did not fit, which shows what is too large.
  assert tried[0] == first.peak and all(peak <= first.peak / 2 for peak in tried[1:])
  assert all(one.compiled.fits for one in found)


@pytest.mark.parametrize(
  ("changes", "axes"),
  [
    ({"model.moe.num_experts": 8, "model.moe.experts_per_token": 2}, "expert"),
    ({"model.max_len": 65_536, "data.seq_len": 65_536}, "context"),
  ],
)
def test_the_search_knows_when_an_axis_is_worth_a_thought(small, changes, axes):
  assert {mesh[f"mesh.{axes}"] for mesh in search.meshes(small, GPUS)} == {1}
  config = search.changed(small, changes)
  assert {mesh[f"mesh.{axes}"] for mesh in search.meshes(config, GPUS)} >= {1, 2, 4, 8}


def test_this_machine_is_planned_for_when_it_was_measured(
  capsys, tmp_path, small, monkeypatch
):
  config = tmp_path / "config.json"
  config.write_text(config_to_json(small))
  command = [f"--config={config}", f"--calibration={tmp_path / 'here.json'}"]
  with pytest.raises(MissingInputError, match="--calibrate"):
    plan.main([*command, "--hardware=this"])
  seconds = [[*calibrate.SQUARE_KEY, 0.1], [*calibrate.COPY_KEY, 0.1]]
  measured = {
    "device_kind": "cpu",
    "platform": "cpu",
    "num_devices": 8,
    "link_bandwidth": 1e9,
    "dispatch_seconds": 1e-3,
    "seconds": seconds,
  }
  monkeypatch.setattr(calibrate, "measure", lambda config_list: measured)
  plan.main([*command, "--calibrate"])
  plan.main([*command, "--hardware=this", "--no_compile"])
  assert "config on this" in capsys.readouterr().out


@pytest.mark.faults
@pytest.mark.parametrize("flag", ["--html", "--calibration"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(flag, tmp_path):
  (tmp_path / "file").write_text("")
  more = ["--calibrate"] if flag == "--calibration" else []
  for place in (tmp_path, tmp_path / "file" / "x", tmp_path / "absent" / "x"):
    with pytest.raises(OutputError, match=f"{flag}=.* cannot be written"):
      plan.main(["--config=quickstart", f"{flag}={place}", *more])
