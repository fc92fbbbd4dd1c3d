"""What clients of OpenAI's API see, and what they may not do."""

import dataclasses
import json
import socket
import threading
import time

import numpy as np
import pytest
from flax import nnx

from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.serving.app import MAX_BODY, Server
from tests.serving.conftest import running

GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def client(served):
  openai = pytest.importorskip("openai")
  return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


def events(content: bytes) -> list:
  """Returns the objects of a stream, which ends as it should."""
  lines = [x for x in content.decode().split("\n\n") if x.startswith("data: ")]
  assert lines[-1] == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_what_the_library_writes(client, writer):
  text = "It was the best"
  (expected,) = writer.generate([text], temperature=0, max_tokens=12)
  found = client.completions.create(
    model="tiny", prompt=text, temperature=0, max_tokens=12
  )
  assert found.choices[0].text == expected
  assert found.choices[0].finish_reason == "length"
  assert found.usage.completion_tokens == 12 and found.object == "text_completion"


def test_a_stream_holds_what_the_whole_answer_holds(client):
  asked = dict(model="tiny", prompt="It was", max_tokens=20, seed=5, temperature=1.0)
  whole = client.completions.create(**asked, logprobs=2, n=2)
  stream = client.completions.create(
    **asked, logprobs=2, n=2, stream=True, stream_options={"include_usage": True}
  )
  texts, tokens, finish, usage, ids = ["", ""], [[], []], [None, None], None, set()
  for chunk in stream:
    ids.add((chunk.id, chunk.created))
    for choice in chunk.choices:
      assert chunk.usage is None
      texts[choice.index] += choice.text
      finish[choice.index] = choice.finish_reason or finish[choice.index]
      if choice.logprobs:
        tokens[choice.index] += choice.logprobs.tokens
    usage = chunk.usage or usage
  assert len(ids) == 1 and usage == whole.usage
  for i, choice in enumerate(whole.choices):
    assert texts[i] == choice.text and finish[i] == choice.finish_reason
    assert tokens[i] == choice.logprobs.tokens
  assert texts[0] != texts[1]


def test_a_chat_is_answered_in_the_models_template(client, writer):
  messages = [{"role": "user", "content": "Who is there?"}]
  expected = writer.chat(messages, temperature=0, max_tokens=10)
  asked = dict(model="tiny", messages=messages, temperature=0, max_tokens=10)
  found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
  assert found.choices[0].message.content == expected
  entries = found.choices[0].logprobs.content
  assert len(entries) == 10 == found.usage.completion_tokens
  for entry in entries:
    assert len(entry.top_logprobs) == 3
    # The likeliest of all may be a token that is no text and is not drawn.
    assert entry.logprob <= entry.top_logprobs[0].logprob
  parts = list(client.chat.completions.create(**asked, stream=True))
  assert parts[0].choices[0].delta.role == "assistant"
  text = "".join(part.choices[0].delta.content or "" for part in parts)
  assert text == expected and parts[-1].choices[0].finish_reason == "length"
  parted = [{"type": "text", "text": "Who is"}, {"type": "text", "text": " there?"}]
  again = client.chat.completions.create(
    **asked | {"messages": [{"role": "user", "content": parted}]}
  )
  assert again.choices[0].message.content == expected


def test_scores_of_a_prompt_are_those_of_the_library(served, writer):
  """As lm-eval asks for them: prompt tokens and exactly one more."""
  pairs = [("It was the", " best of times"), ("Once", " upon"), ("A", " long cold day")]
  ids = [writer.encode_pair(*pair) for pair in pairs]
  body = GREEDY | {
    "prompt": [[*context, *continuation] for context, continuation in ids],
    "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True,
  }  # fmt: skip
  status, found = served.post("/v1/completions", body)
  assert status == 200
  for choice, (context, continuation), score in zip(
    found["choices"], ids, writer.score(ids), strict=True
  ):
    listed = choice["logprobs"]
    assert len(listed["token_logprobs"]) == len(context) + len(continuation) + 1
    assert listed["token_logprobs"][0] is None
    own = slice(len(context), -1)
    assert sum(listed["token_logprobs"][own]) == pytest.approx(score.log_p, abs=1e-4)
    best = [max(row.values()) for row in listed["top_logprobs"][own]]
    is_greedy = best == listed["token_logprobs"][own]
    assert is_greedy == score.is_greedy
    for token, log_p, row in zip(
      listed["tokens"], listed["token_logprobs"], listed["top_logprobs"], strict=True
    ):
      assert row is None or row[token] == log_p


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(served):
  body = GREEDY | {"prompt": "It was the best", "max_tokens": 40}
  _, whole = served.post("/v1/completions", body)
  text = whole["choices"][0]["text"]
  stop = text[len(text) // 2 : len(text) // 2 + 3]
  _, cut = served.post("/v1/completions", body | {"stop": ["\x00", stop]})
  (choice,) = cut["choices"]
  assert choice["finish_reason"] == "stop"
  assert choice["text"] == text[: text.index(stop)]
  assert cut["usage"]["completion_tokens"] < 40
  content = served.call(
    "POST", "/v1/completions", body | {"stop": stop, "stream": True}
  )
  parts = events(content[2])
  assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]


def test_a_bias_forbids_or_demands_a_token(served, writer):
  body = GREEDY | {"prompt": "It was", "max_tokens": 1, "logprobs": 0}
  _, free = served.post("/v1/completions", body)
  _, forced = served.post("/v1/completions", body | {"logit_bias": {"300": 100}})
  assert forced["choices"][0]["text"] == writer.decode([300])
  assert forced["choices"][0] != free["choices"][0]


def test_a_cut_answer_says_length_and_a_full_context_is_refused(served, writer):
  prompt = writer.encode("It was the best of times, it was the worst of times. ")
  context = served.server.context
  body = GREEDY | {"prompt": prompt}
  status, found = served.post("/v1/completions", body | {"max_tokens": context})
  assert status == 400 and found["error"]["code"] == "context_length_exceeded"
  assert str(context) in found["error"]["message"]
  chat = GREEDY | {"messages": [{"role": "user", "content": "Hello"}]}
  status, found = served.post("/v1/chat/completions", chat)
  usage = found["usage"]
  assert status == 200 and found["choices"][0]["finish_reason"] == "length"
  assert usage["total_tokens"] == context


REFUSED = [
  ({"prompt": []}, "prompt", None),
  ({"prompt": [[1], "a"]}, "prompt", None),
  ({"prompt": [10**9]}, "prompt", None),
  ({"prompt": 5}, "prompt", None),
  ({"temperature": -1}, "temperature", None),
  ({"temperature": True}, "temperature", None),
  ({"top_p": 2}, "top_p", None),
  ({"n": 0}, "n", None),
  ({"max_tokens": -1}, "max_tokens", None),
  ({"max_tokens": 0}, "max_tokens", None),
  ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
  ({"stop": ["a"] * 17}, "stop", None),
  ({"stop": [""]}, "stop", None),
  ({"logit_bias": {"x": 1}}, "logit_bias", None),
  ({"logit_bias": {"1": 101}}, "logit_bias", None),
  ({"logprobs": 21}, "logprobs", None),
  ({"stream_options": {"include_usage": True}}, "stream_options", None),
  ({"best_of": 3}, "best_of", "unsupported_parameter"),
  ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
  ({"suffix": "end"}, "suffix", "unsupported_parameter"),
  ({"tempature": 1}, "tempature", "unknown_parameter"),
  ({"model": "gpt-4"}, "model", "model_not_found"),
]


@pytest.mark.parametrize(
  ("change", "param", "code"), REFUSED, ids=[str(case[0])[:40] for case in REFUSED]
)
def test_what_cannot_be_done_is_refused_by_its_name(served, change, param, code):
  status, found = served.post("/v1/completions", GREEDY | {"prompt": "a"} | change)
  assert status == (404 if param == "model" else 400)
  error = found["error"]
  assert error["param"] == param and error["code"] == code and error["message"]


def test_what_asks_for_nothing_is_not_refused(served):
  nothing = {
    "best_of": 1, "frequency_penalty": 0, "tools": [], "suffix": None, "user": "me",
    "logit_bias": {}, "stop": None, "response_format": {"type": "text"},
  }  # fmt: skip
  body = GREEDY | {"prompt": "a", "max_tokens": 1} | nothing
  assert served.post("/v1/completions", body)[0] == 200


@pytest.mark.parametrize(
  "content",
  [
    b"", b"{", b"[1]", b"null", b'{"a": NaN}', b"\xff\xfe", b'{"n":1,"n":2}',
    b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}",
  ],
  ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_a_body_that_is_no_object_is_refused(served, content):
  status, found = served.post("/v1/completions", content)
  assert status == 400 and found["error"]["message"]


def test_a_body_that_is_too_large_is_refused_unread(served):
  status, found = served.post("/v1/completions", b" " * (MAX_BODY + 1))
  assert status == 413 and found["error"]["code"] == "body_too_large"


def test_a_body_that_does_not_come_is_not_waited_for(served, monkeypatch):
  monkeypatch.setattr("flaxlm.serving.app.BODY_SECONDS", 0.2)
  head = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
  )
  with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
    connection.sendall(head + b"{")
    assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_reads_nothing_holds_no_slot(served):
  body = {"prompt": "a", "max_tokens": 80, "n": 3, "stream": True, "logprobs": 20}
  content = json.dumps(GREEDY | body | {"echo": True}).encode()
  head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
  head += f"Content-Length: {len(content)}\r\n\r\n"
  with socket.create_connection(("127.0.0.1", served.port)) as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.sendall(head.encode() + content)
    answer = served.post("/v1/completions", GREEDY | {"prompt": "b"})
    assert answer[0] == 200
    limit = time.monotonic() + 60
    while served.server.engine.num_busy:
      assert time.monotonic() < limit
      time.sleep(0.05)


def test_tokens_are_those_of_the_tokenizer(served, writer):
  status, found = served.post("/tokenize", {"prompt": "It was"})
  assert status == 200 and found["count"] == len(found["tokens"])
  assert found["tokens"][-2:] == writer.encode("It was")[-2:]
  assert found["max_model_len"] == served.server.context
  plain = {"prompt": "It was", "add_special_tokens": False}
  ids = served.post("/tokenize", plain)[1]["tokens"]
  assert served.post("/detokenize", {"tokens": ids})[1]["prompt"] == "It was"
  assert served.post("/detokenize", {"tokens": [-1]})[0] == 400
  _, _, content = served.call("GET", "/tokenizer_info")
  assert set(json.loads(content)) >= {"eos_token", "bos_token", "chat_template"}


def test_models_health_and_numbers(served, client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").model_extra["max_model_len"] == 96
  assert served.post("/v1/completions", GREEDY | {"prompt": "a"})[0] == 200
  status, _, content = served.call("GET", "/health")
  assert status == 200 and json.loads(content)["status"] == "ok"
  _, headers, content = served.call("GET", "/metrics")
  lines = content.decode().splitlines()
  assert "flaxlm_compiles_after_start_total 0" in lines
  assert (
    "flaxlm_weights_step 7" in lines and headers["content-type"][:10] == "text/plain"
  )
  assert any(x.startswith("flaxlm_generation_tokens_total ") for x in lines)


def test_a_client_that_leaves_frees_its_slot(served):
  body = json.dumps(GREEDY | {"prompt": "a", "max_tokens": 90, "stream": True}).encode()
  head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
  head += f"Content-Length: {len(body)}\r\n\r\n"
  for _ in range(5):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
      connection.sendall(head.encode() + body)
      connection.recv(200)
  served.wait_until_idle()


def test_many_at_once_get_what_each_gets_alone(served):
  bodies = [
    GREEDY
    | {"prompt": f"Text {i}", "max_tokens": 3 + i % 17, "temperature": i % 3, "seed": i}
    | ({"stop": "e"} if i % 4 == 0 else {})
    | ({"logprobs": 2} if i % 5 == 0 else {})
    for i in range(20)
  ]
  found = [None] * len(bodies)

  def ask(i):
    found[i] = served.post("/v1/completions", bodies[i])[1]

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for body, together in zip(bodies, found, strict=True):
    alone = served.post("/v1/completions", body)[1]
    assert together["choices"] == alone["choices"]
    for usage in (together["usage"], alone["usage"]):
      del usage["prompt_tokens_details"]
    assert together["usage"] == alone["usage"]


def test_strangers_are_kept_out(writer, make_engine):
  server = Server(
    writer, "tiny", make_engine(1), key="secret", origins=("https://a.org",)
  )
  with running(server) as found:
    body = GREEDY | {"prompt": "a", "max_tokens": 1}
    routes = ["/v1/models", "/metrics", "/tokenizer_info"]
    for path in routes:
      assert found.call("GET", path)[0] == 401
    for path in ("/v1/completions", "/chat/completions", "/v1/embeddings", "/tokenize"):
      assert found.post(path, body)[0] == 401
      assert found.post(path, body, authorization="Bearer wrong")[0] == 401
    known = {"authorization": "Bearer secret"}
    assert found.post("/v1/completions", body, **known)[0] == 200
    assert found.call("GET", "/health")[0] == 200
    assert found.call("GET", "/health", host="evil.org")[0] == 403
    other = {"origin": "https://evil.org"}
    assert found.post("/v1/completions", body, **known, **other)[0] == 403
    friend = {"origin": "https://a.org"}
    status, headers, _ = found.call("OPTIONS", "/v1/chat/completions", **friend)
    assert status == 204 and headers["access-control-allow-origin"] == "https://a.org"
    own = {"origin": f"http://127.0.0.1:{found.port}"}
    assert found.post("/v1/completions", body, **known, **own)[0] == 200


def test_a_full_queue_says_when_to_come_again(writer, make_engine, monkeypatch):
  engine = make_engine(1)
  step = engine.step
  monkeypatch.setattr(engine, "step", lambda: time.sleep(0.05) or step())
  server = Server(writer, "tiny", engine, max_waiting=2)
  with running(server) as found:
    body = GREEDY | {"prompt": "a", "max_tokens": 90}
    answers = []

    def ask():
      answers.append(found.call("POST", "/v1/completions", body))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 3
    refused = next(answer for answer in answers if answer[0] == 429)
    assert int(refused[1]["retry-after"]) >= 1
    found.wait_until_idle()
    assert found.post("/v1/completions", body)[0] == 200


def test_an_engine_that_fails_is_said_to_have_failed(writer, make_engine, monkeypatch):
  engine = make_engine(1)
  with running(Server(writer, "tiny", engine)) as found:
    monkeypatch.setattr(engine, "_make_tokens", lambda: 1 / 0)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    body = GREEDY | {"prompt": "a", "max_tokens": 9}
    status, answer = found.post("/v1/completions", body)
    assert status == 500 and answer["error"]["code"] == "engine_error"
    assert found.call("GET", "/health")[0] == 503
    assert found.post("/v1/completions", body)[0] == 500


def test_an_encoder_fills_masks_and_writes_nothing(writer, tiny):
  tiny.model.update(causal=False, head="mlm", vocab_size=writer.config.vocab_size)
  model = Transformer(TransformerConfig(**tiny.model), nnx.Rngs(3))
  encoder = dataclasses.replace(writer, model=model, template=None)
  with running(Server(encoder, "tiny", None)) as found:
    status, answer = found.post("/v1/fill-mask", {"input": "It <mask> the best"})
    assert status == 200
    ((guesses,),) = answer["data"]
    assert guesses == [[*pair] for pair in encoder.fill_mask("It <mask> the best")[0]]
    assert found.post("/v1/embeddings", {"input": "a"})[0] == 200
    status, answer = found.post("/v1/completions", GREEDY | {"prompt": "a"})
    assert status == 400 and "embeddings" in answer["error"]["message"]
    status, answer = found.post("/v1/classify", {"input": "a"})
    assert status == 400 and answer["error"]["message"]
    assert found.call("GET", "/health")[0] == found.call("GET", "/metrics")[0] == 200


def test_vectors_of_texts(served, client, writer):
  texts = ["It was the best", "of times"]
  found = client.embeddings.create(model="tiny", input=texts)
  vectors = np.array([row.embedding for row in found.data])
  np.testing.assert_allclose(vectors, writer.embed(texts), atol=1e-5)
  assert served.post("/v1/embeddings", {"input": []})[0] == 400
