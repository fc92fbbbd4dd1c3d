"""A server of a small model, in a thread of this process, on loopback."""

import contextlib
import http.client
import json
import threading
import time

import jax
import pytest
from flax import nnx

pytest.importorskip("uvicorn", reason="serving needs pip install 'flaxlm[serve]'")
import uvicorn

from flaxlm.inference.engine import Engine
from flaxlm.inference.language_model import LanguageModel
from flaxlm.inference.text import text_ids
from flaxlm.models.config import TransformerConfig
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import one_device
from flaxlm.serving.app import Server, make_app
from flaxlm.tokenizer.chat_template import ChatTemplate

TEMPLATE = (
  "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
  "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


class Running:
  """A server that listens, and the ways to call it."""

  def __init__(self, server: Server, port: int):
    self.server, self.port = server, port
    self.url = f"http://127.0.0.1:{port}/v1"

  def call(self, method: str, path: str, body=None, **headers):
    """Returns (status, headers, content) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, content, headers)
    with contextlib.closing(connection):
      answer = connection.getresponse()
      return answer.status, dict(answer.getheaders()), answer.read()

  def post(self, path: str, body, **headers):
    """Returns (status, object) of one request."""
    status, _, content = self.call("POST", path, body, **headers)
    return status, json.loads(content)

  def wait_until_idle(self) -> None:
    limit = time.monotonic() + 30
    while self.server.service.open or self.server.engine.num_busy:
      assert time.monotonic() < limit, "a slot is not free"
      time.sleep(0.02)


@contextlib.contextmanager
def running(server: Server):
  """Serves on a free port until the block ends."""
  config = uvicorn.Config(make_app(server), port=0, log_level="error", lifespan="on")
  runner = uvicorn.Server(config)
  thread = threading.Thread(target=runner.run)
  thread.start()
  try:
    while not runner.started:
      assert thread.is_alive(), "the server has not started"
      time.sleep(0.01)
    yield Running(server, runner.servers[0].sockets[0].getsockname()[1])
  finally:
    runner.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def writer(make_tiny, bpe) -> LanguageModel:
  """A model with random weights, large enough that greedy choices are unambiguous."""
  config = make_tiny()
  config.model.update(vocab_size=bpe.vocab_size + 24, max_len=96)
  model = Transformer(TransformerConfig(**config.model), nnx.Rngs(3))
  model = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model)
  rules = config.mesh.rules.to_dict()
  template = ChatTemplate(TEMPLATE)
  return LanguageModel(model, bpe, one_device(), rules, template=template, step=7)


@pytest.fixture(scope="session")
def make_engine(writer):
  def make(slots: int = 3) -> Engine:
    allowed_V = text_ids(writer.tokenizer, writer.config.vocab_size)
    engine = Engine(writer.model, writer.mesh, writer.rules, allowed_V, slots)
    engine.warm_up()
    return engine

  return make


@pytest.fixture(scope="session")
def one_server(writer, make_engine):
  server = Server(writer, "tiny", make_engine(), strict=True, max_waiting=500)
  with running(server) as found:
    yield found


@pytest.fixture(scope="module")
def served(one_server):
  """The server that most tests share; each file of tests forgets programs."""
  one_server.server.engine.warm_up()
  return one_server


@pytest.fixture(autouse=True)
def free_slots(request):
  """No test leaves a slot in use, and none compiles a program."""
  yield
  if "served" in request.fixturenames:
    served = request.getfixturevalue("served")
    served.wait_until_idle()
    assert served.server.engine.late_compiles == 0
