"""Write text with a trained model.

  python -m flaxlm.generate --workdir=runs/quickstart --prompt="def main("

One prompt is streamed as it is written; several --prompt or --num_samples are computed
together. Without --prompt the model begins a document of its own.
"""

import pathlib

from flaxlm import cli
from flaxlm import config as configs
from flaxlm.errors import ConfigError


def main(argv: list[str] | None = None) -> None:
  parser = cli.parser(__doc__, "generate")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument("--prompt", action="append", help="text to continue; repeatable")
  parser.add_argument("--num_samples", type=int, default=1, help="texts a prompt")
  parser.add_argument("--max_tokens", type=int, default=200, help="new tokens a text")
  parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
  parser.add_argument("--top_k", type=int, default=0, help="0 is all tokens")
  parser.add_argument("--top_p", type=float, default=0.95, help="1 is all tokens")
  parser.add_argument("--seed", type=int, default=0)
  args, overrides = cli.parse(parser, argv)
  for name in ("num_samples", "max_tokens"):
    if getattr(args, name) < 1:
      raise ConfigError(f"--{name}", getattr(args, name), "a whole number from 1 up")
  config = configs.load_run(args.workdir, overrides)
  from flaxlm.parallel import hosts

  hosts.keep_freed_memory()
  write(config, args)


def write(config, args) -> None:
  """Samples and prints; the model lives on one device, in the type of its training."""
  import numpy as np

  from flaxlm import weights
  from flaxlm.data.tokenizer import Decoder
  from flaxlm.data.tokenizer_files import load_tokenizer
  from flaxlm.inference.decoding import Sampling, for_decoding, generate
  from flaxlm.parallel.mesh import one_device

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


if __name__ == "__main__":
  cli.run(main)
