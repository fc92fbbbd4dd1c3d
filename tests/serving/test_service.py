"""Whatever a client sends, it gets an answer or an error object."""

import asyncio
import signal
import subprocess
import sys

import pytest

from tests import quick
from tests.test_open_model import save_run

GREEDY = {"model": "tiny", "temperature": 0}


def test_any_json_gets_an_answer_or_an_error_object(served):
  hypothesis = pytest.importorskip("hypothesis")
  from hypothesis import strategies as some

  number = some.integers(-3, 40) | some.floats(-2, 3) | some.just(10**30)
  value = some.recursive(
    some.none() | some.booleans() | number | some.text(max_size=8),
    lambda inner: (
      some.lists(inner, max_size=3)
      | some.dictionaries(some.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
  )
  names = [
    "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "seed",
    "stop", "logit_bias", "logprobs", "top_logprobs", "echo", "stream_options",
    "stop_token_ids", "ignore_eos", "input", "tokens", "model", "best_of",
  ]  # fmt: skip
  message = some.fixed_dictionaries(
    {}, optional={"role": some.sampled_from(["user", "system", "x"]), "content": value}
  )
  body = some.fixed_dictionaries(
    {}, optional={name: value for name in names}
  ) | some.fixed_dictionaries(
    {"prompt": some.text(max_size=5), "messages": some.lists(message, max_size=2)},
    optional={name: value for name in names if name not in ("prompt", "messages")},
  )
  path = some.sampled_from(
    ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize",
     "/detokenize", "/classify", "/fill-mask"]
  )  # fmt: skip

  @hypothesis.settings(
    max_examples=80, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )  # fmt: skip
  @hypothesis.given(path, body)
  def send(path, body):
    status, found = served.post(path, body)
    assert status in (200, 400, 404)
    if status != 200:
      assert found["error"]["message"] and found["error"]["type"]

  send()


def test_an_async_client_stops_in_the_middle(served):
  openai = pytest.importorskip("openai")

  async def read_three() -> int:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="x") as client:
      stream = await client.completions.create(
        **GREEDY, prompt="It was", max_tokens=90, stream=True
      )
      count = 0
      async with stream:
        async for _ in stream:
          count += 1
          if count == 3:
            break
      return count

  assert asyncio.run(read_three()) == 3
  served.wait_until_idle()


def test_lm_eval_over_http_finds_what_the_library_finds(served, writer):
  """With the server's tokenizer: the client has none."""
  pytest.importorskip("lm_eval")
  from lm_eval.api.instance import Instance
  from lm_eval.models.openai_completions import LocalCompletionsAPI

  pairs = [
    ("It was the", " best of times"),
    ("Once", " upon a time"),
    ("A", " cold day"),
  ]
  model = LocalCompletionsAPI(
    base_url=f"{served.url}/completions", model="tiny", tokenizer_backend="remote",
    max_length=90, batch_size=2,
  )  # fmt: skip
  requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
  found = model.loglikelihood(requests)
  # lm-eval asks a remote tokenizer for no token that begins a text.
  begin = len(writer.tokenizer.begin_ids)
  ids = [writer.encode_pair(*pair) for pair in pairs]
  scores = writer.score([(context[begin:], after) for context, after in ids])
  for (log_p, is_greedy), score in zip(found, scores, strict=True):
    assert log_p == pytest.approx(score.log_p, abs=1e-4)
    assert is_greedy == score.is_greedy


@pytest.mark.slow
def test_the_command_serves_a_run_and_drains_on_sigterm(tiny, bpe, tmp_path):
  openai = pytest.importorskip("openai")
  tiny.model.update(max_len=96, vocab_size=bpe.vocab_size)
  save_run(tiny, tmp_path / "run", bpe)
  command = [sys.executable, "-m", "flaxlm.serve", f"--workdir={tmp_path}/run"]
  process = subprocess.Popen(
    [*command, "--port=0", "--slots=2"], stdout=subprocess.PIPE, text=True,
    env=quick.environment(),
  )  # fmt: skip
  try:
    started = (line for line in process.stdout if line.startswith("serving"))
    address = next(started).split()[-1]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
    stream = client.completions.create(
      model=client.models.list().data[0].id, prompt="a", max_tokens=60, temperature=0,
      stream=True, extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = [next(stream)]
    process.send_signal(signal.SIGTERM)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert process.wait(60) == 0
  finally:
    process.kill()
    process.communicate()


def test_a_stranger_needs_a_key():
  from flaxlm import serve
  from flaxlm.errors import ConfigError

  with pytest.raises(ConfigError, match="--api_key_file"):
    serve.main(["--workdir=nowhere", "--host=0.0.0.0"])
