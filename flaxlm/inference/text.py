"""Writes text with a trained run: prompt in, streamed text out."""

import pathlib

from flaxlm.errors import ConfigError


def write_text(config, args) -> None:
  """Samples and prints; the model lives on one device, in the type of its training."""
  import numpy as np

  from flaxlm.inference.decoding import for_decoding, generate
  from flaxlm.inference.sampling import Sampling
  from flaxlm.parallel.mesh import one_device
  from flaxlm.runs import weights
  from flaxlm.tokenizer.files import load_tokenizer
  from flaxlm.tokenizer.pieces import Decoder

  sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
  workdir = pathlib.Path(args.workdir)
  tokenizer = load_tokenizer(workdir)
  prompts = [text for text in args.prompt or [""] for _ in range(args.num_samples)]
  begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
  ids = [begin + tokenizer.encode(text) for text in prompts]
  if not all(ids):
    raise ConfigError(
      "--prompt", "none", "a text: this tokenizer has no bos token to begin with"
    )
  mesh = one_device()
  model, _ = weights.restore_model(
    workdir, config, mesh, config.mesh.rules.to_dict(), args.step
  )
  model = for_decoding(model)  # here, so that the stacked weights are freed
  # Ids that stand for text, and the end of it; the embedding may have rows to spare.
  allowed = np.zeros(config.model.vocab_size, bool)
  for i, piece in enumerate(tokenizer.pieces()):
    allowed[i] = i == tokenizer.eos_id or (piece != b"" and i != tokenizer.unk_id)

  streaming = len(ids) == 1
  decoders = [Decoder(tokenizer) for _ in ids]
  texts, done = list(prompts), [False] * len(ids)
  if streaming:
    print(prompts[0], end="", flush=True)
  for new in generate(model, ids, args.max_tokens, sampling, allowed):
    for i, row in enumerate(new.tolist()):
      if done[i]:
        continue
      if tokenizer.eos_id in row:
        row, done[i] = row[: row.index(tokenizer.eos_id)], True
      text = decoders[i](row)
      texts[i] += text
      if streaming:
        print(text, end="", flush=True)
    if all(done):
      break
  tails = [decoder([], final=True) for decoder in decoders]
  if streaming:
    print(tails[0])
    return
  for i, (text, tail) in enumerate(zip(texts, tails, strict=True), 1):
    print(f"--- {i} of {len(texts)} ---\n{text}{tail}")
