"""Hugging Face's tokenizers: ids as transformers has them, special tokens, lengths, and files that do not fit.

`tokenizer_files/make.py` made the tokenizers beside it, and with transformers `reference.json` of each.
"""

import dataclasses
import json
import pathlib
import pickle
import shutil
import sys

from conftest import assert_refused, call, train_flags
import numpy as np
import pytest

from evo_jax.data import tokenizers
from evo_jax.data.chat import ChatTemplate, ChatTokenizer
from evo_jax.data.huggingface import HuggingFace
from evo_jax.decoding.progress import Progress, Snapshot
from evo_jax.decoding.prompts import Request, encode_with_gaps
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.pretrained.gguf_file import open_gguf
from evo_jax.run import load_run

FOLDER = pathlib.Path(__file__).parent / "tokenizer_files"
BYTE_LEVEL = ["llama3", "qwen2", "smollm"]
NAMES = [*BYTE_LEVEL, "llama2", "mistral", "unigram"]
TEXTS = json.loads((FOLDER / "texts.json").read_text())


def load(name):
  return tokenizers.load_tokenizer("huggingface", str(FOLDER / name))


def reference(name):
  return json.loads((FOLDER / name / "reference.json").read_text())


def altered(name, tmp_path, file="tokenizer.json", **changes):
  """A copy of a tokenizer whose JSON file has other fields."""
  folder = tmp_path / name
  shutil.copytree(FOLDER / name, folder)
  path = folder / file
  values = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
  path.write_text(json.dumps(values))
  return folder


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(name):
  tokenizer = load(name)
  for text, ids in zip(TEXTS, reference(name)["text"]):
    if name == "unigram" and any(token in text for token in tokenizer.special):
      continue  # transformers makes special tokens of them
    assert tokenizer.encode(text).tolist() == ids, text
    assert tokenizer.encode(text.encode()).tolist() == ids, text


def test_ids_are_those_of_sentencepiece():
  tokenizer = load("llama2")
  for text, ids in zip(TEXTS, reference("llama2")["sentencepiece"]):
    if "\u2581" not in text and not tokenizer.special.keys() & set(text.split()):
      assert tokenizer.encode(text).tolist() == ids, text


def random_text(rng, length=60):
  ranges = [(0, 0x20), (0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x600), (0x3000, 0xD7FF), (0xE000, 0x110000)]
  picked = [ranges[i] for i in rng.integers(0, len(ranges), length)]
  return "".join(chr(rng.integers(*limits)) if rng.random() < 0.8 else " " for limits in picked)


@pytest.mark.parametrize("name", ["llama3", "smollm", "llama2", "mistral"])
def test_lengths_add_up_and_text_comes_back(name):
  tokenizer, rng = load(name), np.random.default_rng(0)
  lengths, space = tokenizer.lengths(), int(name in ("llama2", "mistral"))
  for text in [*TEXTS, *(random_text(rng) for _ in range(200))]:
    text = "".join(c for c in text if not tokenizer.lost(c)).lstrip(" " if name == "mistral" else "")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert lengths[ids].sum() == len(text.encode()) + (space if text else 0)  # the space in front of text ...
    if text:
      assert lengths[[tokenizer.separator_id, *ids]].sum() == len(text.encode())  # which the separator takes back


@pytest.mark.parametrize("name", NAMES)
def test_lengths_of_pieces_of_a_text(name):
  tokenizer = load(name)
  lengths = tokenizer.lengths()
  special = set(tokenizers.special_ids(tokenizer))
  assert special >= set(tokenizer.special.values())
  assert all(lengths[i] == 0 for i in special - {tokenizer.separator_id})
  assert lengths.shape == (tokenizer.vocab_size,)
  first, rest = tokenizer.encode("the river"), tokenizers.continuing(tokenizer).encode(" runs")
  assert lengths[[*first, *rest]].sum() == len("the river runs") + (lengths[tokenizer.separator_id] < 0)
  assert tokenizer.decode(np.concatenate([first, rest])) == "the river runs"


def test_normalized_text_is_counted_as_it_is_encoded():
  tokenizer = load("qwen2")
  ids = tokenizer.encode("cafe\u0301")
  assert tokenizer.decode(ids) == "caf\xe9" and tokenizer.lengths()[ids].sum() == len("caf\xe9".encode())
  assert tokenizer.lost("cafe\u0301 \u212b") == "" and "NFC" in tokenizer.description


@pytest.mark.parametrize(
  "name, text, lost",
  [
    ("smollm", "a\x00b\x07", "\x00\x07"),
    ("llama3", "\x00\x07\u2581\U0010ffff", ""),
    ("llama2", "a\u2581\x00 \u4e16", "\u2581"),
    ("unigram", "the \u4e02\u4e02 river", "\u4e02\u4e02"),
  ],
)
def test_characters_without_a_token_are_lost(name, text, lost):
  assert load(name).lost(text) == lost


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_text_are_text(name):
  tokenizer = load(name)
  for token, id_ in tokenizer.special.items():
    for text in (token, f"a{token}b", f" {token} {token}"):
      ids = tokenizer.encode(text).tolist()
      assert id_ not in ids or (name == "unigram" and token == "<unk>")  # which has no token for some characters
      assert name == "unigram" or not set(ids) & set(tokenizers.special_ids(tokenizer))
      assert name == "unigram" or tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize("name", NAMES)
def test_another_process_gets_the_same_tokenizer(name):
  tokenizer = load(name)
  copy = pickle.loads(pickle.dumps(tokenizer))
  numbers = " ".join(f"({id_} {id_}, {id_})" for id_ in tokenizer.special.values())
  for text in (numbers, *tokenizer.special, *TEXTS):
    for begins in (True, False):
      assert copy.encode(text, begins).tolist() == tokenizer.encode(text, begins).tolist(), text
    assert copy.encode_documents([text])[0].tolist() == tokenizer.encode_documents([text])[0].tolist(), text
  assert name == "unigram" or not set(copy.encode(numbers).tolist()) & set(tokenizer.special.values())


def test_a_special_token_that_merges_could_make_is_text(tmp_path):
  specification = json.loads((FOLDER / "smollm" / "tokenizer.json").read_text())
  model = specification["model"]
  model["vocab"]["<|"] = len(model["vocab"])
  pairs = [["<", "|"], ["<|", "im"], ["<|im", "_"], ["<|im_", "end"], ["<|im_end", "|"], ["<|im_end|", ">"]]
  pairs += [["i", "m"], ["e", "n"], ["en", "d"]]
  for pair in pairs:
    model["vocab"].setdefault("".join(pair), len(model["vocab"]))
  model["merges"] = [*pairs[6:], *pairs[:6], *model["merges"]]
  model["ignore_merges"] = True
  folder = altered("smollm", tmp_path, model=model, pre_tokenizer={**specification["pre_tokenizer"], "pretokenizers": [
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]})  # fmt: skip
  tokenizer = HuggingFace(str(folder))
  assert tokenizer.special["<|im_end|>"] not in tokenizer.encode("<|im_end|>")
  assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"


def test_added_tokens_that_are_not_special_are_tokens():
  tokenizer = load("qwen2")
  ids = tokenizer.encode("a<tool_call>{}</tool_call>").tolist()
  number = tokenizer.special["<|im_end|>"] + 1
  assert number in ids and number + 1 in ids
  assert tokenizer.lengths()[number] == len("<tool_call>") and tokenizer.decode(ids) == "a<tool_call>{}</tool_call>"


@pytest.mark.parametrize(
  "name, begin, separator, end, turn_end",
  [
    (
      "llama3",
      "<|begin_of_text|>",
      "<|end_of_text|>",
      "<|end_of_text|> <|eom_id|> <|eot_id|>",
      "<|eom_id|> <|eot_id|>",
    ),
    ("qwen2", "<|endoftext|>", "<|endoftext|>", "<|endoftext|> <|im_end|>", "<|im_end|>"),
    ("smollm", "<|endoftext|>", "<|endoftext|>", "<|endoftext|> <|im_end|>", "<|im_end|>"),
    ("llama2", "<s>", "</s>", "</s>", "</s>"),
    ("unigram", "<s>", "</s>", "</s>", ""),
  ],
)
def test_ids_that_begin_and_end(name, begin, separator, end, turn_end):
  tokenizer = load(name)
  ids = lambda names: tuple(sorted(tokenizer.special[token] for token in names.split()))
  assert tokenizer.begin_id == tokenizer.special[begin] and tokenizer.separator_id == tokenizer.special[separator]
  assert tokenizer.end_ids == ids(end) and tokenizer.turn_end_ids == ids(turn_end)


@pytest.mark.parametrize("name", NAMES)
def test_no_begin_token_is_added_to_text(name):
  """Sequences have it at position 0 already; transformers adds it for those tokenizers whose begin_id is bos_token."""
  tokenizer, begun = load(name), reference(name)["begun"]
  assert tokenizer.begin_id not in tokenizer.encode("a")
  bos = tokenizer.special.get(tokenizer.named.get("bos_token"))
  assert (begun[0] == bos) == (tokenizer.begin_id == bos) or name == "unigram"  # which says add_bos_token instead


def test_token_0_is_a_token_like_any_other(tmp_path):
  tokenizer = load("llama3")
  assert 0 not in tokenizers.special_ids(tokenizer) and tokenizer.lengths()[0] == 1
  folder = altered("smollm", tmp_path, "generation_config.json", eos_token_id=0, bos_token_id=0)
  assert HuggingFace(str(folder)).end_ids == (0, 2)


def test_text_ends_at_any_end_id_and_others_are_not_shown():
  tokenizer = load("qwen2")
  special = tokenizer.special
  for end in tokenizer.end_ids:
    assert tokenizer.decode([*tokenizer.encode("ab"), end, *tokenizer.encode("cd")]) == "ab"
  assert tokenizer.decode([special["<|im_start|>"], *tokenizer.encode("ab")]) == "ab"
  with pytest.raises(UserError, match=f"token {tokenizer.vocab_size} is outside the vocabulary"):
    tokenizer.decode([tokenizer.vocab_size])


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_a_text_grows_as_its_tokens_do(name):
  tokenizer = load(name)
  ids, shown = tokenizer.encode("世界 \U0001f99c!"), ""
  for n in range(len(ids) + 1):
    text = tokenizer.decode(ids[:n]).rstrip("\ufffd")
    assert text.startswith(shown)
    shown = text
  assert shown == "世界 \U0001f99c!"


@pytest.mark.parametrize("name", NAMES)
def test_a_continuation_keeps_its_space_and_gets_none(name):
  tokenizer = load(name)
  rest = tokenizers.continuing(tokenizer)
  ids = [*tokenizer.encode("the"), *rest.encode(" river"), *rest.encode("s")]
  assert tokenizer.decode(ids) == "the rivers" and rest.decode(rest.encode(" river")) == " river"
  assert rest.vocab_size == tokenizer.vocab_size
  assert tokenizers.continuing(tokenizers.Bytes()).decode(np.array([1])) == "\0"


def test_files_make_the_same_tokenizer(tmp_path):
  for name in NAMES:
    tokenizer, folder = load(name), tmp_path / name
    folder.mkdir()
    for file, content in tokenizer.files().items():
      (folder / file).write_bytes(content)
    copy = HuggingFace(str(folder))
    assert copy.identity == tokenizer.identity and copy.end_ids == tokenizer.end_ids
    assert copy.chat_template == tokenizer.chat_template
  assert len({load(name).identity for name in NAMES}) == len(NAMES)


def test_files_may_say_it_in_other_ways(tmp_path):
  """Tokens as objects, one end id, several chat templates, tokens that tokenizer_config.json alone calls special."""
  changes = {
    "eos_token": {"content": "<|im_end|>", "lstrip": False},
    "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
    "added_tokens_decoder": {"0": {"content": "<tool_call>", "special": True}, "1": None},
  }
  folder = altered("qwen2", tmp_path, "tokenizer_config.json", **changes)
  (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
  tokenizer, original = HuggingFace(str(folder)), load("qwen2")
  assert tokenizer.special.keys() == original.special.keys() | {"<tool_call>"}
  assert tokenizer.end_ids == (7, *original.end_ids) and tokenizer.chat_template == "yes"
  assert tokenizer.decode(tokenizer.encode("<tool_call>")) == "<tool_call>"
  assert tokenizer.encode("((").tolist() == [7, 7] and tokenizer.decode(tokenizer.encode("a(b")) == "a"


def test_added_tokens_keep_their_ids_or_are_refused(tmp_path):
  specification = json.loads((FOLDER / "qwen2" / "tokenizer.json").read_text())
  specification["added_tokens"][-1]["id"] += 5
  with pytest.raises(UserError, match=r"tokenizer\.json: .*</tool_call>"):
    HuggingFace(str(altered("qwen2", tmp_path, added_tokens=specification["added_tokens"])))


def test_truncation_padding_and_dropout_are_not_done(tmp_path):
  specification = json.loads((FOLDER / "llama3" / "tokenizer.json").read_text())
  folder = altered(
    "llama3",
    tmp_path,
    truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
             "pad_token": "!"},
    model={**specification["model"], "dropout": 0.9},
  )  # fmt: skip
  assert HuggingFace(str(folder)).encode(TEXTS[6]).tolist() == reference("llama3")["text"][6]


@pytest.mark.parametrize(
  "file, changes, message",
  [
    ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "type WordLevel"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}, "cannot be read"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level nor"),
    ("tokenizer_config.json", {"chat_template": {"a": 1}}, "chat_template is not a string"),
    ("tokenizer_config.json", {"eos_token": 2}, "eos_token 2 is not in the vocabulary"),
    ("tokenizer_config.json", {"eos_token": ["a"]}, r"eos_token \['a'\] is not in the vocabulary"),
    ("tokenizer_config.json", {"bos_token": "<nowhere>"}, "bos_token '<nowhere>' is not in the vocabulary"),
    ("generation_config.json", {"eos_token_id": [1, 9999]}, "eos_token_id 9999 is not in the vocabulary"),
    ("generation_config.json", {"eos_token_id": "<s>"}, "eos_token_id '<s>' is not in the vocabulary"),
  ],
)
def test_what_does_not_fit_is_refused(tmp_path, file, changes, message):
  with pytest.raises(UserError, match=f"{file}: .*{message}"):
    HuggingFace(str(altered("qwen2", tmp_path, file, **changes)))


def test_missing_and_damaged_files_are_named(tmp_path):
  with pytest.raises(UserError, match=r"tokenizer_path: is empty; huggingface needs the folder that holds tokenizer"):
    tokenizers.load_tokenizer("huggingface", "")
  with pytest.raises(UserError, match=r"tokenizer\.json: there is no such file$"):
    HuggingFace(str(tmp_path))
  (tmp_path / "tokenizer.model").write_bytes(b"")
  with pytest.raises(UserError, match="only a SentencePiece model is there"):
    HuggingFace(str(tmp_path))
  for content in (b"", b"{", b"[]", b"\xff\xfe", b"{}"):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: "):
      HuggingFace(str(tmp_path))
  for content in (b"{", b"[]"):
    folder = altered("qwen2", tmp_path)
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: is (damaged|not a JSON object)"):
      HuggingFace(str(folder))
    shutil.rmtree(folder)


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch):
  tokenizer = load("qwen2")
  for library in ("tokenizers", "jinja2", "gguf"):
    monkeypatch.setitem(sys.modules, library, None)
  for use in (lambda: load("qwen2"), lambda: ChatTemplate(tokenizer), lambda: open_gguf("model.gguf")):
    with pytest.raises(UserError, match=r"need.* the package \w+: pip install 'evo_jax\[pretrained\]'$"):
      use()


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
  folder = altered("llama2", tmp_path, "tokenizer_config.json", bos_token=None, eos_token=None)
  specification = json.loads((folder / "tokenizer.json").read_text())
  specification["added_tokens"] = []
  (folder / "tokenizer.json").write_text(json.dumps(specification))
  with pytest.raises(UserError, match=r"tokenizer_config\.json: names no eos_token"):
    HuggingFace(str(folder))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, text):
  folder = tmp_path_factory.mktemp("run")
  tokenizer = {"data__tokenizer": "huggingface", "data__tokenizer_path": FOLDER / "qwen2"}
  changes = {"train__steps": 2, "eval__sequences": 8, "eval__samples": 0, "window__count": 0, "eval__paths": ("ar",)}
  done = call("evo_jax.main", *train_flags(folder, text, **tokenizer, **changes))
  assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
  return folder


def test_a_run_keeps_all_files_of_its_tokenizer(workdir):
  copies = {path.name: path.read_bytes() for path in (workdir / "tokenizer").iterdir()}
  assert copies == load("qwen2").files() and "generation_config.json" in copies
  assert load_run(str(workdir)).tokenizer.end_ids == load("qwen2").end_ids


def test_commands_use_a_runs_tokenizer(workdir):
  done = call("evo_jax.generate", f"--workdir={workdir}", "--prompt=caf\xe9 <|im_end|>", "--max_tokens=3", "--json")
  assert done.returncode == 0, done.stderr
  (generation,) = json.loads(done.stdout)
  assert generation["prompt"] == "caf\xe9 <|im_end|>" and len(generation["tokens"]) <= 3
  question = ("--chat", "--prompt=hi", "--max_tokens=2", "--greedy")
  done = call("evo_jax.generate", f"--workdir={workdir}", *question, "--json")
  assert done.returncode == 0, done.stderr
  (generation,) = json.loads(done.stdout)
  assert generation["prompt"] == "hi"
  shown = call("evo_jax.generate", f"--workdir={workdir}", *question)
  assert shown.stdout == generation["text"] + "\n"  # the answer alone
  conversation = load_run(str(workdir))
  chat = ChatTokenizer(conversation.tokenizer)
  write = Sampler(dataclasses.replace(conversation, tokenizer=chat), Sampling(max_tokens=2, greedy=True))
  assert write(["hi"])[0].tokens == generation["tokens"]


def test_an_export_names_the_token_that_texts_began_with(workdir, tmp_path):
  """Qwen's tokenizer has no begin token; its generation_config.json names the one that separates documents."""
  done = call("evo_jax.convert", f"--workdir={workdir}", f"--export={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  said = json.loads((FOLDER / "qwen2" / "generation_config.json").read_text())
  read = lambda name: json.loads((tmp_path / "out" / name).read_text())
  assert said["bos_token_id"] == load("qwen2").special["<|endoftext|>"]
  for written in (read("generation_config.json"), read("config.json")):
    assert written["bos_token_id"] == said["bos_token_id"]
    assert sorted(written["eos_token_id"]) == sorted(said["eos_token_id"])
  assert read("tokenizer_config.json").get("bos_token") is None  # the tokenizer stays the one that came in


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--chat",), "--chat: needs a --prompt"),
    (("--chat", "--infill=a [...]", "--mode=flow"), "--chat: needs a --prompt"),
    (("--system=Be brief.", "--prompt=a"), "--system: is of a conversation"),
  ],
)
def test_flags_of_conversations_go_together(flags, message):
  assert_refused(call("evo_jax.generate", "--workdir=nowhere", *flags), message)


def test_a_continuation_follows_its_prompt(tmp_path):
  """Where a tokenizer puts a space in front of text, written words keep theirs, and what surrounds a gap gets none."""
  tokenizer = load("llama2")
  assert encode_with_gaps("the [...2]river", tokenizer, 1, 32) == [
    *tokenizer.encode("the "),
    None,
    None,
    *tokenizers.continuing(tokenizer).encode("river"),
  ]
  prompt, written = tokenizer.encode("the"), tokenizers.continuing(tokenizer).encode(" river runs")
  tokens = np.array([tokenizer.begin_id, *prompt, *written])
  length = len(tokens)
  for stop, text in (((), " river runs"), ((" runs",), " river")):
    row = Snapshot(tokens, length, True, length, np.arange(length))
    progress = Progress(Request("the", tuple(prompt.tolist()), length, 0, 0), tokenizer, stop)
    assert progress.update(row, 1.0) == text and progress.generation(row).text == text
