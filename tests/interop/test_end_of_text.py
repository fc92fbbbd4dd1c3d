"""All tokens that end a text: from every file, kept with runs, exported again."""

import io
import json
import shutil

import pytest
import sentencepiece

from flaxlm.config import base
from flaxlm.config.load import config_to_json
from flaxlm.errors import DataError
from flaxlm.interop import export_run
from flaxlm.interop.end_of_text import find_end_ids, generation_config
from flaxlm.runs.directory import RunFiles, find_originals, keep_originals
from flaxlm.tokenizer.chat_template import CHATML, ChatTemplate
from flaxlm.tokenizer.export import find_inconvertible
from flaxlm.tokenizer.files import load_tokenizer
from flaxlm.tokenizer.sentencepiece import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def chat() -> Tokenizer:
  symbols = ("<|im_start|>", "<|im_end|>")
  return Tokenizer(train_tokenizer(["abc QA"], "char", 300, user_symbols=symbols))


def write(folder, **files: dict):
  folder.mkdir(exist_ok=True)
  for name, tree in files.items():
    (folder / f"{name}.json").write_text(json.dumps(tree))
  return folder


def test_end_ids_of_every_file(chat, tmp_path):
  folder = write(
    tmp_path,
    generation_config={"eos_token_id": [5, 2]},
    config={"eos_token_id": 7},
  )
  assert find_end_ids(folder, None, None) == (5, 2, 7)
  end = chat.control_id("<|im_end|>")
  template = ChatTemplate(CHATML)
  assert find_end_ids(folder, chat, template) == (5, 2, 7, end)
  assert find_end_ids(None, chat, template) == (end,)
  assert find_end_ids(None, chat, None) == ()
  assert find_end_ids(tmp_path / "x", None, None) == ()
  # Without special tokens, and for a template that takes no plain conversation.
  plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  assert find_end_ids(None, chat, ChatTemplate(plain)) == ()
  refusing = ChatTemplate("{{ raise_exception('a system message first') }}")
  assert find_end_ids(None, chat, refusing) == ()
  write(tmp_path, generation_config={"eos_token_id": None}, config={})
  assert find_end_ids(folder, None, None) == ()


def test_export_lists_all_of_them(tmp_path):
  like = {"bos_token_id": 1, "eos_token_id": 2}
  assert json.loads(generation_config(None, like, ())) == like
  assert json.loads(generation_config(None, like, (2, 9)))["eos_token_id"] == [2, 9]
  own = {"eos_token_id": [2, 9], "temperature": 0.6}
  folder = write(tmp_path, generation_config=own)
  content = (folder / "generation_config.json").read_bytes()
  assert generation_config(folder, like, (9,)) == content
  again = json.loads(generation_config(folder, like, (9, 4)))
  assert again == own | {"eos_token_id": [2, 9, 4]}


def test_runs_keep_what_they_started_from(tmp_path):
  """A run that starts from an imported one needs it no longer."""
  config = base.get_config()
  first, second, third = (RunFiles(tmp_path / name) for name in ("a", "b", "c"))
  for files, parent in ((first, ""), (second, str(first.workdir)), (third, "b")):
    files.workdir.mkdir()
    config.init_from = parent
    files.config.write_text(config_to_json(config))
  write(first.originals, config={"eos_token_id": 2}, generation_config={"x": 1})
  keep_originals(second, str(first.workdir))
  keep_originals(third, str(second.workdir))
  shutil.rmtree(first.workdir)
  shutil.rmtree(second.workdir)
  found = find_originals(config, third.workdir)
  assert found == third.originals
  names = sorted(path.name for path in found.iterdir())
  assert names == ["config.json", "generation_config.json"]
  keep_originals(third, "gone")  # has them already
  keep_originals(RunFiles(tmp_path / "d"), "")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("ids", ["</s>", [2, "</s>"], {"a": 1}, 2.5, True, [[1]]])
def test_what_is_no_id_is_refused_by_its_file(tmp_path, ids):
  write(tmp_path, generation_config={"eos_token_id": ids}, config={})
  with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id"):
    find_end_ids(tmp_path, None, None)


def test_a_tokenizer_that_is_no_tokenizer_json_keeps_its_own_files(tmp_path):
  """A user symbol and a dummy prefix go together in SentencePiece alone."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["abc abd"] * 20), model_writer=model, vocab_size=20,
    model_type="bpe", hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  added = {"content": "<tool>", "special": False}
  size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
  files = RunFiles(tmp_path)
  write(files.originals, tokenizer_config={"added_tokens_decoder": {f"{size}": added}})
  (files.originals / "tokenizer.model").write_bytes(model.getvalue())
  tokenizer = load_tokenizer(files.originals)
  assert size in tokenizer.encode("a<tool>b") and find_inconvertible(tokenizer.model)
  (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
  shape = base.get_config().model
  _, kept = export_run._tokenizer_files(shape, tmp_path, files.originals)
  assert sorted(kept) == ["tokenizer.model", "tokenizer_config.json"]
  assert kept["tokenizer.model"] == model.getvalue()
  out = tmp_path / "out"
  out.mkdir()
  for name, content in kept.items():
    (out / name).write_bytes(content)
  assert load_tokenizer(out).sha256 == tokenizer.sha256
