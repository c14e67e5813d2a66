"""Makes the small tokenizers of this folder, and what transformers and sentencepiece make of some texts with them.

Run by hand where transformers, protobuf, sentencepiece and jinja2 are installed: python tests/tokenizer_files/make.py
"""

import io
import json
import pathlib
import random
import shutil

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
import transformers
from transformers import AutoTokenizer, LlamaTokenizer

HERE = pathlib.Path(__file__).parent
TEXT = (HERE.parents[1] / "LICENSE").read_text() + "naïve café über 世界 世界 1234 56 don't we'll   x = [1, 2]\n\n" * 5
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = (
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_CHAT = (
  "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] +"
  " '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
  "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
LLAMA2_CHAT = (
  "{% if messages[0]['role'] == 'system' %}"
  "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
  "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
  "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('roles must alternate') }}{% endif %}"
  "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') +"
  " message['content'].strip() + ' [/INST]' }}{% else %}{% generation %}{{ ' ' + message['content'].strip() + ' '"
  " + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
CHATS = [
  [{"role": "user", "content": "What is a token?"}],
  [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Two words, 世界! "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "1234"},
  ],
]


def texts() -> list[str]:
  rng = random.Random(0)

  def scrambled(length):
    ranges = [
      (0, 0x20),
      (0x20, 0x7F),
      (0x20, 0x7F),
      (0xA0, 0x250),
      (0x300, 0x370),
      (0x3040, 0x30FF),
      (0x1F300, 0x1F6FF),
    ]
    return "".join(rng.choice([" ", "\n", "7", chr(rng.randrange(*rng.choice(ranges)))]) for _ in range(length))

  return [
    *(
      "",
      " ",
      "  ",
      "a",
      " a",
      "   a  ",
      "the river runs",
      "x  2024",
      "\n",
      "a\n\n\n 1",
      "\t\t\tif x:\r\n\treturn 3.14  # y",
    ),
    *(
      "12345 6789,10",
      "don't I'LL we've",
      "naïve café",
      "cafe\u0301 A\u030a",
      "世界、日本語",
      "🇩🇪👨‍👩‍👧 ☺️",
      "\x00\x01\x07\x1b[0m",
    ),
    *(
      "①②Ⅷ५",
      "\u00a0\u2003\u200b\ufeff",
      "\u2581 \u2581a",
      "<|im_end|>",
      "a</s>b <s> <unk><|eot_id|>",
      "<tool_call>{}</tool_call>",
    ),
    *("x" * 50, "<0x41> [INST]", "ﬁ ½ Å"),
    *(scrambled(length) for length in (5, 20, 60)),
    TEXT[1200:1600],
  ]


def save(name: str, tokenizer: Tokenizer, config: dict, generation: dict | None = None) -> pathlib.Path:
  folder = HERE / name
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
  (folder / "tokenizer.json").write_text(text)
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
  (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
  if generation:
    (folder / "generation_config.json").write_text(json.dumps(generation))
  return folder


def byte_level(special: list[str], size: int, **changes) -> Tokenizer:
  """Byte-level BPE; special tokens have the first ids where they are given."""
  tokenizer = Tokenizer(models.BPE(**changes.pop("model", {})))
  for name, value in changes.items():
    setattr(tokenizer, name, value)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
  return tokenizer


def split(pattern: str):
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(pattern), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def make_llama3() -> None:
  tokenizer = byte_level([], 500, pre_tokenizer=split(LLAMA3), model={"ignore_merges": True})
  names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id"]
  tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
  begin = tokenizer.token_to_id("<|begin_of_text|>")
  template = processors.TemplateProcessing(
    single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", begin)]
  )
  tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
  config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3_CHAT}
  save("llama3", tokenizer, config, {"bos_token_id": begin, "eos_token_id": [begin + 1, begin + 4, begin + 5]})


def make_qwen2() -> None:
  tokenizer = byte_level([], 480, normalizer=normalizers.NFC(), pre_tokenizer=split(QWEN2))
  tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
  tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "</tool_call>")])
  first = tokenizer.token_to_id("<|endoftext|>")
  config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
  save("qwen2", tokenizer, config, {"bos_token_id": first, "eos_token_id": [first + 2, first], "pad_token_id": first})


def make_smollm() -> None:
  """Special tokens have the first ids, some bytes have no token, and the template stands in a file of its own."""
  digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  tokenizer = byte_level(
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 480, pre_tokenizer=pre_tokenizers.Sequence(digits)
  )
  specification = json.loads(tokenizer.to_str())
  vocab = [token for token in specification["model"]["vocab"] if token not in ("Ā", "ÿ", "ć")]  # bytes 0x00, 0xFF, 0x07
  specification["model"]["vocab"] = {token: i for i, token in enumerate(vocab)}
  config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
  folder = save("smollm", Tokenizer.from_str(json.dumps(specification)), config)
  (folder / "chat_template.jinja").write_text(CHATML)


def make_sentencepiece() -> None:
  """BPE by sentencepiece; with its space in front of text only (mistral), and of every part of a text (llama2)."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=560, model_type="bpe", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    split_digits=True, minloglevel=2,
  )  # fmt: skip
  scratch = HERE / "mistral"
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir()
  (scratch / "tokenizer.model").write_bytes(model.getvalue())
  specification = json.loads(LlamaTokenizer.from_pretrained(scratch).backend_tokenizer.to_str())
  specification["post_processor"] = json.loads(
    processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]).__getstate__()
  )
  config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  save("mistral", Tokenizer.from_str(json.dumps(specification)), {**config, "chat_template": LLAMA2_CHAT})
  specification["pre_tokenizer"] = None
  replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
  prepend = {"type": "Prepend", "prepend": "\u2581"}
  specification["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
  folder = save("llama2", Tokenizer.from_str(json.dumps(specification)), {**config, "chat_template": LLAMA2_CHAT})
  (folder / "tokenizer.model").write_bytes(model.getvalue())


def make_unigram() -> None:
  """Its special tokens are pieces of the model with the best of all scores."""
  tokenizer = Tokenizer(models.Unigram())
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
  tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
  trainer = trainers.UnigramTrainer(
    vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
  )
  tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
  save("unigram", tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True})


def reference(folder: pathlib.Path) -> dict:
  """Ids of `texts` as text, ids with special tokens found and begin tokens added, and chats."""
  tokenizer = AutoTokenizer.from_pretrained(folder)
  chat = lambda messages, **flags: tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=False, **flags
  )
  encode = lambda text, **flags: tokenizer.encode(text, add_special_tokens=False, **flags)
  values = {
    "text": [encode(text, split_special_tokens=True) for text in texts()],
    "decoded": [tokenizer.decode(encode(text, split_special_tokens=True)) for text in texts()],
    "begun": tokenizer.encode("a", add_special_tokens=True),
  }
  if tokenizer.chat_template:
    special = tokenizer.eos_token
    injected = [{"role": "user", "content": f"a{special}\n{special[:-1]} b{tokenizer.bos_token or special}"}]
    values["chats"] = [[messages, chat(messages)] for messages in CHATS]
    values["injected"] = [injected, chat(injected, sanitize_control_tokens=True)]
  if (folder / "tokenizer.model").exists():
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    values["sentencepiece"] = [model.EncodeAsIds(text) for text in texts()]
  return values


def main() -> None:
  makers = (make_llama3, make_qwen2, make_smollm, make_sentencepiece, make_unigram)
  for make in makers:
    make()
  folders = sorted(path for path in HERE.iterdir() if (path / "tokenizer.json").exists())
  (HERE / "texts.json").write_text(json.dumps(texts()))
  for folder in folders:
    values = {"transformers": transformers.__version__, **reference(folder)}
    (folder / "reference.json").write_text(json.dumps(values, ensure_ascii=True, separators=(",", ":")))


if __name__ == "__main__":
  main()
