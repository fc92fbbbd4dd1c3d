"""Every knob of flaxlm, with its unit. Other configs import this and change values.

Groups match the signature they are passed to (`TransformerConfig(**config.model)`), so
a knob that is missing here does not exist. The config is locked: a misspelt key fails
where it is written. `flaxlm/config/load.py` holds the rules that values must satisfy.
"""

import re

from ml_collections import ConfigDict

from flaxlm.errors import ConfigError


def source(kind="stdlib", path="", **changes) -> ConfigDict:
  """One corpus. Several of them, by name, make a mixture."""
  fields = ConfigDict()
  fields.kind = kind  # format of the documents, one of those in flaxlm/data/README.md
  fields.path = path  # glob of files; tfds: a name or a prepared directory
  fields.field = "text"  # the column that holds the text (all but stdlib, text)
  fields.document = "file"  # text files hold: file | paragraph | line documents
  fields.split = "train"  # TFDS split to train on
  fields.validation_split = ""  # TFDS split to validate on; "" splits by hash instead
  fields.weight = 1.0  # share of the training rows, relative to the other sources
  fields.max_documents = 0  # documents to read; 0 = all
  fields.update(changes)
  return fields


def sources(**by_name: ConfigDict) -> ConfigDict:
  for name in by_name:
    check_source_name(name)
  return ConfigDict(by_name)


def check_source_name(name: str) -> None:
  """Raises ConfigError if `name` cannot be a directory and part of a key."""
  if not re.fullmatch(r"[\w-]+", name):
    raise ConfigError(
      "config.data.sources", f"a source called {name!r}", "letters, digits, _ and -"
    )


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0  # of weights and of the order of the data
  config.num_steps = 1000  # optimizer steps
  config.hardware = ""  # to run on, as `flaxlm plan` names it: v5e:16x16, h100x8
  config.init_from = ""  # a run, or its checkpoints/STEP, to take weights from
  config.data = data_knobs()
  config.tokenizer = tokenizer_knobs()
  # Equal to these by default, but may be larger.
  vocab_size = config.tokenizer.get_oneway_ref("vocab_size")
  max_len = config.data.get_oneway_ref("seq_len")
  config.model = model_knobs(vocab_size, max_len)
  config.objective = objective_knobs()
  config.task = task_knobs()
  config.lora = lora_knobs()
  config.step = step_knobs()
  config.optim = optim_knobs()
  config.mesh = mesh_knobs()
  config.eval = evaluation_knobs()
  config.checkpoint = checkpoint_knobs()
  config.log = log_knobs()
  config.guards = guards_knobs()
  return config.lock()


def data_knobs() -> ConfigDict:
  data = ConfigDict()
  data.store = "data/stdlib"  # directory of the prepared tokens
  data.loader = "tfdata"  # tfdata | numpy (no TensorFlow) | synthetic (no store)
  data.seq_len = 256  # tokens per row
  data.batch_size = 16  # rows per optimizer step, over all devices and hosts
  data.num_threads = 2  # parallel batch reads
  data.prefetch = 4  # batches kept ready
  data.sources = sources(main=source())
  # hash of each document | tail of each file | auto: tail if the documents are few
  data.split = "auto"
  # Of the documents (hash), or of the characters or records of each file (tail).
  data.validation_fraction = 0.01
  data.shard_tokens = 16_777_216  # tokens per shard of the store, about
  data.on_corrupt = "stop"  # at a damaged record or file: stop | skip (1% at most)
  return data


def tokenizer_knobs() -> ConfigDict:
  tokenizer = ConfigDict()
  # A SentencePiece .model, a tokenizer.json, vocab.json or vocab.txt; "" trains one.
  tokenizer.path = ""
  tokenizer.kind = "bpe"  # bpe | unigram | char
  tokenizer.vocab_size = 4096  # tokens, special ones included
  tokenizer.byte_fallback = True  # spell unknown characters in bytes: lossless
  tokenizer.user_symbols = ()  # extra special tokens, never found in plain text
  tokenizer.train_bytes = 10_000_000  # text to train on, a sample of the corpus
  return tokenizer


def model_knobs(vocab_size, max_len) -> ConfigDict:
  model = ConfigDict()
  model.vocab_size = vocab_size  # rows of the embedding
  model.max_len = max_len  # tokens; size of learned positions
  model.num_layers = 6
  model.embed_dim = 384
  model.num_heads = 6  # query heads
  model.num_kv_heads = 6  # key and value heads; fewer than num_heads is grouped-query
  model.head_dim = 64
  model.mlp_dim = 1024
  model.causal = True  # False: every position attends to the whole text (BERT)
  model.positions = "rope"  # rope | learned | none
  model.norm = "rmsnorm"  # rmsnorm | layernorm
  model.norm_epsilon = 1e-5
  model.norm_placement = "pre"  # pre | post (OLMo 2) | both (Gemma) | residual (BERT)
  model.zero_centered_norm = False  # scales are stored minus 1 (Gemma)
  model.first_norm = True  # False: layer 1 has no norm before attention (ModernBERT)
  model.gated_mlp = True  # activation(gate) * up, as in SwiGLU and GeGLU
  model.activation = "silu"  # silu | gelu | gelu_tanh | relu
  model.use_bias = False  # in projections (LayerNorm follows it too)
  model.qkv_bias = False  # in query, key and value alone (Qwen 2)
  model.qk_norm = "none"  # none | head (each head alone) | full (all heads together)
  model.tie_embeddings = True  # one table for input and output
  model.scale_embeddings = False  # input embeddings times sqrt(embed_dim) (Gemma)
  model.embedding_norm = False  # a norm after the embeddings (BERT)
  model.num_segment_types = 0  # of sentence embeddings: BERT has 2
  model.sliding_window = 0  # tokens that a local layer sees, itself included; 0 = all
  model.layer_pattern = ("local",)  # local | global, repeated over the layers
  model.attention_scale = 0.0  # factor of the scores; 0 = head_dim ** -0.5
  model.attention_softcap = 0.0  # c * tanh(scores / c) (Gemma 2); 0 = none
  model.attention_sinks = False  # one learned logit per head in the softmax (gpt-oss)
  model.logit_softcap = 0.0
  model.head = "lm"  # lm | mlm | sequence | token | span | choice: what is predicted
  model.num_labels = 0  # classes of the heads sequence and token
  model.pooling = "first"  # first | mean | last token represents the text
  model.head_dense = True  # a dense layer before the classes (BERT's pooler, mlm)
  model.head_norm = False  # and a norm after it; mlm has it
  model.head_activation = "gelu"  # of that dense layer: gelu | gelu_tanh | silu | tanh
  model.pair_head = False  # predicts whether sentence B follows A (NSP, SOP)
  model.dropout = 0.0  # of embeddings and of what each block adds
  model.rope = rope_knobs()
  model.moe = moe_knobs()
  # auto (the fast one that is known to be right here) | a name of the table in
  # flaxlm/kernels/README.md; `flaxlm doctor` compares them on this machine
  model.attention = "auto"
  model.dtype = "float32"  # of activations: float32 | bfloat16; weights stay float32
  # 8-bit matrix products in the layers: none | fp8 | int8 (in the forward pass only).
  model.quantize = "none"
  model.remat = "none"  # none | full | dots: what the backward pass recomputes
  # With remat=full, of query key value attention hidden (of the MLP):
  model.keep = ()  # not recomputed, but kept on the device
  model.offload = ()  # not recomputed, but kept in the host's memory
  # Layers per scan iteration. On a CPU num_layers is fastest, but allows no remat:
  # XLA:CPU would merge the recomputed values with those that it has.
  model.unroll = 1
  return model


def rope_knobs() -> ConfigDict:
  rope = ConfigDict()
  rope.theta = 10_000.0  # base of the rotary wavelengths
  rope.local_theta = 0.0  # the same in local layers; 0 = theta
  rope.scaling = "none"  # none | linear | llama3 | yarn: for longer contexts
  rope.factor = 1.0  # by which the context grows
  rope.original_max_len = 0  # tokens, before the scaling (llama3, yarn)
  rope.low_frequency_factor = 1.0  # llama3: wavelengths above original / low are scaled
  rope.high_frequency_factor = 4.0  # llama3: those below original / high are not
  rope.beta_fast = 32.0  # yarn: turns within original_max_len that need no scaling
  rope.beta_slow = 1.0  # yarn: turns that need all of it
  rope.attention_factor = 0.0  # yarn: factor of the rotations; 0 = from rope.factor
  return rope


def moe_knobs() -> ConfigDict:
  moe = ConfigDict()
  moe.num_experts = 0  # 0 = a dense MLP
  moe.experts_per_token = 2
  moe.expert_dim = 0  # hidden width of one expert; 0 = mlp_dim
  moe.shared_dim = 0  # hidden width of the expert that all tokens use; 0 = none
  moe.shared_gate = False  # a sigmoid that weighs the shared expert (Qwen 2 MoE)
  moe.first_dense_layers = 0  # of width mlp_dim, before those with experts (DeepSeek)
  moe.router = "softmax"  # softmax | sigmoid of the router's scores
  moe.renormalize = True  # the weights of the chosen experts sum to 1
  moe.routed_scale = 1.0  # factor of what the chosen experts add
  moe.balance = "loss"  # loss | bias (DeepSeek-V3: no loss) | none
  moe.aux_loss = 0.01  # weight of the balancing loss, a sum over layers (Switch, eq. 4)
  moe.z_loss = 0.0  # weight of log(Z)^2 of the router (ST-MoE, eq. 5)
  moe.bias_rate = 1e-3  # step size of the balancing bias
  moe.capacity_factor = 0.0  # an expert's room / its fair share; 0 drops no token
  return moe


def objective_knobs() -> ConfigDict:
  objective = ConfigDict()
  objective.kind = "causal"  # causal | masked (BERT) | span (T5, UL2) | prefix | fim
  objective.mask_rate = 0.15  # share of the tokens that is predicted (masked, span)
  objective.mask_unit = "token"  # token | word | span: what is masked together
  objective.mean_span = 3.0  # tokens per span
  objective.mask_token_rate = 0.8  # share of the predicted ones shown as [MASK]
  objective.random_token_rate = 0.1  # share of them shown as another token
  objective.pairs = "none"  # none | nsp | sop: a second task on sentence pairs
  objective.num_sentinels = 100  # last ids of the vocabulary that mark spans (span)
  objective.fim_rate = 0.5  # share of the documents that is rearranged (fim)
  objective.spm_rate = 0.5  # share of these with the suffix first
  return objective


def task_knobs() -> ConfigDict:
  task = ConfigDict()
  task.kind = "none"  # none | classify | tag | qa | choice | chat: labelled examples
  task.path = ""  # csv, tsv or jsonl by glob, or a TFDS name (glue/sst2)
  task.validation_path = ""  # the same; "" holds out data.validation_fraction by hash
  task.format = "auto"  # auto (by the name) | csv | tsv | jsonl | squad | conll | tfds
  task.columns = ()  # names of the columns of a file without a header
  task.split = "train"  # TFDS splits
  task.validation_split = ""
  # Columns. text: "" = text (classify) tokens (tag) question (qa) query (choice)
  # messages (chat). label: "" = label, tags, answers, gold.
  task.text = ""
  task.text_pair = ""  # "" = none (classify), context (qa)
  task.label = ""
  task.choices = ()  # the column of all options, or one each; () = choices
  # Names of the classes, in order; () = init_from's, or else all that occur, sorted.
  task.labels = ()
  task.doc_stride = 128  # tokens between windows of a long context (qa)
  task.pack = True  # several conversations per row (chat)
  task.chat_template = ""  # a Jinja2 file; "" = the tokenizer's, or ChatML
  return task


def lora_knobs() -> ConfigDict:
  lora = ConfigDict()
  lora.rank = 0  # of the adapters of frozen weights; 0 trains all weights
  lora.alpha = 16.0  # adapters are scaled by alpha / rank
  lora.targets = ("query", "value")  # names of the weights with adapters
  return lora


def step_knobs() -> ConfigDict:
  step = ConfigDict()
  step.z_loss = 0.0  # weight of log(Z)^2 (PaLM, section 5)
  step.accumulation_steps = 1  # micro-batches per step; batch_size is their sum
  step.offload_optimizer = False  # keep its state in the host's memory
  step.ema_decay = 0.0  # of an average of the weights that all commands use; 0 = none
  return step


def optim_knobs() -> ConfigDict:
  optim = ConfigDict()
  optim.name = "adamw"  # adamw | lion | adafactor | muon
  optim.peak_learning_rate = 1e-3
  optim.schedule = "cosine"  # cosine | linear | wsd | constant
  optim.warmup_steps = 100  # linear, from zero
  optim.decay_fraction = 0.2  # of num_steps, spent in wsd's final decay
  optim.end_factor = 0.1  # last learning rate / peak
  optim.weight_decay = 0.1  # decoupled; weights only, not norms and biases
  optim.b1 = 0.9
  optim.b2 = 0.95
  optim.epsilon = 1e-8
  optim.max_grad_norm = 1.0  # global norm to clip to; 0 = no clipping
  return optim


def mesh_knobs() -> ConfigDict:
  mesh = ConfigDict()
  # Devices along each axis, from the slowest network to the fastest.
  mesh.slice = 1  # TPU slices or GPU nodes that a slow network joins: replicas
  mesh.stage = 1  # a pipeline over the layers
  mesh.data = -1  # replicas; -1 = all devices that remain
  mesh.fsdp = 1  # weights split, and gathered layer by layer
  mesh.expert = 1  # experts split; tokens travel to theirs
  mesh.context = 1  # each row split over its length
  mesh.tensor = 1  # heads, hidden units and vocabulary split
  mesh.microbatches = 0  # of the pipeline; 0 = as many as stages
  mesh.stage_repeats = 1  # groups of layers per stage; more shrink the bubble
  mesh.start_seconds = 300.0  # longest wait for all processes at the start
  mesh.multihost = False  # find the other hosts from Slurm, TPU or GKE metadata
  # Logical dimension of a weight or activation -> mesh axes that split it.
  rules = mesh.rules = ConfigDict()
  rules.batch = ("slice", "data", "fsdp", "expert")
  rules.length = ("context",)
  rules.stream = ("tensor",)  # tokens between blocks, beside batch and length
  rules.layer = ("stage",)
  rules.vocab = ("tensor", "stage")
  rules.embed = ("fsdp", "context", "expert")
  rules.heads = ("tensor",)
  rules.mlp = ("tensor",)
  rules.expert = ("expert",)
  rules.position = ()
  rules.norm = ()
  return mesh


def evaluation_knobs() -> ConfigDict:
  evaluation = ConfigDict()
  evaluation.every = 500  # steps; 0 = only at the end
  evaluation.batches = 0  # of batch_size rows; 0 = the whole validation split
  # Names in flaxlm/evals/README.md, or task files; scored with the held-out loss.
  evaluation.tasks = ()
  evaluation.task_data = ""  # directory of their data; "" = the current one
  evaluation.task_seconds = 60.0  # per evaluation, over all tasks; 0 = all items
  return evaluation


def checkpoint_knobs() -> ConfigDict:
  checkpoint = ConfigDict()
  checkpoint.every = 500  # steps; the last step is always saved
  checkpoint.keep_last = 2  # newest checkpoints to keep
  checkpoint.keep_every = 0  # steps; multiples are never deleted; 0 = none
  return checkpoint


def log_knobs() -> ConfigDict:
  log = ConfigDict()
  log.every = 10  # steps per line
  log.tensorboard = True
  log.calibration = "calibration.json"  # by `plan --calibrate`; predictions are logged
  log.profile_step = 0  # first step to profile; 0 = never
  log.profile_num_steps = 3
  return log


def guards_knobs() -> ConfigDict:
  guards = ConfigDict()
  guards.max_bad_steps = 10  # NaN or infinite steps in a row before giving up
  guards.compare_every = 100  # steps between comparisons of replicas; 0 = never
  guards.hang_seconds = 3600  # s without progress before the run is ended; 0 = never
  return guards
