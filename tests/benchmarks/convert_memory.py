"""How much memory import and export take, on a random Llama of chosen depth.

  python tests/benchmarks/convert_memory.py              # Llama 3.2 1B, 13 GB disk
  python tests/benchmarks/convert_memory.py --layers=2   # a quick trial

Writes a bfloat16 checkpoint of random numbers, one tensor at a time. Then runs each
part in its own process and reads its peak resident memory (VmHWM, which also counts
pages of mapped files). "above" is that peak minus the float32 weights, and minus a
process that imports the same libraries and does nothing. It should stay below the
largest tensor. Export holds one stacked weight at a time, so it stays below the size of
the model. If Orbax compresses, `import` also holds the compressed data.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
LLAMA_3_2_1B = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 128256,
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "num_hidden_layers": 16,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 64,
  "max_position_embeddings": 131072,
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
}
PEAK = """
import pathlib, re
status = pathlib.Path("/proc/self/status").read_text()
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""
PARTS = {
  "nothing": "import jax, flaxlm.convert, flaxlm.interop.export_run\njax.devices()",
  "read_model": "from flaxlm.interop.huggingface import read_model\nread_model('{hf}')",
  "import": "from flaxlm import convert\n"
  "convert.main(['import', '--from={hf}', '--workdir={run}'])",
  "export bfloat16": "from flaxlm import convert\n"
  "convert.main(['export', '--workdir={run}', '--to={out}', '--dtype=bfloat16'])",
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=16)
  parser.add_argument("--directory", help="with room for all files")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.directory) as directory:
    run(pathlib.Path(directory), LLAMA_3_2_1B | {"num_hidden_layers": args.layers})


def run(directory: pathlib.Path, config: dict) -> None:
  names = {name: directory / name for name in ("hf", "run", "out")}
  names["hf"].mkdir()
  sizes = write_random(names["hf"], config)
  model, largest = 4 * sum(sizes), 4 * max(sizes)
  print(f"weights {model / 1e9:.3f} GB in float32, largest {largest / 1e9:.3f} GB")
  for part, code in PARTS.items():
    start = time.perf_counter()
    peak = measure(code.format(**names))
    if part == "nothing":
      empty = peak
      print(f"{part:16} peak {peak / 1e9:.3f} GB")
      continue
    above = peak - empty - model
    print(
      f"{part:16} peak {peak / 1e9:.3f} GB, above {above / 1e9:+.3f} GB "
      f"({above / largest:.2f} of the largest tensor), "
      f"{time.perf_counter() - start:.0f} s"
    )


def write_random(directory: pathlib.Path, config: dict) -> list[int]:
  """Writes the checkpoint; returns the number of elements of each tensor."""
  sys.path.insert(0, str(ROOT))
  from flaxlm.interop import huggingface as hf
  from flaxlm.interop.hf_config import read_config
  from flaxlm.interop.safetensors_files import write_safetensors
  from flaxlm.interop.weight_layout import lay_out_weights
  from flaxlm.models.trees import nest

  family, architecture, fields = read_config(config, [])
  fields = nest(fields, ".")
  shapes = hf.weight_shapes(fields)
  parts = lay_out_weights([*family.rows, *architecture.rows], fields, shapes)
  bfloat16, rng = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)

  def arrays():
    for part in parts:
      numbers = rng.standard_normal(part.shape, np.float32)
      yield part.name, numbers.astype(bfloat16)

  (directory / "config.json").write_text(json.dumps(config))
  write_safetensors(directory, {p.name: (p.shape, bfloat16) for p in parts}, arrays())
  return [int(np.prod(part.shape)) for part in parts]


def measure(code: str) -> int:
  """Returns the peak resident memory of a process that runs `code`, in bytes."""
  result = subprocess.run(
    [sys.executable, "-c", code + PEAK], cwd=ROOT, capture_output=True, text=True
  )
  if result.returncode:
    raise SystemExit(result.stderr)
  return int(result.stdout.split("peak ")[-1])


if __name__ == "__main__":
  main()
