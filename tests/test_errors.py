"""Messages: their lines, and what a hostile value in one can do to a terminal."""

import pytest

from flaxlm import errors
from flaxlm.config.load import load_config

HOSTILE = {
  "a command to the terminal": "\x1b]0;title\x07\x1b[2J",
  "a C1 command": "\x9b2J",
  "the end of a line": "a\nneeded: anything\r\x0b\x85",
  "other line separators": "\u2028\u2029",
  "text that runs backwards": "\u202e\u2066",
  "half of a pair": "\ud800",
}


@pytest.mark.faults
@pytest.mark.parametrize("case", HOSTILE)
def test_values_in_a_message_are_harmless_text(case):
  value = HOSTILE[case]
  error = errors.DataError("x", value, value, value)
  assert len(error.args[0].split("\n")) == 4
  for text in (str(error), errors.terminal_text(errors.ConfigError(value, 1, "2"))):
    shown = "".join(text.split("\n"))
    assert shown.isprintable() and shown.encode()
  assert errors.printable("\x1b[1m") == "\\x1b[1m"
  assert errors.printable("\U0001f600 ä 文") == "\U0001f600 ä 文"


def test_long_values_are_cut_in_the_middle():
  error = errors.ConfigError("k" * 10**6, "g" * 10**6, "n" * 10**6, "h" * 10**6)
  assert len(str(error)) < 8000
  line = str(errors.DataError("x", "a" * 500 + "b" * 500)).split("\n")[1]
  assert "aaa ... 600 characters ... bbb" in line


def test_what_the_system_refuses_is_told_apart():
  def code(number, **how):
    error = OSError(number, "reason", "a/b")
    return errors.storage_failure("a", error, **how).exit_code

  assert [code(2), code(13), code(28), code(30)] == [66, 74, 74, 73]
  assert [code(n, writing=True) for n in (2, 13, 20, 21, 28, 5)] == [73] * 4 + [74] * 2


# Put together here, so that no scanner takes them for real ones.
SECRETS = [
  "s3://me:" + "pass%2Fword@bucket/x",
  "hf_" + "aB3" * 11,
  "ghp_" + "aB3" * 12,
  "sk-" + "aB3" * 10,
  "AKIA" + "ABCD" * 4,
]


@pytest.mark.faults
@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_masked_in_messages_and_kept_out_of_configs(secret):
  shown = str(errors.DataError(f"a {secret} b", secret, secret, secret))
  assert shown.count("[secret]") == 4 and "aB3" not in shown and "pass" not in shown
  for key in ("data.store", "data.sources.main.path", "task.labels", "init_from"):
    with pytest.raises(errors.ConfigError, match="no password or token") as caught:
      load_config("quickstart", [f"{key}={secret}"])
    assert secret not in str(caught.value)


def test_paths_that_look_a_little_like_secrets_are_left_alone():
  for text in ("data/sk-learn-data-sets-2020", "hf_datasets_wikipedia_2026_11", "a:b@c",
               "gs://bucket/a@b:c", "s3://bucket:x/y"):  # fmt: skip
    assert errors.printable(text) == text
    load_config("quickstart", [f"data.store={text}"])
