"""Texts for many prompts in a folder: the same bytes whatever ended the command, and the tokens that training reads."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
from unittest import mock

from conftest import ROOT, assert_refused, call, environment, need_devices
from etils import epath
import jax
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.data import chat, plan, preparation, shards
from evo_jax.data.storage import Folder
from evo_jax.decoding import bulk
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.parallel import sharding
from evo_jax.training import lease as lease_lib

PROMPTS = ["the", "a river runs", "", "the", "time is", "flow of a token", "at last", "a", "known", "the", "and a"]
FLAGS = ("--num=2", "--max_tokens=8", "--batch_size=3", "--seed=5", "--temperature=1.5")
KILLED = """
import os, runpy, signal, sys
from evo_jax.decoding import bulk
bulk.PART, add = 8, bulk._Part.add
def add_and_die(part, texts):
  add(part, texts)
  if part._name == "00001":
    os.kill(os.getpid(), signal.SIGKILL)
bulk._Part.add = add_and_die
runpy.run_module("evo_jax.generate", run_name="__main__", alter_sys=True)
"""


def content(folder, *but):
  """Everything in a folder, by name."""
  files = [p for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()]
  return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.relative_to(folder).parts[0] not in but}


def lines(folder):
  return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


@pytest.fixture
def questions(tmp_path, monkeypatch):
  """A file of prompts, for three parts of texts."""
  monkeypatch.setattr(bulk, "PART", 8)
  file = tmp_path / "p.jsonl"
  file.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
  return file


def test_it_goes_on_after_a_kill_and_after_ctrl_c(trained, questions, tmp_path, monkeypatch):
  flags = (f"--workdir={trained}", f"--prompts={questions}", *FLAGS)
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  done = subprocess.run(
    [sys.executable, "-c", KILLED, *flags, f"--output={killed}"], cwd=ROOT, env=environment(), capture_output=True
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert {"00000.jsonl", ".work/00001-00000.jsonl"} < content(killed).keys() > {"texts.json"}
  add = bulk._Part.add

  def add_and_interrupt(part, texts):
    add(part, texts)
    raise KeyboardInterrupt

  monkeypatch.setattr(bulk._Part, "add", add_and_interrupt)
  interrupted = call("evo_jax.generate", *flags, f"--output={killed}")
  assert_refused(interrupted, "interrupted; what is done is kept, and the same command goes on")
  batches = [file.read_text().splitlines() for file in sorted(killed.glob(".work/00001-*"))]
  places = [json.loads(line)["place"] for batch in batches for line in batch]
  assert len(batches) == 2 and len(places) == len(set(places)) == 6  # what was done is not done again
  monkeypatch.setattr(bulk._Part, "add", add)
  (killed / ".00001.jsonl.0123").write_text('{"half of a')
  for output in (killed, whole):
    done = call("evo_jax.generate", *flags, f"--output={output}")
    assert done.returncode == 0 and "has all 22 texts" in done.stdout, done.stderr
  assert "22 of 22 texts" in done.stderr and "0 minutes left" in done.stderr
  assert content(killed, "statistics") == content(whole, "statistics")
  names = [f"0000{i}.jsonl" for i in range(3)]
  assert [*content(whole)] == [*names, *(f"statistics/{name}" for name in names), "texts.json"]
  written = lines(whole)
  assert [(line["number"], line["sample"]) for line in written] == [(i, k) for i in range(11) for k in range(2)]
  assert len({line["text"] for line in written if line["prompt"] == "the"}) > 1  # each draws its own


def test_what_is_complete_stays_and_other_texts_are_refused(trained, questions, tmp_path, monkeypatch):
  output, flags = tmp_path / "o", (f"--workdir={trained}", f"--prompts={questions}", *FLAGS[1:])
  generate = lambda *more: call("evo_jax.generate", *flags, f"--output={output}", *more)
  assert_refused(generate("--temperature=-1"), "--temperature=-1.0: is not positive")
  assert not content(output)
  with lease_lib.held(epath.Path(output), "output"):
    assert_refused(generate(), "; stop that run, or use another --output")
  monkeypatch.setattr(bulk, "_make_engine", mock.Mock(side_effect=UserError("--batch_size=64: too much")))
  assert_refused(generate("--draft=2"), "--batch_size=64: too much")
  monkeypatch.undo()
  monkeypatch.setattr(bulk, "PART", 8)
  assert generate().returncode == 0  # no text depends on what was asked for before
  before = {name: (output / name).stat().st_mtime_ns for name in content(output)}
  again = generate("--batch_size=7")
  assert again.returncode == 0 and again.stdout.startswith(f"{output}: has all 11 texts;") and not again.stderr
  assert {name: (output / name).stat().st_mtime_ns for name in content(output)} == before
  for more, message in (
    ("--seed=6", "was begun with --seed=5, not 6"),
    ("--prompt=more", "was begun with other prompts"),
    ("--json", "--json: does not go with --output"),
    ("--prompts=-", "--prompts=-: with --output prompts are read more than once"),
    (f"--output={output}.jsonl", "is a folder, in which .jsonl files are written; name it without .jsonl"),
    (f"--output={tmp_path}", "has p.jsonl, but no texts.json: give a new folder"),
    ("--output=/proc/none", "/proc/none/.writable: cannot be written"),
    ("--output=nope://x/y", "nope://x/y: cannot be opened"),
  ):
    assert_refused(generate(more), message)
  questions.write_text("".join(json.dumps(prompt) + "\n" for prompt in ["fine", "x" * 30, "", "y" * 40, "z" * 50]))
  refused = generate()
  assert_refused(refused, f"--prompts={questions}: line 2: prompt 'xxx")
  assert refused.stderr.endswith("; 3 prompts cannot be used, also line 4, line 5\n")
  assert {name: (output / name).stat().st_mtime_ns for name in content(output)} == before


def test_a_bucket_takes_texts_and_prompts_are_not_held(trained, tmp_path, monkeypatch):
  monkeypatch.setattr(bulk, "PART", 4)
  mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  run, sampling = run_lib.load_run(str(trained), mesh=mesh), Sampling(max_tokens=3, batch_size=4)
  ahead, written = 0, 0

  def prompts():
    nonlocal ahead
    for i in range(20):
      ahead = max(ahead, i - written)
      yield "", f"{i % 7}"

  def progress(totals, count):
    nonlocal written, ahead
    ahead = 0 if not written else ahead  # of the reading before
    written += count
    if written == 20:
      raise KeyboardInterrupt  # when every text is written, but not the last part

  output = f"memory://{tmp_path}/o"
  with pytest.raises(KeyboardInterrupt):
    bulk.write_texts(run, sampling, prompts, 1, 0, output, {}, progress)
  assert written == 20 and ahead <= 4
  assert bulk.write_texts(run, sampling, prompts, 1, 0, output, {}) == (20, 20, 0, 0)
  found = [json.loads(line) for i in range(5) for line in Folder(output).read(f"0000{i}.jsonl").splitlines()]
  assert [line["prompt"] for line in found] == [f"{i % 7}" for i in range(20)]
  at_once = Sampler(run, sampling)([f"{i % 7}" for i in range(20)])
  for line, text in zip(found, at_once):
    assert line["text"] == text.prompt + text.text and line["ended"] == (text.end_id is not None)
    end = [] if text.end_id is None else [text.end_id]
    assert line["tokens"] == [byte + 1 for byte in text.prompt.encode()] + text.tokens + end


ROLES = ("user", "system", "assistant")


def test_training_reads_a_conversation_as_the_model_wrote_it(talker, tmp_path):
  """Token for token: the prompt, the answer, and the end of the turn where the model ended it."""
  user, system, assistant = (lambda text, role=role: {"role": role, "content": text} for role in ROLES)
  answered = [system("of"), user("and the rest <|end|>"), assistant("x"), user("more")]
  file = tmp_path / "p.jsonl"
  file.write_text(json.dumps("the night") + "\n" + json.dumps({"messages": answered, "id": 3}) + "\n")
  flags = (f"--workdir={talker}", "--chat", f"--prompts={file}", f"--output={tmp_path / 'o'}")
  done = call("evo_jax.generate", *flags, "--num=60", "--max_tokens=20", "--system=be", "--temperature=50")
  assert done.returncode == 0, done.stderr
  written, tokenizer = lines(tmp_path / "o"), run_lib.load_run(str(talker)).tokenizer
  prompts = ["the night", answered[:2]]
  assert [line["messages"][:-1] for line in written[::60]] == [[system("be"), user("the night")], answered[:2]]
  assert 2 < sum(line["ended"] for line in written) < 100
  chat_tokenizer, expected = chat.ChatTokenizer(tokenizer, "be"), []
  for line in written:
    given, answer = line["tokens"][: line["prompt_tokens"]], line["tokens"][line["prompt_tokens"] :]
    assert given == [chat_tokenizer.begin_id, *chat_tokenizer.encode(prompts[line["number"]])]
    assert [token in tokenizer.end_ids for token in answer].count(True) == line["ended"]
    assert tokenizer.decode(answer, begins=False) == line["messages"][-1]["content"]
    # In the stream, the separator stands behind each document, and for the begin token.
    expected += [token for token in line["tokens"][1:] if token != tokenizer.separator_id] + [tokenizer.separator_id]
  job = plan.Job(f"{tmp_path}/o/*.jsonl", valid_share=0.0, test_share=0.0, max_skipped=0.0)
  manifest = preparation.prepare(job, tokenizer, "huggingface", str(tmp_path / "tokens"))
  stream = shards.open_stream(str(tmp_path / "tokens"), manifest, manifest.sources[0], "train")
  np.testing.assert_array_equal(stream.read(0, stream.length), expected)
  assert manifest.sources[0].splits["train"].text_bytes == tokenizer.lengths()[expected].sum()


def test_a_fingerprint_is_the_model_on_any_mesh(talker):
  need_devices(8)
  mesh = lambda **axes: sharding.make_mesh(config_lib.Mesh(**axes))
  runs = [run_lib.load_run(str(talker), mesh=m) for m in (mesh(data=8), mesh(data=1, fsdp=8))]
  one, other = map(run_lib.fingerprint, runs)
  assert one == other
  leaves, tree = jax.tree.flatten(runs[0].params)
  leaves[-1] = leaves[-1][::-1]  # the same numbers, in other places
  changed = dataclasses.replace(runs[0], params=jax.tree.unflatten(tree, leaves))
  assert run_lib.fingerprint(changed) != one
