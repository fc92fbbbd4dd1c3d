"""The routes of the server, and what keeps strangers and broken clients out.

Every route but /health asks for the key, if there is one. Host and Origin are checked,
because web pages reach servers on this machine too (DNS rebinding).
"""

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import pathlib
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flaxlm.errors import UserError
from flaxlm.inference.engine import Engine
from flaxlm.inference.language_model import LanguageModel
from flaxlm.serving import fields
from flaxlm.serving.answers import Answer, Choice, Texts, one_line
from flaxlm.serving.fields import ApiError, Asked
from flaxlm.serving.metrics import Metrics
from flaxlm.serving.service import Overloaded, Service

MAX_BODY = 8 << 20  # bytes
BODY_SECONDS = 30.0  # in which a body must have come
_KEEPALIVE = 10.0  # seconds without news, after which a stream says that it lives
_LOOK_AFTER = 0.25  # seconds, after which it is checked that the client is there
_LOOPBACK = {"localhost", "127.0.0.1", "[::1]", "::1", "testserver"}
_PAGE = pathlib.Path(__file__).with_name("page.html")


class Server:
  """The state behind the routes.

  Args:
    name: of the model, for clients.
    key: what clients must send; "" asks for none.
    hosts: names that clients may reach this server by; () is any.
    origins: of web pages that may call it, besides its own.
    engine: None for models that write no text.
  """

  def __init__(
    self, model: LanguageModel, name: str, engine: Engine | None, *, key: str = "",
    hosts: tuple[str, ...] = tuple(_LOOPBACK), origins: tuple[str, ...] = (),
    strict: bool = False, any_model: bool = False, max_waiting: int = 64,
  ):  # fmt: skip
    self.model, self.name, self.key = model, name, key
    self.hosts, self.origins = hosts, origins
    self.strict, self.any_model = strict, any_model
    self.created, self.metrics = int(time.time()), Metrics()
    self.engine = engine
    self.service = Service(engine, max_waiting) if engine else None
    self.texts = Texts(model, engine) if engine else None
    self._alone = asyncio.Lock()  # one call of the encoder at a time

  @property
  def context(self) -> int:
    return self.engine.context if self.engine else self.model.config.max_len

  # Answers ---------------------------------------------------------------------

  async def completions(self, request: Request) -> Response:
    return await self._write(request, chat=False)

  async def chat(self, request: Request) -> Response:
    return await self._write(request, chat=True)

  async def _write(self, request: Request, chat: bool) -> Response:
    body = fields.read_body(await read_all(request))
    fields.check_model(body, self.name, self.any_model)
    if self.engine is None:
      message = "this model is an encoder: it writes no text, see /v1/embeddings"
      raise ApiError(message, "model", "not_a_causal_model")
    read = fields.read_chat if chat else fields.read_completion
    asked = read(body, self.strict)
    # A long prompt takes a second to tokenise: not in the event loop.
    choices = await asyncio.to_thread(self._prepare, asked, _client(request), chat)
    requests = [choice.request for choice in choices]
    try:
      self.service.take(requests)
    except Overloaded as full:
      self.metrics.count("rejected_total", '{reason="queue"}')
      return _error(
        ApiError(
          "too many requests wait already", None, "queue_full", 429, "overloaded"
        ),
        {"retry-after": str(full.seconds)},
      )
    answer = Answer(choices, self.name, chat)
    headers = {"x-request-id": answer.id} | self._ignored(asked.ignored)
    if asked.stream:
      headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
      stream = self._stream(answer, asked)
      return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    watch = self.service.watch(requests, _LOOK_AFTER)
    async with contextlib.aclosing(watch):
      async for _ in watch:
        if await request.is_disconnected():
          return Response(status_code=499)
        for choice in choices:
          choice.take()  # may find a stop string
    self._count(choices)
    if any(choice.request.finish == "error" for choice in choices):
      raise ApiError("the engine failed", None, "engine_error", 500, "server_error")
    return JSONResponse(answer.whole(), headers=headers)

  def _prepare(self, asked: Asked, client: str, chat: bool) -> list[Choice]:
    texts = self.texts
    prompts = [texts.conversation(asked)] if chat else texts.prompts(asked)
    return texts.requests(asked, prompts, client, chat)

  async def _stream(self, answer: Answer, asked: Asked) -> AsyncIterator[str]:
    requests = [choice.request for choice in answer.choices]
    watch = self.service.watch(requests, _KEEPALIVE)
    begun = False
    async with contextlib.aclosing(watch):
      async for changed in watch:
        if not changed:
          yield ": keepalive\n\n"
          continue
        if not begun:
          begun = True
          for chunk in answer.begin():
            yield _event(chunk)
        if any(request.finish == "error" for request in requests):
          error = ApiError(
            "the engine failed", None, "engine_error", 500, "server_error"
          )
          yield _event(error.body)
          return
        for chunk in answer.news():
          yield _event(chunk)
        if all(choice.is_over for choice in answer.choices):
          break
    self._count(answer.choices)
    if asked.usage:
      yield _event(answer.last())
    yield "data: [DONE]\n\n"

  def _count(self, choices: list[Choice]) -> None:
    for choice in choices:
      self.metrics.ended(choice.request)

  def _ignored(self, names: tuple[str, ...]) -> dict[str, str]:
    if not names:
      return {}
    self.metrics.count("ignored_fields_total", by=len(names))
    safe = ", ".join(ascii(name)[1:-1][:60] for name in names[:20])
    return {"x-ignored-parameters": safe}

  # Encoders --------------------------------------------------------------------

  async def embeddings(self, request: Request) -> Response:
    body = fields.read_body(await read_all(request))
    fields.check_model(body, self.name, self.any_model)
    texts = fields.read_texts(body)
    async with self._alone:
      vectors = await asyncio.to_thread(_or_refuse, self.model.embed, texts)
    data = [
      {
        "object": "embedding",
        "index": i,
        "embedding": fields.encode_vector(body, vector),
      }
      for i, vector in enumerate(vectors)
    ]
    count = sum(len(self.model.encode(text)) for text in texts)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse(
      {"object": "list", "model": self.name, "data": data, "usage": usage}
    )

  async def fill_mask(self, request: Request) -> Response:
    return await self._ask_encoder(request, self.model.fill_mask, one=True)

  async def classify(self, request: Request) -> Response:
    return await self._ask_encoder(request, self.model.classify, one=False)

  async def _ask_encoder(self, request: Request, ask, one: bool) -> Response:
    texts = fields.read_texts(fields.read_body(await read_all(request)))
    async with self._alone:
      if one:
        found = [await asyncio.to_thread(_or_refuse, ask, text) for text in texts]
      else:
        found = await asyncio.to_thread(_or_refuse, ask, texts)
    return JSONResponse({"object": "list", "model": self.name, "data": found})

  # Tokens ----------------------------------------------------------------------

  async def tokenize(self, request: Request) -> Response:
    body = fields.read_body(await read_all(request))
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
      raise ApiError("prompt must be a text", "prompt")
    ids = await asyncio.to_thread(self._tokenize, prompt, body)
    return JSONResponse(
      {"tokens": ids, "count": len(ids), "max_model_len": self.context}
    )

  def _tokenize(self, prompt: str, body: dict) -> list[int]:
    ids, begin = self.model.encode(prompt), self.model.tokenizer.begin_ids
    return [*begin, *ids] if body.get("add_special_tokens", True) else ids

  async def detokenize(self, request: Request) -> Response:
    ids = fields.read_body(await read_all(request)).get("tokens")
    most = len(self.model.tokenizer.pieces())
    known = isinstance(ids, list) and all(type(i) is int and 0 <= i < most for i in ids)
    if not known:
      raise ApiError(f"tokens must be a list of ids below {most}", "tokens")
    return JSONResponse({"prompt": self.model.decode(ids)})

  async def tokenizer_info(self, request: Request) -> Response:
    tokenizer, template = self.model.tokenizer, self.model.template
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return JSONResponse(
      {
        "eos_token": names.get(tokenizer.eos_id),
        "bos_token": names.get(tokenizer.bos_id),
        "pad_token": names.get(tokenizer.pad_id),
        "chat_template": template.source if template else None,
      }
    )

  # The server itself -----------------------------------------------------------

  async def models(self, request: Request) -> Response:
    name = request.path_params.get("name")
    one = {
      "id": self.name, "object": "model", "created": self.created,
      "owned_by": "flaxlm", "max_model_len": self.context,
    }  # fmt: skip
    if name is None:
      return JSONResponse({"object": "list", "data": [one]})
    fields.check_model({"model": name}, self.name, self.any_model)
    return JSONResponse(one)

  async def health(self, request: Request) -> Response:
    well = self.service is None or self.service.is_well
    seconds = time.monotonic() - self.service.last_step if self.service else 0.0
    status = {"status": "ok" if well else "failed", "last_step_seconds": round(seconds)}
    return JSONResponse(status, 200 if well else 503)

  async def numbers(self, request: Request) -> Response:
    gauges = {"weights_step": self.model.step or 0}
    if self.engine:
      gauges |= {
        "slots": self.engine.num_slots,
        "requests_running": self.engine.num_busy,
        "requests_waiting": max(self.service.open - self.engine.num_busy, 0),
        "seconds_since_last_step": time.monotonic() - self.service.last_step,
        "compiles_after_start_total": self.engine.late_compiles,
      }
    return Response(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

  async def page(self, request: Request) -> Response:
    return HTMLResponse(*read_page())

  async def options(self, request: Request) -> Response:
    return Response(status_code=204)


def make_app(server: Server) -> Starlette:
  """Returns the ASGI application."""
  routes = [
    ("/health", server.health, "GET"),
    ("/metrics", server.numbers, "GET"),
    ("/models", server.models, "GET"),
    ("/models/{name:path}", server.models, "GET"),
    ("/completions", server.completions, "POST"),
    ("/chat/completions", server.chat, "POST"),
    ("/embeddings", server.embeddings, "POST"),
    ("/fill-mask", server.fill_mask, "POST"),
    ("/classify", server.classify, "POST"),
    ("/tokenize", server.tokenize, "POST"),
    ("/detokenize", server.detokenize, "POST"),
    ("/tokenizer_info", server.tokenizer_info, "GET"),
  ]
  found = [
    Route(prefix + path, answer, methods=[method])
    for path, answer, method in routes
    for prefix in ("", "/v1")
  ]
  found += [
    Route("/", server.page),
    Route("/{any:path}", server.options, methods=["OPTIONS"]),
  ]

  @contextlib.asynccontextmanager
  async def lifespan(app):
    if server.service:
      server.service.start()
    yield
    if server.service:
      await server.service.stop()

  app = Starlette(
    routes=found,
    lifespan=lifespan,
    exception_handlers={
      ApiError: lambda request, error: _error(error),
      404: lambda request, error: _error(ApiError("no such route", None, None, 404)),
      405: lambda request, error: _error(ApiError("another method", None, None, 405)),
      ClientDisconnect: lambda request, error: Response(status_code=499),
      Exception: lambda request, error: _error(
        ApiError("the server failed", None, "internal_error", 500, "server_error")
      ),
    },
  )
  return Gate(app, server)


class Gate:
  """Lets in what may come in: by host, origin and key. Adds headers for browsers."""

  def __init__(self, app, server: Server):
    self.app, self.server = app, server

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      await self.app(scope, receive, send)
      return
    headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
    origin = headers.get("origin", b"").decode("latin-1")
    refused = self._refuse(scope, headers, origin)
    if refused is not None:
      await refused(scope, receive, send)
      return

    async def send_with_headers(message):
      if message["type"] == "http.response.start":
        message.setdefault("headers", []).append(
          (b"x-content-type-options", b"nosniff")
        )
        if origin in self.server.origins:
          message["headers"] += _cors(origin)
      await send(message)

    await self.app(scope, receive, send_with_headers)

  def _refuse(self, scope, headers: dict, origin: str) -> Response | None:
    server = self.server
    host = headers.get("host", b"").decode("latin-1")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if server.hosts and name.lower() not in server.hosts:
      message = f"this server is not known as {name[:60]!r}; --allow_host names it"
      return _error(ApiError(message, None, "unknown_host", 403, "permission_error"))
    own = origin.partition("://")[2] == host
    if origin and not own and origin not in server.origins:
      message = f"pages of {origin[:60]!r} may not call this server; see --allow_origin"
      return _error(ApiError(message, None, "unknown_origin", 403, "permission_error"))
    free = (
      scope["path"] in ("/health", "/v1/health", "/") or scope["method"] == "OPTIONS"
    )
    if server.key and not free:
      given = headers.get("authorization", b"").removeprefix(b"Bearer ").strip()
      if not hmac.compare_digest(given, server.key.encode()):
        message = "the API key is missing or wrong"
        return _error(
          ApiError(message, None, "invalid_api_key", 401, "authentication_error")
        )
    return None


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
  return [
    (b"access-control-allow-origin", origin.encode("latin-1")),
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"vary", b"origin"),
  ]


@functools.cache
def read_page() -> tuple[str, int, dict[str, str]]:
  """Returns the page, 200, and headers that allow its own script and nothing else."""
  text = _PAGE.read_text("utf-8")
  script = text.partition("<script>")[2].partition("</script>")[0]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = (
    f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  )
  headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
  return text, 200, headers


async def read_all(request: Request) -> bytes:
  """Returns the body of a request; ApiError if it is too large or does not come."""
  content = bytearray()
  try:
    async with asyncio.timeout(BODY_SECONDS):
      async for part in request.stream():
        content += part
        if len(content) > MAX_BODY:
          message = f"the body has more than {MAX_BODY:,} bytes"
          raise ApiError(message, None, "body_too_large", 413)
  except TimeoutError:
    message = f"the body did not come in {BODY_SECONDS:g} seconds"
    raise ApiError(message, None, "timeout", 408) from None
  return bytes(content)


def _or_refuse(function, *args):
  try:
    return function(*args)
  except UserError as error:
    raise ApiError(one_line(error), "input") from None


def _client(request: Request) -> str:
  """Returns who asks: clients take turns."""
  key = request.headers.get("authorization", "")
  return key or (request.client.host if request.client else "")


def _event(value: dict) -> str:
  return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"


def _error(error: ApiError, headers: dict[str, str] | None = None) -> Response:
  return JSONResponse(error.body, error.status, headers)
