"""The engine: many requests at once, each answered as if it were alone.

Between two calls of the device, requests join idle slots and leave theirs. A prompt is
read in chunks whose borders depend on its length alone, and each token comes from the
one program that makes all of them, so the same request gets the same tokens whatever
else is served. Every program is compiled by `warm_up`; nothing compiles afterwards.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.inference import slots as programs
from flaxlm.inference.decoding import PORTION, for_decoding
from flaxlm.inference.sampling import Sampling, SamplingRows
from flaxlm.inference.slots import MAX_BIASES, Slots
from flaxlm.models.cache import KVCache
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.sharding import use_mesh

CHUNKS = (512, 128, 32)  # tokens of a prompt per call
Chunk = tuple[int, int, int]  # of a prompt: first token, tokens, places in the call
_SCORED_CHUNK = 128  # whose logits at every position fit


class Candidates:
  """Likeliest tokens at each place: lists of one entry per token."""

  def __init__(self):
    self.log_p: list[float] = []
    self.best: list[list[int]] = []
    self.best_log_p: list[list[float]] = []

  def extend(self, listed, count: int, row=()) -> None:
    """Takes the first `count` places of a `Listed`, of one row."""
    for name in ("log_p", "best", "best_log_p"):
      values = np.asarray(getattr(listed, name))
      values = values[(slice(count), *row)]
      getattr(self, name).extend(values.tolist())


@dataclasses.dataclass(eq=False)
class Request:
  """What is asked; the engine adds what it makes.

  Args:
    prompt: token ids, at least one.
    end_ids: tokens that end the text; they are not part of it.
    bias: added to the logits of tokens, by id.
    lists: keep the likeliest tokens at each new place.
    scores_prompt: keep those of the prompt too, from its second token on.
    client: who asks; clients take turns.
    streams: tokens are wanted one by one; else several may come at once, which is a
      little faster. They are the same.
    on_change: called after each call of the device that changed the request.
  """

  prompt: Sequence[int]
  max_tokens: int
  sampling: Sampling
  end_ids: frozenset[int] = frozenset()
  bias: dict[int, float] = dataclasses.field(default_factory=dict)
  lists: bool = False
  scores_prompt: bool = False
  client: str = ""
  streams: bool = False
  on_change: Callable[["Request"], None] = lambda request: None
  # What the engine adds.
  tokens: list[int] = dataclasses.field(default_factory=list)
  listed: Candidates = dataclasses.field(default_factory=Candidates)
  prompt_listed: Candidates = dataclasses.field(default_factory=Candidates)
  finish: str = ""  # end | length | cancelled | error; "" while it is served
  reused: int = 0  # tokens of the prompt that were in a slot already
  slot: int = -1
  asked_at: float = dataclasses.field(default_factory=time.monotonic)
  first_at: float = 0.0  # when the first token came

  def cancel(self) -> None:
    """Ends the request; its slot is free after the next call of the device."""
    self.finish = self.finish or "cancelled"


@dataclasses.dataclass
class _Reading:
  """A prompt that is being read."""

  request: Request
  cache: KVCache
  chunks: list[Chunk]  # that are left
  logits_V: jax.Array | None = None


def cut_prompt(
  length: int, sizes: Sequence[int] = CHUNKS
) -> list[tuple[int, int, int]]:
  """Returns the chunks of a prompt, from its length alone."""
  chunks, first = [], 0
  for size in sizes:
    while length - first >= size:
      chunks.append((first, size, size))
      first += size
  if first < length:
    chunks.append((first, length - first, sizes[-1]))
  return chunks


class Engine:
  """Serves requests from one thread, which calls `step` until nothing is left.

  Args:
    mesh, rules: where the model's weights are.
    allowed_V: which ids may be drawn.
    slots: requests at once.
    context: tokens per request, prompt included; the model's by default.
  Raises:
    ConfigError: the model is not causal, or there is no slot or no room in one.
  """

  def __init__(
    self,
    model: Transformer,
    mesh: jax.sharding.Mesh,
    rules: dict,
    allowed_V: np.ndarray,
    slots: int = 8,
    context: int = 0,
  ):
    config = model.config
    if not config.causal:
      raise ConfigError("the model", "an encoder", "a causal model")
    self.context = min(context or config.max_len, config.max_len)
    if slots < 1 or self.context < 2:
      raise ConfigError("slots and context", f"{slots}, {self.context}", "1 and 2 up")
    self.model, self.rules, self.mesh = for_decoding(model), rules, mesh
    self.sizes = tuple(size for size in CHUNKS if size <= self.context) or (
      min(self.context, CHUNKS[-1]),
    )
    self.made_tokens = self.read_tokens = 0
    self.late_compiles = 0  # after `warm_up`, which promises that there are none
    self._on_mesh = functools.partial(use_mesh, mesh, rules)
    with self._on_mesh():
      self._allowed_V = jax.numpy.asarray(allowed_V)
      self._slots = Slots.empty(config, slots, self.context)
    self._texts: list[list[int]] = [[] for _ in range(slots)]  # prompts in the slots
    self._busy: dict[int, Request] = {}
    self._reading: _Reading | None = None
    self._waiting: dict[str, collections.deque[Request]] = {}

  @property
  def num_slots(self) -> int:
    return len(self._texts)

  @property
  def cache_bytes(self) -> int:
    """Memory of all slots."""
    cache = self._slots.cache
    return sum(x.nbytes for x in jax.tree.leaves((cache.k, cache.v)))

  @property
  def num_busy(self) -> int:
    """Requests that have a slot, or whose prompt is being read."""
    return len(self._busy) + (self._reading is not None)

  @property
  def num_waiting(self) -> int:
    return sum(map(len, self._waiting.values()))

  def check(self, request: Request) -> None:
    """Raises ConfigError if a request cannot be served."""
    prompt, vocab_size = request.prompt, self.model.config.vocab_size
    if not len(prompt) or min(prompt) < 0 or max(prompt) >= vocab_size:
      needed = f"one or more, from 0 to {vocab_size - 1}"
      raise ConfigError("prompt", f"{len(prompt)} token ids", needed)
    if len(prompt) + request.max_tokens > self.context:
      raise ConfigError(
        "prompt and max_tokens",
        f"{len(prompt)} and {request.max_tokens} tokens",
        f"together at most {self.context}, the context",
      )
    if request.max_tokens < (not request.scores_prompt):
      raise ConfigError("max_tokens", request.max_tokens, "1 or more")
    if len(request.bias) > MAX_BIASES:
      raise ConfigError("logit_bias", len(request.bias), f"at most {MAX_BIASES} tokens")
    if any(not 0 <= i < vocab_size for i in request.bias):
      needed = f"ids from 0 to {vocab_size - 1}"
      raise ConfigError("logit_bias", list(request.bias), needed)

  def submit(self, request: Request) -> Request:
    """Queues a request; `check` has been called, or is called now."""
    self.check(request)
    self._waiting.setdefault(request.client, collections.deque()).append(request)
    return request

  def run(self, requests: Sequence[Request]) -> Sequence[Request]:
    """Submits requests and serves until nothing is left; returns them."""
    for request in requests:
      self.submit(request)
    while self.step():
      pass
    return requests

  def step(self) -> bool:
    """Reads one chunk of a prompt and makes tokens for all busy slots, once.

    Returns:
      whether anything is left to do.
    """
    known = _count_programs()
    with self._on_mesh():
      self._drop_cancelled()
      if self._reading is None:
        self._admit()
      if self._reading is not None:
        self._read_chunk()
      if self._busy:
        self._make_tokens()
    self.late_compiles += _count_programs() - known
    return bool(self.num_busy or self.num_waiting)

  def warm_up(self) -> None:
    """Compiles every program, by using each as requests will."""
    # On a mesh, the first results may lie elsewhere than what they were made from.
    for _ in range(1 if self.mesh.size == 1 else 3):
      for scores in (False, True):
        for size in _read_in(self.sizes, scores):
          length = min(size, self.context - 1)
          self.run([Request([0] * length, 1, Sampling(0.0), scores_prompt=scores)])
      with self._on_mesh():
        self._slots = programs.release(self._slots, np.int32(0))
    self._texts = [[] for _ in self._texts]
    self.made_tokens = self.read_tokens = self.late_compiles = 0

  # How a request goes through ------------------------------------------------------

  def _drop_cancelled(self) -> None:
    for slot, request in list(self._busy.items()):
      if request.finish:
        self._slots = programs.release(self._slots, np.int32(slot))
        self._leave(request)
    if self._reading is not None and self._reading.request.finish:
      request, self._reading = self._reading.request, None
      request.on_change(request)

  def _admit(self) -> None:
    """Begins to read the prompt of the next client's first request."""
    idle = [slot for slot in range(self.num_slots) if slot not in self._busy]
    while idle and self._waiting:
      client, queue = next(iter(self._waiting.items()))
      request = queue.popleft()
      del self._waiting[client]
      if queue:
        self._waiting[client] = queue  # behind the other clients
      if request.finish:
        request.on_change(request)
        continue
      sizes = _read_in(self.sizes, request.scores_prompt)
      chunks = cut_prompt(len(request.prompt), sizes)
      common = [self._common(request, slot, chunks) for slot in idle]
      best = max(common)
      # Without a common prefix, the slot that was left longest ago.
      request.slot = idle[common.index(best)]
      request.reused = best
      self._reading = _Reading(request, self._start_cache(request), chunks)
      self._reading.chunks = [chunk for chunk in chunks if chunk[0] >= best]
      return

  def _common(self, request: Request, slot: int, chunks) -> int:
    """Returns how many tokens of the prompt the slot holds, read in the same chunks."""
    if request.scores_prompt:  # a prefix that is not read has no scores
      return 0
    text, done = self._texts[slot], 0
    theirs = cut_prompt(len(text), self.sizes)
    for ours, other in zip(chunks[:-1], theirs, strict=False):
      first, count, size = ours
      same = list(request.prompt[first : first + count]) == text[first : first + count]
      if ours != other or count < size or not same:
        break
      done = first + count
    return done

  def _start_cache(self, request: Request) -> KVCache:
    # The last chunk may reach beyond the context.
    return programs.take_prefix(
      self._slots, np.int32(request.slot), np.int32(request.reused), self.sizes[0]
    )

  def _read_chunk(self) -> None:
    reading = self._reading
    request = reading.request
    first, count, size = reading.chunks.pop(0)
    tokens_C, next_C = np.zeros((2, size), np.int32)
    tokens_C[:count] = request.prompt[first : first + count]
    after = request.prompt[first + 1 : first + count + 1]
    next_C[: len(after)] = after
    reading.logits_V, reading.cache, listed = programs.extend(
      self.model, reading.cache, tokens_C, next_C, np.int32(count),
      request.scores_prompt,
    )  # fmt: skip
    self.read_tokens += count
    if request.scores_prompt:
      request.prompt_listed.extend(listed, len(after))
    if not reading.chunks:
      self._begin(reading)
      self._reading = None

  def _begin(self, reading: _Reading) -> None:
    """Gives a prompt that was read its slot."""
    request = reading.request
    ids_N, bias_N = np.zeros(MAX_BIASES, np.int32), np.zeros(MAX_BIASES, np.float32)
    ids_N[: len(request.bias)] = list(request.bias)
    bias_N[: len(request.bias)] = list(request.bias.values())
    sampling = SamplingRows.stack([request.sampling])
    self._slots = programs.fill(
      self._slots, np.int32(request.slot), reading.cache, reading.logits_V,
      np.int32(request.max_tokens), np.bool_(request.lists), (ids_N, bias_N), sampling,
    )  # fmt: skip
    # Scored prompts are read in other chunks, so nobody else may use them.
    self._texts[request.slot] = [] if request.scores_prompt else list(request.prompt)
    if request.max_tokens:
      self._busy[request.slot] = request
    else:
      request.finish = "length"
      request.on_change(request)

  def _make_tokens(self) -> None:
    left = min(r.max_tokens - len(r.tokens) for r in self._busy.values())
    one_by_one = self._reading is not None or self._waiting
    one_by_one = one_by_one or any(r.streams for r in self._busy.values())
    count = 1 if one_by_one else min(PORTION, left)
    self._slots, tokens_PB, listed = programs.make_tokens(
      self.model, self._slots, self._allowed_V, np.int32(count)
    )
    tokens_PB, now = np.asarray(tokens_PB), time.monotonic()
    for slot, request in list(self._busy.items()):
      new = tokens_PB[:count, slot].tolist()
      at = next((i for i, token in enumerate(new) if token in request.end_ids), None)
      kept = new if at is None else new[:at]
      if request.lists:  # before the tokens: another thread may read along
        request.listed.extend(listed, len(kept), (slot,))
      request.tokens += kept
      request.first_at = request.first_at or now
      self.made_tokens += len(kept)
      if at is not None:
        request.finish = request.finish or "end"
        self._slots = programs.release(self._slots, np.int32(slot))
      elif len(request.tokens) >= request.max_tokens:
        request.finish = request.finish or "length"
      if request.finish and request.finish != "cancelled":
        self._leave(request)
      else:
        request.on_change(request)

  def _leave(self, request: Request) -> None:
    del self._busy[request.slot]
    request.on_change(request)


def _read_in(sizes: tuple[int, ...], scored: bool) -> tuple[int, ...]:
  """Returns the sizes of chunks in which a prompt is read."""
  if not scored:
    return sizes
  return tuple(size for size in sizes if size <= _SCORED_CHUNK) or sizes[-1:]


def _count_programs() -> int:
  """Returns how many programs of slots.py have been compiled."""
  names = ("extend", "fill", "take_prefix", "release", "make_tokens")
  return sum(getattr(programs, name)._cache_size() for name in names)
