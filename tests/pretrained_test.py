"""Pretrained weights: the same numbers as transformers, in and out bit for bit, and what is refused.

The models in tests/pretrained/ and their references are made by make_references.py beside them.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

from conftest import ROOT, assert_refused, call, environment
from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from processes_test import processes
import pytest
from safetensors.numpy import load_file, save_file

from evo_jax import config as config_lib
from evo_jax.data import tokenizers as tokenizers_lib
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.network import evo as evo_lib
from evo_jax.network.transformer import rms_norm
from evo_jax.parallel import sharding
from evo_jax.pretrained import architectures, evo_file, exporter, importer, source, tokenizer_json
from evo_jax.pretrained.evo_file import EvoFile
from evo_jax.run import Run, load_run

REFERENCES = pathlib.Path(ROOT) / "tests" / "pretrained"
MODELS = ("llama2", "llama31", "mistral", "smollm2", "qwen25", "qwen3")
PROMPT, TOKENS, ROWS = "the rest of the night and", 281, 288
TOLERANCE = 1e-4  # of logits with a standard deviation above 1, in float32


def one_device():
  return sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])


@functools.cache
def loaded(name, **changes):
  """A reference's network in float32, its parameters and statistics."""
  opened = source.open_source(str(REFERENCES / name))
  config = importer.make_config(opened, importer.Options(param_dtype="float32"))
  importer.check_tensors(opened, config.model)
  model = evo_lib.Evo(config.model, TOKENS)
  return config, model, importer.load_items(opened, model, config, one_device())


@functools.cache
def reference(name):
  return load_file(REFERENCES / name / "reference.safetensors")


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens):
  return model.apply({"params": params}, tokens)


def difference(name, model, params):
  """The largest difference of logits from transformers', and their standard deviation."""
  want = reference(name)
  got = all_logits(model, params, want["tokens"][None])[0]
  assert np.all(np.asarray(got)[:, TOKENS:] < -1e8)  # rows without a token
  got, want = np.asarray(got)[want["positions"], :TOKENS], want["logits"][:, :TOKENS]
  return np.abs(got - want).max(), want.std()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
  """Over 80 positions, of which llama31 was trained for 32 before its frequencies were scaled."""
  _, model, items = loaded(name)
  largest, deviation = difference(name, model, items["params"])
  assert largest < TOLERANCE and deviation > 1


def changed(items, **parts):
  """The parameters with some changed, as w_qkv=function."""
  flat = traverse_util.flatten_dict(items["params"])
  for path in flat:
    if path[-1] in parts:
      flat[path] = parts[path[-1]](flat[path])
  return traverse_util.unflatten_dict(flat)


def interleaved(w_qkv_LxDxKxJxE):
  """Pairs of rows side by side, as GGUF and Meta have queries and keys."""
  *lead, E = w_qkv_LxDxKxJxE.shape
  pairs = w_qkv_LxDxKxJxE.reshape(*lead, 2, E // 2).swapaxes(-1, -2).reshape(*lead, E)
  return w_qkv_LxDxKxJxE.at[..., :-1, :].set(pairs[..., :-1, :])


def spread_queries(w_qkv_LxDxKxJxE):
  """Query h beside the keys h % K, not h // G."""
  L, D, K, J, E = w_qkv_LxDxKxJxE.shape
  queries = w_qkv_LxDxKxJxE[:, :, :, :-2].reshape(L, D, J - 2, K, E).swapaxes(2, 3)
  return w_qkv_LxDxKxJxE.at[:, :, :, :-2].set(queries)


WRONG_PARAMETERS = [
  ("llama2", dict(w_qkv=interleaved)),
  ("qwen3", dict(w_qkv=interleaved)),
  ("mistral", dict(w_qkv=spread_queries)),
  ("mistral", dict(w_o=lambda w: w[:, ::-1])),
  ("smollm2", dict(attention_norm=lambda w: 1 + w)),  # as Gemma counts
  ("smollm2", dict(w_gate=lambda w: -w)),
  ("qwen25", dict(b_qkv=jnp.zeros_like)),
  ("qwen25", dict(b_qkv=lambda b: b.at[..., -1, :].set(0))),  # of the values alone
  ("qwen3", dict(q_norm=jnp.ones_like)),
  ("qwen3", dict(k_norm=jnp.ones_like)),
  ("llama31", dict(head=lambda w: w + 0.05)),
]
WRONG_CONFIGURATIONS = [
  ("llama31", dict(rope_scaling="none")),
  ("llama31", dict(rope_scaling="linear")),
  ("llama31", dict(rope_original_context=64)),
  ("llama31", dict(rope_high_factor=2.0)),
  ("smollm2", dict(rope_base=10_000.0)),  # what old readers of rope_parameters take
  ("mistral", dict(norm_epsilon=1e-6)),
  ("qwen3", dict(norm_epsilon=1e-5)),
  ("qwen3", dict(qk_norm=False)),
  ("qwen25", dict(qkv_bias=False)),
  ("llama2", dict(tie_embeddings=True)),
]


@pytest.mark.parametrize("name, parts", WRONG_PARAMETERS)
def test_another_reading_of_the_tensors_gives_other_logits(name, parts):
  _, model, items = loaded(name)
  assert difference(name, model, changed(items, **parts))[0] > 20 * TOLERANCE


@pytest.mark.parametrize("name, fields", WRONG_CONFIGURATIONS)
def test_another_reading_of_the_configuration_gives_other_logits(name, fields):
  config, model, items = loaded(name)
  values = config_lib.to_dict(config)
  values["model"] |= fields
  model = model.clone(config=config_lib.from_dict(values).model)
  assert difference(name, model, items["params"])[0] > 20 * TOLERANCE


def test_a_norm_casts_before_its_weight():
  """As transformers: in bfloat16 that is another number."""
  x = jax.random.normal(jax.random.key(0), (64, 32)).astype(jnp.bfloat16)
  weight = (1 + 0.3 * jax.random.normal(jax.random.key(1), (32,))).astype(jnp.bfloat16)
  wide = np.asarray(x, np.float32)
  normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
  want = normed.astype(ml_dtypes.bfloat16) * np.asarray(weight)
  np.testing.assert_array_equal(np.asarray(rms_norm(x, weight, 1e-5, casts_first=True)), want)
  assert np.any(np.asarray(rms_norm(x, weight, 1e-5)) != want)


def copy_model(name, folder):
  """A model with its tokenizer, as a user has it."""
  shutil.copytree(REFERENCES / name, folder, ignore=shutil.ignore_patterns("reference.safetensors"))
  shutil.copytree(REFERENCES / "tokenizer", folder, dirs_exist_ok=True)
  return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """By name, a source's folder and the work directory that the command made of it. Shared: nothing may be written."""

  @functools.cache
  def make(name):
    folder = tmp_path_factory.mktemp(name)
    done = call("evo_jax.convert", f"--source={copy_model(name, folder / 'source')}", f"--workdir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "source", folder / "run", done.stdout

  yield make


def leaves(run):
  return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path((run.params, run.statistics))}


def assert_same(one, other):
  one, other = leaves(one), leaves(other)
  assert one.keys() == other.keys()
  for name, value in one.items():
    assert value.dtype == other[name].dtype, name
    np.testing.assert_array_equal(np.asarray(value), np.asarray(other[name]), err_msg=name)


@pytest.mark.parametrize("name", ["llama31", "qwen3"])
def test_greedy_texts_are_those_of_transformers(imported, name):
  """Which reads the whole text for each token; here keys and values are cached."""
  _, workdir, _ = imported(name)
  run = load_run(str(workdir), mesh=one_device())
  (text,) = Sampler(run, Sampling(greedy=True, endless=True, max_tokens=24))([PROMPT])
  assert len(text.tokens) > 20  # of 24: bytes of a character that is not finished are left out
  np.testing.assert_array_equal(text.tokens, reference(name)["greedy"][: len(text.tokens)])


def test_it_says_what_came_in(imported):
  _, workdir, said = imported("qwen3")
  assert "Qwen3ForCausalLM: 2 layers x 32, 4 heads of 16, 2 for keys and values, 48 hidden, norms of q, k\n" in said
  assert "40,160 in bfloat16, and 15,872 of Evo's own\n" in said
  assert "281 tokens, and 7 rows without one, which are ruled out\n" in said
  assert "up to 128 tokens; sequences of 128" in said and "not imported  nothing" in said


def test_it_says_what_did_not_come_in(tmp_path):
  folder = copy_model("smollm2", tmp_path / "source")
  (folder / "consolidated.safetensors").write_text("Meta's own form")
  (folder / "README.md").write_text("of no interest")
  edit("generation_config.json", temperature=0.6, top_p=0.9)(folder)
  config_json(attention_dropout=0.1)(folder)
  done = call("evo_jax.convert", f"--source={folder}", f"--workdir={tmp_path / 'run'}")
  settings = "temperature of generation_config.json, top_p of generation_config.json, attention_dropout"
  assert f"not imported  consolidated.safetensors, {settings}\n" in done.stdout, done


def test_near_tokens_have_near_codes():
  """Codes are a projection of the embedding: they keep its angles better than chance."""
  _, model, items = loaded("smollm2")
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  table = np.asarray(items["params"]["embedding"])[:TOKENS]
  near = unit(table - table.mean(0))
  codes = np.asarray(model.apply({"params": items["params"]}, method=evo_lib.Evo.codes))[:TOKENS]
  assert np.corrcoef((near @ near.T).ravel(), (codes @ codes.T).ravel())[0, 1] > 0.6
  np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "qwen25"])
def test_import_export_import_keeps_every_bit(imported, name, tmp_path):
  original, workdir, _ = imported(name)
  done = call("evo_jax.convert", f"--workdir={workdir}", f"--export={tmp_path / 'out'}", "--shard_mib=1")
  assert done.returncode == 0, done.stderr
  raw = lambda folder: {
    tensor: (value.dtype, value.tobytes())
    for file in folder.glob("model*.safetensors")
    for tensor, value in load_file(file).items()
  }
  assert raw(original) == raw(tmp_path / "out")
  for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
    assert json.loads((original / file).read_text()) == json.loads((tmp_path / "out" / file).read_text()), file
  again = call("evo_jax.convert", f"--source={tmp_path / 'out'}", f"--workdir={tmp_path / 'again'}")
  assert again.returncode == 0, again.stderr
  first, second = (load_run(str(folder), mesh=one_device()) for folder in (workdir, tmp_path / "again"))
  assert_same(first, second)
  assert first.config == second.config


def test_shards_have_an_index(imported, tmp_path):
  original, workdir, _ = imported("mistral")
  run = load_run(str(workdir), mesh=one_device())
  files = exporter.export_run(run, str(workdir), str(tmp_path / "out"), shard_bytes=30_000)
  assert {(tmp_path / "out" / f).stat().st_mode for f in files} == {(tmp_path / "out" / "README.md").stat().st_mode}
  assert [f for f in files if f.startswith("model-")] == [f"model-{i:05d}-of-00003.safetensors" for i in range(1, 4)]
  opened, before = (source.open_source(str(folder)) for folder in (tmp_path / "out", original))
  assert opened.names() == before.names()
  assert all(np.array_equal(opened.read(name), before.read(name)) for name in before.names())


@pytest.mark.slow
def test_a_mesh_gives_and_takes_the_same(imported, tmp_path):
  """Imported straight into shards, and exported from them."""
  original, workdir, _ = imported("qwen25")
  mesh = "--mesh=data:2,fsdp:2,tensor:2"
  (tmp_path / ".run.partial" / "left").mkdir(parents=True)  # by one that was killed
  into = ("evo_jax.convert", f"--source={original}", f"--workdir={tmp_path / 'run'}", mesh)
  out = ("evo_jax.convert", f"--workdir={tmp_path / 'run'}", f"--export={tmp_path / 'out'}", mesh)
  for command in (into, out):
    done = call(*command, devices=8)
    assert done.returncode == 0, done.stderr
  one, other = (load_run(str(folder), mesh=one_device()) for folder in (workdir, tmp_path / "run"))
  own = ("['codes']", "statistics", ".warp")  # computed, in another order on a mesh
  assert {n: v.shape for n, v in leaves(one).items()} == {n: v.shape for n, v in leaves(other).items()}
  for name, value in leaves(one).items():
    if not any(part in name for part in own):
      np.testing.assert_array_equal(np.asarray(value), np.asarray(leaves(other)[name]), err_msg=name)
  opened, before = (source.open_source(str(folder)) for folder in (tmp_path / "out", original))
  assert all(np.array_equal(opened.read(name), before.read(name)) for name in before.names())


@pytest.mark.slow
def test_several_processes_give_and_take_the_same(imported, tmp_path):
  original, _, _ = imported("qwen25")
  for arguments in (
    (f"--source={original}", f"--workdir={tmp_path / 'run'}", "--mesh=data:1,fsdp:2"),
    (f"--workdir={tmp_path / 'run'}", f"--export={tmp_path / 'out'}", "--mesh=data:1,fsdp:2"),
  ):
    with processes(2, arguments, "evo_jax.convert") as started:
      ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert str(tmp_path) in ended[0][0] and str(tmp_path) not in ended[1][0]  # one of them speaks
  assert sorted(os.listdir(tmp_path)) == ["out", "run"]
  opened, before = (source.open_source(str(folder)) for folder in (tmp_path / "out", original))
  assert all(np.array_equal(opened.read(name), before.read(name)) for name in before.names())


def test_what_is_exported_says_nothing_of_the_text():
  """Neither folders of this machine nor that it was conversations: the next text is another."""
  data = dict(path="/here/*.jsonl", valid="/here/v", test="/here/t", tokenizer_path="/here", chat="answers")
  values = {"data": data | {"tokenizer": "huggingface", "weights": (1.0,)}, "model": {"isolate_documents": True}}
  header = evo_file.describe_config(config_lib.from_dict(values))["evo_config"]
  assert "/here" not in header
  saved = config_lib.from_dict(json.loads(header))
  assert (saved.data.chat, saved.data.weights, saved.data.tokenizer) == ("", (), "huggingface")


def test_training_goes_on_and_only_the_model_is_pinned(imported, text, tmp_path):
  """With other data, sequences and an average; until it has saved, the imported weights are read."""
  _, workdir, _ = imported("smollm2")
  shutil.copytree(workdir, tmp_path / "run")
  flags = (
    f"--config={tmp_path / 'run' / 'config.py'}",  # whose folder is the work directory
    f"--config.data.path={text}",
    "--config.model.context=32",
    "--config.model.remat=none",
    "--config.window.count=1",
    "--config.optim.ema=0.5",
    "--config.data.batch_size=2",
    "--config.eval.sequences=2",
    "--config.eval.samples=0",
    "--config.eval.paths=('ar',)",
    "--config.train.log_every=1",
    "--config.model.window_rank=2",  # windows that nothing has trained may have any parameters
    "--config.model.window_twins=True",
    "--config.model.code_dim=6",
  )
  refused = call("evo_jax.main", *flags, "--config.model.rope_base=5.0")
  assert_refused(refused, "config.model.rope_base: 5.0 does not fit")
  assert_refused(call("evo_jax.main", *flags, "--config.model.context=256"), "more than model.context_limit = 128")
  unfit = call("evo_jax.main", *flags, "--config.train.trainable=blocks/window_*")
  assert_refused(unfit, "config.train.trainable: 'blocks/window_*' leaves out parameters of windows, which begin anew")
  done = call("evo_jax.main", *flags, "--config.train.steps=2")
  assert done.returncode == 0 and "windows begin anew" in done.stdout, done.stderr
  assert "goes on after step 0" in done.stdout
  before, after = load_run(str(workdir), mesh=one_device()), load_run(str(tmp_path / "run"), mesh=one_device())
  assert after.step == 2 and after.config.optim.ema == 0.5
  change = np.abs(np.asarray(before.params["embedding"] - after.params["embedding"], np.float32)).max()
  assert 0 < change < 1e-2
  for field in ("model.context=64", "model.window_rank=3"):
    assert_refused(call("evo_jax.main", *flags, f"--config.{field}"), f"config.{field.replace('=', ': ')} does not fit")
  # What was trained goes out, and comes in over the model as it was, bit for bit.
  exporter.export_run(after, str(tmp_path / "run"), str(tmp_path / "out"))
  opened = source.open_source(str(REFERENCES / "smollm2")), source.open_source(str(REFERENCES / "mistral"))
  file = EvoFile(tmp_path / "out" / "evo.safetensors")
  config = importer.make_config(opened[0], importer.Options(), file)
  assert (config.model.window_rank, config.model.code_dim, config.window.count) == (2, 6, 1)
  model = evo_lib.Evo(config.model, TOKENS)
  items = importer.load_items(opened[0], model, config, one_device(), file)
  for path, value in traverse_util.flatten_dict(items["params"]).items():
    want = traverse_util.flatten_dict((after if evo_lib.is_of_windows(path) else before).params)[path]
    np.testing.assert_array_equal(np.asarray(value), np.asarray(want), err_msg="/".join(path))
  assert np.abs(np.asarray(items["params"]["blocks"]["window_qkv_b"])).max() > 0
  other = importer.make_config(opened[1], importer.Options(), file)
  with pytest.raises(UserError, match="it is of another model"):
    importer.load_items(opened[1], evo_lib.Evo(other.model, TOKENS), other, one_device(), file)
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")  # as if it had been killed before it saved
  begun = load_run(str(tmp_path / "run"), mesh=one_device())
  assert begun.step == 0
  blocks = begun.params["blocks"]
  np.testing.assert_array_equal(np.asarray(blocks["window_qkv"]), np.asarray(blocks["w_qkv"]))


def test_windows_are_trained_on_frozen_weights(imported, text, tmp_path):
  """In less precision than they came in, which is what goes out again; the windows, brought in beside the source, go
  on with a fresh optimizer."""
  original, workdir, _ = imported("smollm2")
  run = shutil.copytree(workdir, tmp_path / "run")
  flags = (
    f"--config.data.path={text}",
    "--config.train.trainable=windows",
    "--config.model.param_dtype=bfloat16",
    "--config.loss.ar_weight=0.0",
    "--config.model.context=32",
    "--config.model.remat=none",
    "--config.window.size=8",
    "--config.data.batch_size=2",
    "--config.eval.sequences=2",
    "--config.eval.samples=0",
    "--config.eval.paths=('ar',)",
    "--config.train.log_every=1",
    "--config.optim.warmup=0",
    "--config.train.steps=2",
    "--config.train.checkpoints_kept=1",
  )
  for command in (
    ("main", f"--config={run / 'config.py'}", *flags),
    ("convert", f"--workdir={run}", f"--export={tmp_path / 'out'}"),
    (
      "convert",
      f"--source={original}",
      f"--windows={tmp_path / 'out' / 'evo.safetensors'}",
      f"--workdir={tmp_path / 'again'}",
    ),
  ):
    done = call(f"evo_jax.{command[0]}", *command[1:])
    assert done.returncode == 0, done.stderr
  assert sorted(os.listdir(run / "checkpoints")) == ["0", "2"]
  opened, before = (source.open_source(str(folder)) for folder in (tmp_path / "out", original))
  assert all(opened.read(name).tobytes() == before.read(name).tobytes() for name in before.names())
  began, trained, again = (load_run(str(folder), mesh=one_device()) for folder in (workdir, run, tmp_path / "again"))
  assert (trained.step, again.step) == (2, 0)
  start, other = (traverse_util.flatten_dict(r.params) for r in (began, again))
  for path, value in traverse_util.flatten_dict(trained.params).items():
    of_windows = evo_lib.is_of_windows(path)
    assert value.dtype == ("float32" if of_windows else "bfloat16"), path
    assert np.any(value != start[path].astype(value.dtype)) == of_windows, path
    np.testing.assert_array_equal(value, other[path].astype(value.dtype), err_msg=str(path))
  done = call("evo_jax.main", f"--config={tmp_path / 'again' / 'config.py'}", *flags)
  assert done.returncode == 0 and "goes on after step 0" in done.stdout, done.stderr
  assert load_run(str(tmp_path / "again"), mesh=one_device()).step == 2


@pytest.mark.slow
def test_partial_evidence_in_short(imported, text, tmp_path):
  """Windows of a frozen model learn from partial evidence; all paths are measured, texts are sampled, all is drawn."""
  from experiments import partial_evidence as experiment

  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "steps.json").write_text('{"steps": 60}')  # as of a run that was stopped
  model = imported("smollm2")[1]
  files = (f"--text={text.parent}/0*.txt", f"--valid={text.parent}/1*.txt")
  flags = (*files, f"--workdir={tmp_path}/runs", f"--output={tmp_path}", "--small", "--seeds=1", "--only=evidence")
  done = call("experiments.partial_evidence", f"--model={model}", *flags)
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "partial_evidence.json").read_text())["result"]
  (run,), scale = result["runs"], experiment.SCALES["small"]
  assert set(run["points"]) == {path for paths in experiment.paths_of("evidence", scale).values() for path in paths}
  assert all(0 < p["passes_per_token"] <= 1.25 and 0 < p["bits"] < 20 for p in run["points"].values())
  ar, staircase, diagonal = (np.array(run["points"][path]["each"]) for path in ("ar", "staircase", "diagonal:16"))
  np.testing.assert_allclose(staircase, ar, atol=1e-4)  # slots at t = 0 are the clean stream's
  assert np.abs(diagonal - ar).max() > 0.01
  settings = ["held-out text", "ar", "flow scaffold:1:8", "adaptive maturity:0.6"]
  assert [row["setting"] for row in run["samples"]] == settings
  names = {"budget", "jumps", "evidence, jumps", "evidence, evidence"}
  assert [set(row) for row in result["budgets"]] == [names] * len(experiment.BUDGETS)
  assert (tmp_path / "partial_evidence.png").stat().st_size > 10_000

  folder = tmp_path / "runs" / "evidence-0"
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  mean = lambda name, part: np.mean([row[name] for row in part])
  for name in ("ce_diagonal", "ce_rolling", "ce_independent", "window_bound"):
    assert mean(name, rows[-10:]) < 0.95 * mean(name, rows[:10]), name
  assert rows[-1]["warp_nats"] != rows[0]["warp_nats"]
  before, after = (traverse_util.flatten_dict(load_run(str(folder), step).params) for step in (0, 60))
  assert np.abs(after[("codes",)] - before[("codes",)]).max() > 1e-3
  assert all(np.array_equal(after[path], before[path]) for path in after if not evo_lib.is_of_windows(path))

  again = call("experiments.partial_evidence", f"--model={model}", *flags)
  assert again.returncode == 0 and "step" not in again.stderr, again.stderr
  elsewhere = (flags[2], f"--output={tmp_path}/other", "--small", "--seeds=1", "--only=evidence")
  other = call("experiments.partial_evidence", f"--model={imported('qwen3')[1]}", *files, *elsewhere)
  assert_refused(other, "evidence-0: was begun with another model; remove it, or give another --workdir")
  refused = call("experiments.partial_evidence", f"--model={model}", *flags, f"--valid={text.parent}/1[0-9].txt")
  assert_refused(refused, "has runs of another valid; remove it, or give another --output")
  shutil.rmtree(tmp_path / "runs")  # as on another machine: the results are enough
  recorded = call("experiments.partial_evidence", f"--model={model}", *flags)
  assert (recorded.returncode, recorded.stdout) == (0, again.stdout) and not (tmp_path / "runs").exists()
  assert_refused(call("experiments.partial_evidence", *flags), "--model is needed")


@pytest.mark.slow
def test_recipes_of_windows_have_equal_time(talker, tmp_path, monkeypatch):
  """A setting is trained, measured and recorded once; one whose steps take longer gets fewer of them."""
  from experiments import common, windows_recipe

  file = tmp_path / "talk.jsonl"
  with file.open("w") as out:
    for i in range(80):
      contents = {"user": f"{i} and {i}?", "assistant": f"{2 * i}, the rest of the night and all of the day"}
      out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in contents.items()]}) + "\n")
  flags = (f"--model={talker}", f"--own={file}", f"--kind=talk:{file}", "--chat=answers", "--texts=2", "--tokens=16")
  flags += ("--only=base", f"--workdir={tmp_path}/runs", f"--output={tmp_path}", "--minutes=0.02")
  done = call("experiments.windows_recipe", *flags)
  assert done.returncode == 0, done.stderr
  (run,) = json.loads((tmp_path / "windows_recipe.json").read_text())["result"]["runs"]
  assert load_run(str(tmp_path / "runs" / "base")).step == run["steps"] and run["step_time"] == 1.0
  assert run["parameters"] > 0 and run["window_kl"] > 0
  assert [(row["kind"], row["temperature"]) for row in run["accepted"]] == [("talk", 0.0), ("talk", 1.0)]
  assert all(0 <= row["accepted_per_round"] <= 7 for row in run["accepted"])
  assert sorted(os.listdir(tmp_path / "runs")) == ["base", "base.json", "base.model"]
  again = call("experiments.windows_recipe", *flags)
  assert again.returncode == 0 and again.stdout.startswith("setting") and done.stdout.endswith(again.stdout)

  speeds = iter([("base", 2.0), ("twins", 3.0), ("base", 1.5)])  # a machine that is slower at first

  def time_step(name, args):
    expected, seconds = next(speeds)
    assert name == expected
    return seconds

  monkeypatch.setattr(windows_recipe, "time_step", time_step)
  args = types.SimpleNamespace(workdir=str(tmp_path / "elsewhere"), minutes=0.02)
  recorded = common.RecordedRuns("windows_recipe", tmp_path, {})
  for _ in range(2):  # what was found out is written down
    time = windows_recipe.read_time("twins", recorded, args)
    assert time == {"steps": max(round(run["steps"] / 2), 1), "step_time": 2.0}
  time = windows_recipe.read_time("given_text", recorded, args)  # base's own step, which is not timed again
  assert time == {"steps": run["steps"], "step_time": 1.0}
  with pytest.raises(UserError, match="minutes=1: .*twins.json is of others; give another --workdir"):
    windows_recipe.read_time("twins", recorded, types.SimpleNamespace(workdir=args.workdir, minutes=1))
  refused = call("experiments.windows_recipe", *flags, "--minutes=1")
  assert_refused(refused, "has runs of another minutes; remove it, or give another --output")
  assert_refused(call("experiments.windows_recipe", *flags, "--only=base,given_text"), "given_text needs it")


def test_float16_is_read_but_not_trained_in(imported, tmp_path):
  _, workdir, said = imported("llama2")
  assert "in float16" in said
  flags = (f"--config={workdir / 'config.py'}", f"--workdir={tmp_path}", "--config.model.dtype=float16")
  assert_refused(call("evo_jax.main", *flags), "config.model.dtype: 'float16' cannot be trained in")


def test_texts_may_be_as_long_as_the_weights_allow(imported):
  """A sequence of training is shorter than what can be written."""
  original, _, _ = imported("qwen3")
  config = importer.make_config(source.open_source(str(original)), importer.Options(context=32))
  assert (config.model.context, config.model.position_limit) == (32, 128)
  model = evo_lib.Evo(config.model, TOKENS)
  items = importer.load_items(source.open_source(str(original)), model, config, one_device())
  tokenizer = load_run(str(imported("qwen3")[1])).tokenizer
  write = Sampler(Run(config, tokenizer, model, items["params"], items["statistics"], 0), Sampling(max_tokens=100))
  assert len(write(["the"])[0].tokens) <= 100
  with pytest.raises(UserError, match="do not fit the context of 128"):
    write(["the " * 40])


def test_a_model_that_was_trained_here_goes_out_and_comes_back(trained, tmp_path):
  """As a Llama, with windows and statistics beside it."""
  for command in (
    (f"--workdir={trained}", f"--export={tmp_path / 'out'}"),
    (f"--source={tmp_path / 'out'}", f"--workdir={tmp_path / 'again'}"),
  ):
    done = call("evo_jax.convert", *command)
    assert done.returncode == 0, done.stderr
  before, after = (load_run(str(folder), mesh=one_device()) for folder in (trained, tmp_path / "again"))
  assert after.tokenizer.identity == before.tokenizer.identity == "bytes"
  assert after.config.window == before.config.window
  tokens = np.arange(1, 31)[None]
  ask = lambda run: np.asarray(jax.jit(run.model.apply)({"params": run.params}, tokens))[..., :257]
  np.testing.assert_array_equal(ask(before), ask(after))
  rows = before.tokenizer.vocab_size
  np.testing.assert_array_equal(before.statistics.unigram_V[:rows], after.statistics.unigram_V[:rows])
  for name in ("w_time", "w_qkv", "w_down"):
    np.testing.assert_array_equal(before.params["blocks"][name], after.params["blocks"][name])
  np.testing.assert_array_equal(before.params["codes"][:rows], after.params["codes"][:rows])
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == 257
  assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0


@pytest.mark.parametrize(
  "fields, name",
  [
    ({}, "LlamaForCausalLM"),
    ({"tie_embeddings": True, "head_dim": 48, "context_limit": 512, "norm_epsilon": 1e-6}, "LlamaForCausalLM"),
    ({"rope_scaling": "llama3", "rope_factor": 32.0, "rope_original_context": 64}, "LlamaForCausalLM"),
    ({"rope_scaling": "linear", "rope_factor": 2.0, "rope_base": 5e5}, "LlamaForCausalLM"),
    ({"qkv_bias": True}, "Qwen2ForCausalLM"),
    ({"qk_norm": True, "head_dim": 48}, "Qwen3ForCausalLM"),
  ],
)
def test_a_description_is_read_as_it_was_meant(fields, name):
  model = config_lib.Model(**fields)
  described = architectures.describe_model(model, "float32", 300)
  assert described["architectures"] == [name]
  read = architectures.read_model(described, "config.json")
  expected = {field: getattr(model, field) for field in read}
  given = {"vocab_size": 300, "context_limit": model.position_limit, "norm_casts_first": True}
  if model.rope_scaling == "linear":
    given["rope_original_context"] = read["rope_original_context"]
  assert read == expected | given


def test_what_no_architecture_has_is_not_exported(trained, tmp_path):
  for fields, message in (
    ({"qk_norm": True, "qkv_bias": True}, "config.model.qkv_bias: no architecture that can be exported has it beside"),
    ({"qkv_bias": True, "head_dim": 48}, "config.model.head_dim: no architecture that can be exported has it beside"),
  ):
    with pytest.raises(UserError, match=message):
      architectures.describe_model(config_lib.Model(**fields), "float32", 300)
  run = load_run(str(trained), mesh=one_device())
  alone = dataclasses.replace(run.config, loss=dataclasses.replace(run.config.loss, ar_weight=0.0))
  with pytest.raises(UserError, match="nothing trained what would be exported"):
    exporter.export_run(dataclasses.replace(run, config=alone), str(trained), str(tmp_path / "out"))
  assert os.listdir(tmp_path) == []


TEXTS = ("The sun, at 7:05 - naïve “quotes”\tand\n\n  spaces 0123", "", " leading", "ünïcödé \u0000 \U0001f600")


def sentencepiece(folder):
  lines = [f"the sun rose on day {i} and the river ran to the sea\n" for i in range(300)]
  return tokenizers_lib.train_sentencepiece(lines, 285, str(folder))


@pytest.mark.parametrize("kind", ["bytes", "chars27", "sentencepiece"])
def test_own_tokenizers_go_out_as_tokenizer_json(kind, tmp_path):
  library = pytest.importorskip("tokenizers")
  own = sentencepiece(tmp_path) if kind == "sentencepiece" else tokenizers_lib.load_tokenizer(kind)
  files = tokenizer_json.describe_tokenizer(own)
  theirs = library.Tokenizer.from_str(files["tokenizer.json"].decode())
  for text in TEXTS:
    ids = own.encode(text).tolist()
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert theirs.encode(text).ids == [0, *ids]
    assert theirs.decode(ids) == own.decode(ids)
  assert theirs.get_vocab_size() == own.vocab_size


@pytest.mark.extended
def test_transformers_loads_what_goes_out(trained, imported, tmp_path):
  """Without this project's code, and computes the same, of an imported model every bit of it."""
  transformers, torch = (pytest.importorskip(name) for name in ("transformers", "torch"))
  for name, workdir in [("trained", trained), *((name, imported(name)[1]) for name in MODELS)]:
    run = load_run(str(workdir), mesh=one_device())
    exporter.export_run(run, str(workdir), str(tmp_path / name), shard_bytes=30_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    assert tokenizer(PROMPT, add_special_tokens=False).input_ids == run.tokenizer.encode(PROMPT).tolist()
    if name != "trained":
      original = transformers.AutoModelForCausalLM.from_pretrained(REFERENCES / name, dtype=torch.float32).eval()
      tokens = torch.tensor(reference(name)["tokens"][None]).long()
      np.testing.assert_array_equal(*(m(tokens).logits.detach().numpy() for m in (model, original)))
      continue
    tokens = np.arange(1, 33)[None]
    want = np.asarray(jax.jit(run.model.apply)({"params": run.params}, tokens))[..., : run.tokenizer.vocab_size]
    np.testing.assert_allclose(model(torch.tensor(tokens)).logits.detach().numpy(), want, atol=TOLERANCE)


def test_what_was_trained_goes_out_as_precise_as_it_was_trained():
  """A tensor returns to the dtype that it came in where that loses nothing, and only there."""
  untouched = np.asarray([1.5, -2.0], ml_dtypes.bfloat16).astype(np.float32)
  trained_value = untouched + np.float32(1e-4)
  assert exporter._as_stored(untouched, "bfloat16").dtype == ml_dtypes.bfloat16
  assert exporter._as_stored(trained_value, "bfloat16") is trained_value


# ---- what is refused


def edit(name, **changes):
  """Changes fields of a JSON file; None takes one away."""

  def change(folder):
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

  return change


config_json = functools.partial(edit, "config.json")
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


def tensors(file, **changes):
  """Changes tensors of a file; None takes one away."""

  def change(folder):
    values = load_file(folder / file)
    for key, new in changes.items():
      key = key.replace("__", ".")
      values[key] = new(values.get(key)) if callable(new) else new
    save_file({k: v for k, v in values.items() if v is not None}, folder / file, {"format": "pt"})

  return change


def cut(file):
  return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def remove(file):
  return lambda folder: (folder / file).unlink()


def move_in_index(folder):
  index = json.loads((folder / INDEX).read_text())["weight_map"]
  other = next(file for file in index.values() if file != index["model.norm.weight"])
  edit(INDEX, weight_map=index | {"model.norm.weight": other})(folder)


def old_rope(theta=1e6, **scaling):
  return config_json(rope_parameters=None, rope_theta=theta, rope_scaling=scaling)


NORM = "model__norm__weight"
LARGE_TOKENIZER = json.dumps({"id": 400, "content": "<more>"})
REFUSED = [
  ("mistral", config_json(architectures=["MixtralForCausalLM"]), "architectures: MixtralForCausalLM is not one of"),
  ("mistral", config_json(architectures=[], model_type="gemma3"), "architectures: none (model_type 'gemma3')"),
  ("mistral", config_json(sliding_window=32), "sliding_window: 32 cannot be represented"),
  ("mistral", config_json(sliding_window=32, use_sliding_window=False), "sliding_window: 32 cannot be represented"),
  ("mistral", config_json(sliding_window="32"), "sliding_window: '32' is no number"),
  ("mistral", config_json(max_position_embeddings=8192), "4096, which a MistralForCausalLM has without"),
  ("mistral", config_json(architectures=[["x"]]), "architectures: ['x'] is not one of"),
  ("qwen3", config_json(layer_types=[["x"]]), "layer_types: ['x'] cannot be represented"),
  ("mistral", old_rope(rope_type=["x"]), "rope_scaling.rope_type: ['x'] is not one of default, linear"),
  ("qwen25", config_json(use_sliding_window=True), "use_sliding_window: True cannot be represented"),
  ("qwen3", config_json(layer_types=["full_attention", "chunked"]), "layer_types: 'chunked' cannot be represented"),
  ("qwen3", config_json(attention_bias=True), "attention_bias: True cannot be represented"),
  ("smollm2", config_json(mlp_bias=True), "mlp_bias: True cannot be represented"),
  ("smollm2", config_json(hidden_act="gelu"), "hidden_act: 'gelu' cannot be represented"),
  ("smollm2", config_json(rope_interleaved=True), "rope_interleaved: True cannot be represented"),
  ("smollm2", config_json(final_logit_softcapping=30.0), "final_logit_softcapping: 30.0 cannot be represented"),
  ("smollm2", config_json(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5 cannot be represented"),
  ("smollm2", config_json(quantization_config={"bits": 4}), "quantization_config: {'bits': 4} cannot be represented"),
  ("smollm2", config_json(residual_multiplier=0.2), "residual_multiplier: 0.2 is not known, and may change the result"),
  ("smollm2", config_json(rms_norm_eps=None), "rms_norm_eps: None is not a positive number"),
  ("mistral", config_json(num_key_value_heads=None), "num_key_value_heads: is missing"),
  ("qwen3", config_json(head_dim=None), "head_dim: is missing"),
  ("mistral", config_json(rope_theta=1e4), "rope_parameters.rope_theta and rope_theta disagree: 1000000.0, 10000.0"),
  ("mistral", config_json(rope_parameters=None), "rope_theta: is missing"),
  ("mistral", old_rope(rope_type="yarn", factor=4.0), "rope_scaling.rope_type: 'yarn' is not one of default, linear"),
  ("mistral", old_rope(type="linear", rope_type="dynamic", factor=4.0), "rope_scaling: has no single rope_type"),
  ("mistral", old_rope(type="linear", factor=4.0, attention_factor=2.0), "attention_factor: 2.0 is not known"),
  ("mistral", old_rope(type="linear"), "rope_scaling: factor: None is not a positive number"),
  ("mistral", config_json(rope_scaling={"type": "linear", "factor": 2.0}), "rope_parameters and rope_scaling disagree"),
  ("mistral", config_json(hidden_size=36), "model.embed_tokens.weight: has the shape (288, 32), not (288, 36)"),
  ("qwen3", config_json(head_dim=8), "self_attn.o_proj.weight: has the shape (32, 64), not (32, 32)"),
  ("mistral", config_json(num_hidden_layers=3), "model.layers.2.input_layernorm.weight: is missing"),
  ("mistral", config_json(num_hidden_layers=10**9), "model.layers.999999999.input_layernorm.weight: is missing"),
  ("mistral", config_json(num_attention_heads=3), "config.json: config.model.kv_heads: 2 does not divide"),
  ("mistral", config_json(num_hidden_layers=1), "model.layers.1.input_layernorm.weight: is no part of"),
  ("qwen25", config_json(architectures=["LlamaForCausalLM"]), "self_attn.k_proj.bias: is no part of the architecture"),
  ("smollm2", config_json(tie_word_embeddings=False), "lm_head.weight: is missing"),
  ("llama31", config_json(tie_word_embeddings=True), "lm_head.weight: differs from model.embed_tokens.weight, though"),
  ("smollm2", tensors("model.safetensors", **{NORM: None}), "model.norm.weight: is missing"),
  ("smollm2", tensors("model.safetensors", more=np.zeros(3, np.float32)), "more: is no part of the architecture"),
  ("smollm2", tensors("model.safetensors", **{NORM: lambda w: w[:-1]}), "model.norm.weight: has the shape (47,), not"),
  ("smollm2", tensors("model.safetensors", **{NORM: lambda w: w.astype(np.int8)}), "weight: is stored as I8"),
  ("smollm2", cut("model.safetensors"), "model.safetensors: is damaged or cut off"),
  ("smollm2", remove("model.safetensors"), "holds neither model.safetensors nor model.safetensors.index.json"),
  ("smollm2", remove("config.json"), "config.json: cannot be read: No such file or directory"),
  ("smollm2", lambda f: (f / "config.json").write_text("{"), "config.json: is damaged"),
  ("smollm2", lambda f: (f / "config.json").write_text("[]"), "config.json: is not a JSON object"),
  ("mistral", remove(SECOND), f"{SECOND}: is missing; {INDEX} names it"),
  ("mistral", cut(SECOND), f"{SECOND}: is damaged or cut off"),
  ("mistral", remove(INDEX), f"holds model-00001-of-00003.safetensors, but no {INDEX}"),
  ("mistral", lambda f: shutil.copy(f / SECOND, f / "model-00009-of-00009.safetensors"), "does not name: one of them"),
  ("mistral", lambda f: shutil.copy(f / SECOND, f / "model.safetensors"), "holds both model.safetensors and"),
  ("mistral", tensors(SECOND, more=np.zeros(3, np.float32)), f"{SECOND}: holds more, which {INDEX} does not say"),
  ("mistral", move_in_index, "holds no model.norm.weight, which model.safetensors.index.json says it does"),
  ("mistral", edit(INDEX, weight_map={"a": "../x"}), "has no weight_map from tensors to files of its folder"),
  ("smollm2", remove("tokenizer.json"), "has no tokenizer.json"),
  ("smollm2", lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "makes of tokenizer.model"),
  ("smollm2", lambda f: tensors("model.safetensors", model__embed_tokens__weight=lambda w: w[:200])(f) or
   config_json(vocab_size=200)(f), "the tokenizer has 281 tokens, the model's tables have 200 rows"),
]  # fmt: skip


@pytest.mark.parametrize("name, damage, message", REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_bad_sources_are_refused_in_one_line(name, damage, message, tmp_path):
  folder = copy_model(name, tmp_path / "source")
  damage(folder)
  assert_refused(call("evo_jax.convert", f"--source={folder}", f"--workdir={tmp_path / 'run'}"), message)
  assert os.listdir(tmp_path) == ["source"]  # nothing half-written


READ = [
  ("qwen3", config_json(sliding_window=4096)),  # Qwen's, which use_sliding_window turns off
  ("mistral", config_json(sliding_window=128)),  # as long as every text
  ("mistral", old_rope(rope_type="default")),
  ("smollm2", lambda f: tensors("model.safetensors", lm_head__weight=lambda _: load_file(f / "model.safetensors")
   ["model.embed_tokens.weight"])(f)),  # written though it is tied
  ("llama2", tensors("model.safetensors", model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32))),
]  # fmt: skip


@pytest.mark.parametrize("name, change", READ)
def test_what_changes_no_result_is_read(name, change, tmp_path):
  folder = copy_model(name, tmp_path / "source")
  change(folder)
  opened = source.open_source(str(folder))
  config = importer.make_config(opened, importer.Options())
  assert len(importer.check_tensors(opened, config.model)) == (len(opened.names()) > len(loaded_names(name)))
  assert config.model == importer.make_config(source.open_source(str(REFERENCES / name)), importer.Options()).model


def loaded_names(name):
  return source.open_source(str(REFERENCES / name)).names()


def test_an_unknown_field_can_be_declared_harmless(tmp_path):
  folder = copy_model("smollm2", tmp_path / "source")
  config_json(author_note="x")(folder)
  opened = source.open_source(str(folder))
  with pytest.raises(UserError, match="author_note: 'x' is not known.*--ignore=author_note"):
    importer.make_config(opened, importer.Options())
  importer.make_config(opened, importer.Options(ignored=("author_note",)))


@pytest.mark.parametrize(
  "flags, message",
  [
    ((), "--source=PATH brings a model in, --export=OUT takes one out"),
    (("--source=a", "--export=b"), "give one of them"),
    (("--source=a",), "--workdir is needed"),
    (("--source=nowhere", "--workdir=x"), "--source=nowhere: is neither a folder nor a file"),
    (("--source=README.md", "--workdir=x"), "--source=README.md: is a file of another kind"),
    (("--source=hf://name", "--workdir=x"), "--source=hf://name: is not hf://OWNER/NAME"),
    (("--source=a", "--workdir=x", "--step=3"), "--step: does not go with --source"),
    (("--export=a", "--workdir=x", "--dtype=float32"), "--dtype: does not go with --export"),
    (("--export=tests", "--workdir=x"), "/tests: exists, and is not an empty folder"),
    (("--export=gs://x/y", "--workdir=x"), "--export=gs://x/y: is no local folder"),
    (("--export=newfolder", "--workdir=nowhere"), "--workdir=nowhere: is no folder"),
    ((f"--source={REFERENCES / 'qwen3'}", "--workdir=tests"), "/tests: exists, and is not an empty folder"),
    ((f"--source={REFERENCES / 'qwen3'}", "--workdir=x", "--context=500"), "--context=500: is more than the 128"),
    ((f"--source={REFERENCES / 'qwen3'}", "--workdir=x", "--windows=nowhere"), "nowhere: cannot be read"),
  ],
)
def test_flags_that_are_impossible(flags, message):
  assert_refused(call("evo_jax.convert", *flags), message)


@pytest.mark.parametrize("path", ["hf://owner/name", "hf://owner/name@v1"])
def test_models_are_downloaded_by_name(path, monkeypatch, tmp_path):
  """By the library that the extra `hub` installs; a test has no network."""
  asked = []
  library = types.SimpleNamespace(
    snapshot_download=lambda name, revision, allow_patterns: asked.append((name, revision)) or str(REFERENCES / "qwen3")
  )
  monkeypatch.setitem(sys.modules, "huggingface_hub", library)
  opened = source.open_source(path)
  assert opened.description == path and "lm_head.weight" in opened.names()
  assert asked == [("owner/name", "v1" if "@" in path else None)]

  def fail(*_, **__):
    raise OSError("no such repository\nmore")

  monkeypatch.setattr(library, "snapshot_download", fail)
  flags = (f"--source={path}", f"--workdir={tmp_path / 'run'}")
  assert_refused(call("evo_jax.convert", *flags), f"--source={path}: cannot be downloaded: no such repository")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  assert_refused(call("evo_jax.convert", *flags), f"--source={path}: needs the extra hub: pip install 'evo_jax[hub]'")


def test_windows_of_another_model_are_refused(imported, tmp_path):
  original, workdir, _ = imported("qwen3")
  run = load_run(str(workdir), mesh=one_device())
  exporter.export_run(run, str(workdir), str(tmp_path / "out"))
  windows = tmp_path / "out" / "evo.safetensors"
  flags = (f"--source={imported('smollm2')[0]}", f"--workdir={tmp_path / 'run'}")
  message = "evo.safetensors: blocks.w_time: has the shape (2, 16, 6, 32), not (2, 16, 6, 48); it is of another model"
  assert_refused(call("evo_jax.convert", *flags, f"--windows={windows}"), message)
  save_file({"codes": np.zeros(3)}, windows, {"evo_config": '{"model": {"depth": 3}}'})
  assert_refused(call("evo_jax.convert", *flags, f"--windows={windows}"), "config.model.depth: no such field")
  save_file({"codes": np.zeros(3)}, windows)
  assert_refused(call("evo_jax.convert", *flags, f"--windows={windows}"), "has no configuration of an Evo model")


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d))
sys.argv = ["convert", *sys.argv[1:]]
import runpy
runpy.run_module("evo_jax.convert", run_name="__main__")
"""  # a limit on a file's size stands for a full disk


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_model(imported, tmp_path):
  limit = 20_000
  original, workdir, _ = imported("qwen25")
  for flags, name in (
    ((f"--source={original}", f"--workdir={tmp_path / 'run'}"), "run"),
    ((f"--workdir={workdir}", f"--export={tmp_path / 'out'}"), "--export="),
  ):
    done = subprocess.run(
      [sys.executable, "-c", FULL_DISK % (limit, limit), *flags],
      capture_output=True,
      text=True,
      cwd=ROOT,
      env=environment() | {"JAX_ENABLE_COMPILATION_CACHE": "0"},
      timeout=300,
    )
    assert_refused(done, "cannot be written")
    assert name in done.stderr and os.listdir(tmp_path) == []
