"""How the knobs of a config depend on each other; each rule names the fix.

A rule is (holds, key, what is needed, what to try). The rules come in an order in which
a later one may assume that the earlier ones hold. No JAX here.
"""

import math

from ml_collections import ConfigDict

from flaxlm.config.choices import HEAD_OF_OBJECTIVE, HEAD_OF_TASK
from flaxlm.kernels.attention.choice import CONTEXT_PARALLEL, Case, why_not
from flaxlm.parallel import AXES, BATCH_AXES


def broken_rules(config: ConfigDict):
  """Yields (key, what is needed, what to try) for each rule that does not hold."""
  for holds, *rule in _all_rules(config):
    if not holds:
      yield rule


def _all_rules(config: ConfigDict):
  model, data, optim = config.model, config.data, config.optim
  heads, layers = model.num_heads, model.num_layers
  yield (
    heads % model.num_kv_heads == 0,
    "model.num_kv_heads",
    f"a divisor of config.model.num_heads={heads}",
    _nearest_divisors(heads, model.num_kv_heads),
  )
  yield from _model_rules(model)
  yield from _prediction_rules(config)
  yield (
    layers % model.unroll == 0,
    "model.unroll",
    f"a divisor of config.model.num_layers={layers}",
    _nearest_divisors(layers, model.unroll),
  )
  rows = (2**31 - 1) // data.seq_len
  limit = f"at most {rows:,} rows of config.data.seq_len={data.seq_len}: 2^31 tokens"
  yield data.batch_size <= rows, "data.batch_size", limit, f"{rows}"
  limit = f"at most config.model.max_len={model.max_len}"
  yield data.seq_len <= model.max_len, "data.seq_len", limit, f"{model.max_len}"
  limit = f"at most config.num_steps={config.num_steps}"
  hint = f"{config.num_steps // 10}"
  yield optim.warmup_steps <= config.num_steps, "optim.warmup_steps", limit, hint
  limit = f"at most config.model.vocab_size={model.vocab_size}"
  fits = config.tokenizer.path or config.tokenizer.vocab_size <= model.vocab_size
  yield fits, "tokenizer.vocab_size", limit, f"{model.vocab_size}"
  yield len(data.sources) > 0, "data.sources", "at least one source", "main"
  whole = not config.eval.tasks or config.mesh.context == 1
  yield whole, "mesh.context", "1 for config.eval.tasks, which score whole rows", "1"
  yield from _mesh_rules(config)


def _mesh_rules(config: ConfigDict):
  """What the mesh requires of the model and of the batch."""
  model, data, mesh = config.model, config.data, config.mesh
  devices = "devices along the axis, or -1 for all that remain"
  yield mesh.data == -1 or mesh.data > 0, "mesh.data", devices, "-1"
  for name, axes in mesh.rules.items():
    known = set(axes) <= set(AXES)
    yield known, f"mesh.rules.{name}", "mesh axes: " + " ".join(AXES), "fsdp or ()"
  rows = math.prod(mesh[axis] for axis in BATCH_AXES if axis != "data") * max(
    mesh.data, 1
  )
  micro = (mesh.microbatches or mesh.stage) if mesh.stage > 1 else 1
  unit = config.step.accumulation_steps * rows * micro
  yield (
    data.batch_size % unit == 0,
    "data.batch_size",
    f"a multiple of {unit} = accumulation_steps x mesh.{' x '.join(BATCH_AXES)}"
    + f" x {micro} microbatches" * (micro > 1),
    _nearest_multiples(data.batch_size, unit),
  )
  yield (
    mesh.stage == 1 or micro >= mesh.stage,
    "mesh.microbatches",
    f"at least config.mesh.stage={mesh.stage}",
    f"{mesh.stage}",
  )
  groups, layers = mesh.stage * mesh.stage_repeats, _pipelined_layers(model)
  yield (
    mesh.stage == 1 or layers % groups == 0,
    "model.num_layers",
    f"{groups} = mesh.stage x mesh.stage_repeats equal groups of {layers} layers",
    _nearest_multiples(layers, groups),
  )
  experts = model.moe.num_experts
  yield (
    mesh.expert == 1 or (experts > 0 and experts % mesh.expert == 0),
    "mesh.expert",
    f"a divisor of config.model.moe.num_experts={experts}",
    _nearest_divisors(max(experts, 1), mesh.expert),
  )
  yield from _context_rules(config)
  # What a kernel needs of the devices is checked once there are devices.
  why = why_not(model.attention, attention_case(config))
  yield why is None, "model.attention", f"{why}", "auto"


def attention_case(config: ConfigDict, platform: str = "") -> Case:
  """Returns what the config asks of an attention kernel."""
  model, length = config.model, config.data.seq_len
  _, asked = _what_is_learned(config)
  return Case(
    platform,
    model.dtype,
    length,
    length,
    model.head_dim,
    model.attention_softcap,
    prefix=asked in ("prefix", "span"),
    sinks=model.attention_sinks,
  )


def _context_rules(config: ConfigDict):
  """What splitting each row over its length requires."""
  model, data, mesh = config.model, config.data, config.mesh
  whole = mesh.context == 1
  yield (
    whole or (model.head in ("lm", "mlm") and not model.pair_head),
    "mesh.context",
    f"1 with config.model.head={model.head} and pairs: these read whole rows",
    "1",
  )
  ring, ways = model.attention == CONTEXT_PARALLEL, mesh.context * mesh.tensor
  needed = "auto where config.mesh.context=1"
  yield not ring or not whole, "model.attention", needed, "auto"
  unit = 2 * mesh.context if ring else mesh.context
  yield (
    data.seq_len % unit == 0,
    "data.seq_len",
    f"a multiple of {unit}, for config.mesh.context={mesh.context}",
    _nearest_multiples(data.seq_len, unit),
  )
  yield (
    whole or ring or model.num_kv_heads % ways == 0,
    "model.attention",
    f"{CONTEXT_PARALLEL}, unless config.model.num_kv_heads={model.num_kv_heads} "
    f"divides by {ways} = mesh.context x mesh.tensor",
    CONTEXT_PARALLEL,
  )


def _pipelined_layers(model: ConfigDict) -> int:
  """Returns the number of identical layers; the others run before the pipeline."""
  dense = model.moe.first_dense_layers if model.moe.num_experts else 0
  return model.num_layers - max(dense, 0 if model.first_norm else 1)


def _model_rules(model: ConfigDict):
  """The rules within `config.model`."""
  yield (
    model.positions != "rope" or model.head_dim % 2 == 0,
    "model.head_dim",
    "an even number: rotary positions rotate pairs",
    f"{model.head_dim + 1}",
  )
  pattern = set(model.layer_pattern)
  names = pattern <= {"local", "global"} and len(pattern) > 0
  yield (
    names,
    "model.layer_pattern",
    "local and global, separated by commas",
    "local,global",
  )
  moe, rope = model.moe, model.rope
  yield (
    moe.num_experts == 0 or moe.experts_per_token <= moe.num_experts,
    "model.moe.experts_per_token",
    f"at most config.model.moe.num_experts={moe.num_experts}",
    f"{moe.num_experts}",
  )
  yield (
    moe.num_experts == 0 or not model.use_bias,
    "model.use_bias",
    "False with experts, which have no biases",
    "False",
  )
  for key in ("keep", "offload"):
    named = set(model[key]) <= {"query", "key", "value", "attention", "hidden"}
    needed = "of query key value attention hidden"
    yield named, f"model.{key}", needed, "attention,hidden"
    full = model.remat == "full" or not model[key]
    yield full, "model.remat", f"full, for config.model.{key}", "full"
  fewer = moe.num_experts == 0 or moe.first_dense_layers < model.num_layers
  limit = f"fewer than config.model.num_layers={model.num_layers}"
  yield fewer, "model.moe.first_dense_layers", limit, "1"
  yield (
    rope.scaling in ("none", "linear") or rope.original_max_len > 0,
    "model.rope.original_max_len",
    f"the length that {rope.scaling} scaling starts from",
    f"{model.max_len}",
  )
  alone = model.first_norm or (
    model.norm_placement in ("pre", "both") and moe.num_experts == 0
  )
  yield alone, "model.first_norm", "True, unless norms come before dense layers", "True"
  yield (
    moe.num_experts == 0 or model.quantize == "none",
    "model.quantize",
    "none with experts, whose grouped products (ragged_dot) are not quantised",
    "none",
  )


def _what_is_learned(config: ConfigDict) -> tuple[str, str]:
  """Returns (group, kind): the task if there is one, otherwise the objective."""
  if config.task.kind == "none":
    return "objective", config.objective.kind
  return "task", config.task.kind


def _prediction_rules(config: ConfigDict):
  """The rules between what is predicted and the model that predicts it."""
  model, objective, task = config.model, config.objective, config.task
  group, asked = _what_is_learned(config)
  head = (HEAD_OF_OBJECTIVE if group == "objective" else HEAD_OF_TASK)[asked]
  needed = f"{head}, for config.{group}.kind={asked}"
  yield model.head == head, "model.head", needed, head
  needed = f"True, for config.{group}.kind={asked}"
  yield head != "lm" or model.causal, "model.causal", needed, "True"
  needed = "False: a masked token is predicted from both sides"
  yield asked != "masked" or not model.causal, "model.causal", needed, "False"
  pairs = task.kind == "none" and objective.pairs != "none"
  needed = f"masked, for config.objective.pairs={objective.pairs}"
  yield not pairs or asked == "masked", "objective.kind", needed, "masked"
  needed = f"True, for config.objective.pairs={objective.pairs}"
  yield not pairs or model.pair_head, "model.pair_head", needed, "True"
  rates = objective.mask_token_rate + objective.random_token_rate
  needed = "at most 1, with config.objective.mask_token_rate"
  yield rates <= 1 + 1e-9, "objective.random_token_rate", needed, "0.1"
  has_path = task.kind == "none" or task.path != ""
  needed = "labelled examples: csv, tsv, jsonl, or a TFDS name"
  yield has_path, "task.path", needed, "train.csv"
  needed = "False: a causal model has read nothing at the start of an option"
  yield asked != "choice" or not model.causal, "model.causal", needed, "False"
  yield from _objective_rules(config, asked, pairs)
  frozen = config.lora.rank == 0 or config.init_from != ""
  needed = "the run whose weights config.lora adapts"
  yield frozen, "init_from", needed, "runs/base"


def _objective_rules(config: ConfigDict, asked: str, pairs: bool):
  """What the knobs of `config.objective` require, where they are used."""
  objective, model, length = config.objective, config.model, config.data.seq_len
  given = asked not in ("masked", "span") or objective.mask_rate > 0
  yield given, "objective.mask_rate", f"above 0 for kind={asked}", "0.15"
  yield objective.mean_span >= 1, "objective.mean_span", "1 token or more", "3.0"
  yield not pairs or length >= 16, "data.seq_len", "room for two sentences", "128"
  types = not pairs or model.num_segment_types >= 2
  needed = f"2, for config.objective.pairs={objective.pairs}"
  yield types, "model.num_segment_types", needed, "2"
  if asked != "span":
    return
  some = objective.mask_rate < 1
  needed = "below 1: some of the text must remain"
  yield some, "objective.mask_rate", needed, "0.15"
  spans = math.ceil(length * objective.mask_rate / objective.mean_span) + 2
  needed = f"at least {spans}: one per span of a row, and one for the end"
  yield objective.num_sentinels >= spans, "objective.num_sentinels", needed, f"{spans}"


def _nearest_divisors(number: int, near: int) -> str:
  """Returns the three divisors of `number` nearest to `near`, as text."""
  small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
  found = {*small, *(number // d for d in small)}
  found = sorted(sorted(found, key=lambda d: abs(d - near))[:3])
  return " or ".join(map(str, found))


def _nearest_multiples(given: int, unit: int) -> str:
  """Returns the multiples of `unit` on both sides of `given`, as text."""
  down = given // unit * unit
  return " or ".join(str(m) for m in (down, down + unit) if m)
