"""What is refused, where, and in how many lines; what is accepted."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from flaxlm.config import base
from flaxlm.config.load import config_from_json, config_to_json, load_config
from flaxlm.config.tree import flatten
from flaxlm.errors import ConfigError, DataError, MissingInputError

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = sorted(path for path in (ROOT / "configs").glob("[a-z]*.py"))


def load(*overrides):
  return load_config(ROOT / "configs/base.py", overrides)


@pytest.mark.faults
@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("optim.peak_lr=1", "peak_learning_rate"),
    ("model.seq_len=64", "config.data.seq_len"),
    ("nonsense=1", "a key of"),
    ("num_steps=ten", "a whole number"),
    ("num_steps=1.5", "a whole number"),
    ("num_steps=0", "at least 1"),
    ("num_steps=-3", "at least 1"),
    ("optim.peak_learning_rate=nan", "finite"),
    ("optim.peak_learning_rate=1e400", "finite"),
    ("optim.peak_learning_rate=-1e-3", "finite"),
    ("optim.peak_learning_rate=fast", "a number"),
    ("optim.b2=1", "below 1"),
    ("optim.end_factor=1.5", "at most 1"),
    ("optim.name=adam", "adamw"),
    ("model.use_bias=maybe", "true or false"),
    ("model.num_kv_heads=4", "2 or 3 or 6"),
    ("model.head_dim=63", "64"),
    ("model.unroll=4", "3 or 6"),
    ("data.seq_len=512 model.max_len=256", "max_len=256"),
    ("data.batch_size=15 mesh.fsdp=4", "12 or 16"),
    ("step.accumulation_steps=3", "15 or 18"),
    ("optim.warmup_steps=2000", "num_steps=1000"),
    ("mesh.data=0", "-1"),
    ("data.sources.main.kind=cvs", "csv"),
    ("data.sources.other.kind=text", "data.sources.main.kind"),
    ("mesh.rules.embed=fsdpp", "data fsdp expert"),
    ("seed", "--config.seed=VALUE"),
  ],
)
def test_a_wrong_value_is_refused_in_five_lines(override, message):
  with pytest.raises(ConfigError) as error:
    load(*override.split())
  text = str(error.value)
  assert message in text and len(text.splitlines()) <= 5
  assert text.startswith("config.") or override == "seed"


@pytest.mark.faults
def test_values_are_read_as_the_type_of_the_knob():
  config = load(
    "num_steps=1e3",
    "optim.peak_learning_rate=1e-4",
    "log.tensorboard=false",
    "mesh.rules.embed=fsdp,tensor",
    "mesh.rules.heads=()",
    "model.dtype=bfloat16",
    "tokenizer.user_symbols=<user>",
  )
  assert config.num_steps == 1000 and type(config.num_steps) is int
  assert config.optim.peak_learning_rate == 1e-4 and config.log.tensorboard is False
  assert config.mesh.rules.embed == ("fsdp", "tensor") and config.mesh.rules.heads == ()
  assert config.tokenizer.user_symbols == ("<user>",)


def test_linked_knobs_follow_until_they_are_set():
  assert load("data.seq_len=64").model.max_len == 64
  config = load("model.max_len=512")
  assert (config.model.max_len, config.data.seq_len) == (512, 256)


@pytest.mark.faults
@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("config.optim.peak_lr = 1.0", "peak_lr"),
    ("config.num_steps = 'many'", "num_steps"),
    ("config.optim.b1 = float('nan')", "finite"),
    ("config.model = dict(config.model, heads=3)", "heads"),
    ("config.data.sources.main.pth = 'x'", "pth"),
    ("config.unlock(); config.extra = 1", "extra"),
    ("raise RuntimeError('broken')", "broken"),
    ("import nowhere", "nowhere"),
    ("raise SystemExit(0)", "no SystemExit"),
  ],
)
def test_a_wrong_config_file_is_refused_like_a_wrong_flag(tmp_path, line, message):
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import base\n\ndef get_config():\n  config = base.get_config()\n"
    f"  {line}\n  return config\n"
  )
  with pytest.raises(ConfigError, match=message) as error:
    load_config(file)
  assert len(str(error.value).splitlines()) <= 5


@pytest.mark.faults
def test_a_missing_file_names_those_that_exist():
  with pytest.raises(
    MissingInputError, match=r"(?s)quikstart.py does not exist.*configs/quickstart.py"
  ) as error:
    load_config(ROOT / "configs/quikstart.py")
  assert error.value.exit_code == 66


def test_a_shipped_config_is_found_by_its_bare_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "llama3_8b.py").write_text("raise RuntimeError('not this one')")
  assert load_config("llama3_8b").model.embed_dim == 4096
  with pytest.raises(MissingInputError, match="try:    llama3_8b"):
    load_config("llama3_8")
  (tmp_path / "notes.txt").write_text("no config")
  with pytest.raises(ConfigError, match="another kind of file"):
    load_config("notes.txt")


def test_a_config_builds_on_the_file_beside_it(tmp_path):
  (tmp_path / "wide.py").write_text(
    "from flaxlm.config import base\n\ndef get_config():\n"
    "  config = base.get_config()\n  config.model.mlp_dim = 2048\n  return config\n"
  )
  (tmp_path / "wide.long.py").write_text(
    "def get_config():\n  from . import wide\n  config = wide.get_config()\n"
    "  config.data.seq_len = 512\n  return config\n"
  )
  modules = set(sys.modules)
  config = load_config(tmp_path / "wide.long.py")
  assert (config.model.mlp_dim, config.data.seq_len) == (2048, 512)
  assert set(sys.modules) == modules


def test_a_package_called_configs_of_the_users_is_left_alone(tmp_path):
  """Each import finds its own package; none stays on the path or in sys.modules."""
  package = tmp_path / "configs"
  package.mkdir()
  (package / "__init__.py").write_text("NAME = 'the user'\n")
  mine = tmp_path / "mine.py"
  mine.write_text(
    "from configs import NAME\nfrom flaxlm.config import base\n\ndef get_config():\n"
    "  config = base.get_config()\n  config.init_from = NAME\n  return config\n"
  )
  code = (
    "import sys\nfrom flaxlm.config.load import load_config\npath = sys.path.copy()\n"
    "assert load_config('gpt2_355m').model.num_layers == 24\n"
    "assert 'configs' not in sys.modules\n"
    "assert load_config('mine.py').init_from == 'the user'\nassert path == sys.path\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


def test_a_config_anywhere_may_build_on_the_clone(tmp_path):
  """`from configs import …` works although the clone is not on the path."""
  (tmp_path / "mine.py").write_text("from configs.llama3_8b import get_config\n")
  code = (
    "import sys; from flaxlm.config.load import load_config\n"
    "sys.path.remove(sys.argv[1])\n"
    "assert load_config('mine.py').model.embed_dim == 4096\n"
    "assert sys.argv[1] not in sys.path"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True,
    text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_json(path):
  config = load_config(path)
  again = config_from_json(config_to_json(config))
  assert flatten(again) == flatten(config)
  assert config.is_locked


def test_a_config_stored_by_an_older_version_is_read():
  config = base.get_config()
  stored = json.loads(config_to_json(config))
  stored["step"]["chunk_size"] = 512
  again = config_from_json(json.dumps(stored))
  assert flatten(again) == flatten(config)


def test_a_mixture_survives_json():
  config = base.get_config()
  config.data.sources = base.sources(
    english=base.source("text", "a.txt", weight=2.0), code=base.source()
  )
  again = config_from_json(config_to_json(config), ["data.sources.code.weight=3"])
  assert again.data.sources.english.path == "a.txt"
  assert again.data.sources.code.weight == 3.0


WRONG = {
  "num_steps": ["many", 1.5, 1e26, 10**26, 2**31, True, None, [], {}, [5], {"a": 1}],
  "seed": [-1, 2**32, "0"],
  "data.batch_size": [1e26, 10**26, 2**31 - 1, 0, -1],
  "data.store": [5, None, "a\0b", ["a"]],
  "model.num_layers": [10**9, "6"],
  "model.moe.num_experts": [10**9],
  "model.causal": [1, "true", None],
  "model.layer_pattern": ["local", [5], [["local"]], [None], {}],
  "optim.b1": ["x", 10**4000, None, True, -1],
  "task.labels": [[0, 1], {"0": "a"}],
  "model": [5, [], "x", None],
  "data.sources": [5, [], None, {"main": 5}, {}],
  "data.sources.main.weight": ["x", -1],
  "model.nonsense": [1, {"a": 1}],
}


@pytest.mark.faults
@pytest.mark.parametrize("key", WRONG)
def test_a_stored_value_of_another_kind_or_range_is_refused_by_its_key(key):
  for value in WRONG[key]:
    stored = json.loads(config_to_json(base.get_config()))
    *groups, last = key.split(".")
    tree = stored
    for group in groups:
      tree = tree[group]
    tree[last] = value
    with pytest.raises((ConfigError, DataError)) as caught:
      flat = flatten(config_from_json(json.dumps(stored), (), "runs/a/config.json"))
      raise AssertionError(f"{key}={value!r} became {flat.get(key)!r}")
    assert last in str(caught.value) or " digits" in str(caught.value)


@pytest.mark.parametrize(
  "text",
  ["", "5", "[]", "{", "null", '"x"', "{}", '{"data": 5}', '{"data": {"sources": []}}',
   "[" * 10**5, b"\xff\xfe", '{"a": 1, "a": 2}', '{"seed": NaN}'],
)  # fmt: skip
def test_a_damaged_config_file_is_named(text, tmp_path):
  file = tmp_path / "config.json"
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(DataError, match=r"config\.json"):
    load_config(file)


@pytest.mark.faults
def test_wrong_numbers_are_refused_at_once():
  """The divisors that a message offers are not searched for one by one."""
  started = time.process_time()
  for override in ("num_heads=2147483646", "num_layers=9999", "head_dim=2147483647"):
    with pytest.raises(ConfigError):
      load_config("quickstart", [f"model.{override}", "model.unroll=7"])
  assert time.process_time() - started < 5


CONFIG = "from flaxlm.config.base import get_config\n"


@pytest.mark.faults
def test_a_config_that_others_may_write_is_not_run(tmp_path):
  tmp_path.chmod(0o755)
  file, other = tmp_path / "mine.py", tmp_path / "other.py"
  file.write_text("from . import other\n" + CONFIG)
  other.write_text("")
  for path, mode, refused in (
    (file, 0o644, False),
    (file, 0o666, True),
    (file, 0o602, True),
    (other, 0o646, True),
    (tmp_path, 0o777, True),
    (tmp_path, 0o1777, False),
  ):
    before = path.stat().st_mode
    path.chmod(mode)
    if refused:
      with pytest.raises(ConfigError, match=r"others may change(.|\n)*--allow"):
        load_config(file)
      load_config(file, (), True)
    else:
      load_config(file)
    path.chmod(before)
  (tmp_path / "unused.py").write_text("")
  (tmp_path / "unused.py").chmod(0o666)
  load_config(file)


def test_a_stored_config_runs_nothing_whoever_may_write_it(tmp_path):
  file = tmp_path / "config.json"
  file.write_text(config_to_json(base.get_config()))
  file.chmod(0o666)
  load_config(file)


@pytest.mark.parametrize(
  "value",
  ["(5)", "[" * 5000, "(" * 5000 + ")" * 5000, "(1/0)", "[a]", "({},)", "-" * 5000,
   "\udcff", "a,\udcff"],
)  # fmt: skip
def test_lists_that_are_none_are_refused(value):
  with pytest.raises(ConfigError, match=r"task\.labels"):
    load_config("quickstart", [f"task.labels={value}" if value[0] != "-" else
                               f"task.labels=({value}1,)"])  # fmt: skip


@pytest.mark.parametrize("body", ["return 5", "return None", "return {}", "import x.y"])
def test_a_config_file_that_gives_no_config_is_named(body, tmp_path):
  (tmp_path / "mine.py").write_text(f"def get_config():\n  {body}\n")
  with pytest.raises(ConfigError, match=r"mine\.py"):
    load_config(tmp_path / "mine.py")
