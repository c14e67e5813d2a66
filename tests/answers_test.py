"""Fine-tuning on conversations: which tokens are answers, how conversations are packed, what a run makes of them."""

import json
import os
import re
import shutil

from conftest import ROOT, assert_refused, call, train_flags
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax.data import answers as answers_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import packing, plan, preparation, shards
from evo_jax.data.answers import Answers
from evo_jax.data.chat import ChatTemplate
from evo_jax.data.huggingface import HuggingFace
from evo_jax.data.json_lines import BadLine
from evo_jax.errors import UserError
from evo_jax.evaluation.paths import tile_answers
from evo_jax.training import metrics as metrics_lib

FOLDER = os.path.join(ROOT, "tests", "tokenizer_files")
TURNS = [("user", "of a river"), ("assistant", "the flow<|im_end|>"), ("user", "and"), ("assistant", "known at last")]
CHATML = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
STRIPS = (  # what an assistant thought is left out once others have spoken, as in Qwen3
  "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}" + CHATML + "{% else %}"
  "{{ '<|im_start|>assistant\n' + m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def load(name="smollm", template=None, folder=None):
  """A small tokenizer, with its own chat template or another."""
  if template is None:
    return HuggingFace(f"{FOLDER}/{name}")
  shutil.copytree(f"{FOLDER}/{name}", folder, dirs_exist_ok=True)
  (folder / "chat_template.jinja").write_text(template)
  return HuggingFace(str(folder))


def conversation(*turns):
  return [{"role": role, "content": content} for role, content in turns]


def read(tokenizer, line, which="answers"):
  """Ids of a line, which are answers', and where conversations begin."""
  _, numbers = Answers(tokenizer, which).read(line, "messages", "text")
  begins = np.flatnonzero(numbers & np.uint32(answers_lib.BEGIN))
  return answers_lib.ids_of(numbers), answers_lib.are_answers(numbers), begins.tolist()


def answered(tokenizer, ids, mask):
  """The texts of the answers, and the tokens that end them."""
  parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
  parts = [ids[part] for part in parts if mask[part[0]]]
  return [tokenizer.decode(part) for part in parts], [part[-1] for part in parts]


@pytest.mark.parametrize("name", ["llama3", "qwen2", "smollm", "llama2", "mistral"])
def test_answers_are_what_generation_would_write(name):
  """Up to and with the token that ends the turn, on every template; the ids are the whole conversation's."""
  tokenizer, messages = load(name), conversation(*TURNS)
  ids, mask, begins = read(tokenizer, {"messages": messages})
  assert begins == [0]
  texts, ends = answered(tokenizer, ids, mask)
  assert [text.strip() for text in texts] == ["the flow<|im_end|>", "known at last"]
  assert set(ends) <= set(tokenizer.turn_end_ids)
  whole = ChatTemplate(tokenizer).encode(messages, add_generation_prompt=False)
  assert whole[: len(ids)] == ids.tolist() and not tokenizer.decode(np.array(whole[len(ids) :])).strip()
  first = ChatTemplate(tokenizer).encode(messages[:1])
  assert ids[: len(first)].tolist() == first and not mask[: len(first)].any() and mask[len(first)]
  ids_of_last, last, _ = read(tokenizer, {"messages": [*messages, *conversation(("user", "x"))]}, "last")
  np.testing.assert_array_equal(ids_of_last, ids)  # what nobody answers is left out
  start = np.flatnonzero(~mask)[-1] + 1
  assert not last[:start].any() and last[start:].all()


def test_an_answer_begins_behind_the_ids_of_the_prompt():
  """Even where one token would span both: generation does not go back."""
  tokenizer = load("qwen2")
  messages = conversation(("user", "a"), ("assistant", "\nb"))
  prompt = ChatTemplate(tokenizer).encode(messages[:1])
  ids, mask, _ = read(tokenizer, {"messages": messages})
  assert ids[: len(prompt)].tolist() == prompt and np.flatnonzero(mask)[0] == len(prompt)
  assert tokenizer.decode(ids[mask]) == "\nb"


def test_a_template_without_a_generation_prompt_leaves_the_header_to_the_model(tmp_path):
  tokenizer = load("smollm", "{% for m in messages %}" + CHATML + "{% endfor %}", tmp_path)
  ids, mask, _ = read(tokenizer, {"messages": conversation(*TURNS[:2])})
  begin = tokenizer.special["<|im_start|>"]
  assert ids[mask][0] == begin and tokenizer.decode(ids[mask]) == "assistant\nthe flow<|im_end|>"


def test_a_template_that_rewrites_turns_gives_a_conversation_for_each(tmp_path):
  """Each answer counts once, in front of what the model reads then; templates that cannot be are refused by name."""
  tokenizer = load("smollm", STRIPS + PROMPT, tmp_path)
  turns = [("user", "a"), ("assistant", "<think>of</think>b"), ("user", "c"), ("assistant", "<think>at</think>d")]
  ids, mask, begins = read(tokenizer, {"messages": conversation(*turns)})
  assert len(begins) == 2
  assert answered(tokenizer, ids, mask)[0] == ["<think>of</think>b", "<think>at</think>d"]
  template = ChatTemplate(tokenizer)
  for messages, (start, stop) in zip((turns[:2], turns), ((0, begins[1]), (begins[1], len(ids)))):
    assert ids[start:stop].tolist() == template.encode(conversation(*messages), False)[: stop - start]
  assert read(tokenizer, {"messages": conversation(*turns)}, "last")[2] == [0]
  steady = conversation(("user", "a"), ("assistant", "b"), *turns[2:])
  assert read(tokenizer, {"messages": steady})[2] == [0]
  begun = load(
    "smollm", "{% for m in messages %}" + CHATML + "{% endfor %}" + PROMPT.replace("\n'", "\n<think>'"), tmp_path
  )
  with pytest.raises(BadLine, match="writes an answer otherwise than its generation prompt begins it"):
    read(begun, {"messages": steady})


def test_prompts_and_completions():
  tokenizer = load()
  line = {"prompt": "of a river", "completion": "the flow"}
  ids, mask, _ = read(tokenizer, line)
  np.testing.assert_array_equal(
    ids, read(tokenizer, {"messages": conversation(("user", "of a river"), ("assistant", "the flow"))})[0]
  )
  assert answered(tokenizer, ids, mask)[0] == ["the flow"]
  messages = {"prompt": conversation(*TURNS[:3]), "completion": conversation(*TURNS[3:])}
  ids, mask, _ = read(tokenizer, messages)
  np.testing.assert_array_equal(ids, read(tokenizer, {"messages": conversation(*TURNS)})[0])
  assert answered(tokenizer, ids, mask)[0] == ["known at last"]  # what the prompt's assistant says is read


@pytest.mark.parametrize(
  "line, message",
  [
    ({"messages": conversation(("user", "a"))}, "has no answer"),
    ({"messages": conversation(("user", "a"), ("assistant", " "))}, "has an empty message"),
    ({"prompt": "a"}, "has neither 'messages' nor 'prompt' and 'completion'"),
    ({"text": "a"}, "has neither 'messages' nor 'prompt' and 'completion'"),
    ({"prompt": "a", "completion": 3}, "neither a string nor messages"),
    ({"prompt": "a", "completion": conversation(("user", "a"))}, "has no answer"),
    ({"messages": conversation(("user", "\ud800"), ("assistant", "a"))}, "not valid Unicode"),
  ],
)
def test_lines_without_an_answer_are_named(line, message):
  with pytest.raises(BadLine, match=message):
    read(load(), line)


def test_conversations_are_packed_whole():
  lengths = np.append(np.random.default_rng(0).integers(1, 40, 399), 60)
  members, ends = packing.pack(lengths, 60)
  assert sorted(members) == list(range(400))
  sums = np.add.reduceat(lengths[members], [0, *ends[:-1]])
  assert sums.max() <= 60 and len(ends) <= -(-lengths.sum() // 60) + 1
  other = packing.pack(lengths, 60, (7,))[0]
  assert sorted(other) == sorted(members) and list(other) != list(members)


def lines(count, seed=0):
  """Lines of conversations whose answers repeat what was asked, of one and two turns."""
  rng = np.random.default_rng(seed)
  words = ["the", "flow", "token", "of", "a", "river", "runs", "and", "time", "is", "known", "at", "last"]
  found = []
  for _ in range(count):
    turns = []
    for _ in range(rng.integers(1, 3)):
      some = " ".join(rng.choice(words, rng.integers(1, 5)))
      turns += [("user", some), ("assistant", f"{some} {some}")]
    found.append(json.dumps({"messages": conversation(*turns)}))
  return found


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  """A file of 300 conversations, one that is too long, one whose answer is too far behind, and one without."""
  long = [("user", "a"), ("assistant", "of a river " * 200)], [("user", "of a river " * 200), ("assistant", "a")]
  odd = [conversation(*turns) for turns in (*long, [("user", "a")])]
  file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
  file.write_text("\n".join([*lines(300), *(json.dumps({"messages": messages}) for messages in odd)]))
  return file


def data(path, **fields):
  return config_lib.Data(
    path=str(path), tokenizer="huggingface", tokenizer_path=f"{FOLDER}/smollm", batch_size=4, **fields
  )


def test_batches_hold_whole_conversations_that_do_not_see_each_other(chats, capfd):
  """Whether the file is prepared in the cache or by the command; every epoch reads each once, and a run resumes."""
  tokenizer, config = load(), data(chats, chat="answers", valid_share=0.0, test_share=0.0)
  corpora = corpora_lib.load_corpora(config, tokenizer)
  assert "1 of 303 documents are skipped (has no answer: 1)" in capfd.readouterr().err
  text = batches_lib.TrainingText(corpora, config, 256)
  (report,) = text.reports
  assert re.search(r"301 conversations in \d+ sequences of 256 tokens, .* % of them padding; 1 are longer", report)
  assert "; 1 more are left out" in report
  count = int(re.search(r"in ([\d,]+) sequences", report)[1])
  take = lambda start, many: [next(it) for it in [text.batches(start=start)] for _ in range(many)]
  epochs = take(0, -(-2 * count // 4))
  rows = [
    tuple(zip(tokens.tolist(), mask.tolist(), segments.tolist()))
    for batch in epochs
    for tokens, mask, segments in zip(batch.tokens, batch.answers, batch.segments)
  ]
  first, second = rows[:count], rows[count : 2 * count]
  assert set(first) == set(second) and len(set(first)) == count and first != second
  expected = sorted(tuple(zip(*read(tokenizer, json.loads(line))[:2])) for line in lines(300))
  found = []
  for row in first:
    numbers = sorted({segment for *_, segment in row} - {0})
    found += [tuple((token, mask) for token, mask, segment in row if segment == number) for number in numbers]
    assert not any(mask for _, mask, segment in row if segment == 0)
  assert sorted(part for part in found if len(part) < 257) == expected
  again = take(3, 1)[0]
  for name in ("tokens", "answers", "segments"):
    np.testing.assert_array_equal(getattr(again, name), getattr(epochs[3], name))


def test_prepared_conversations_are_those_of_the_cache(chats, tmp_path):
  """For any number of processes; with what is shown of them, and what does not fit."""
  flags = [f"--input={chats}", "--tokenizer=huggingface", f"--tokenizer_path={FOLDER}/smollm", "--chat"]
  for name, more in (("a", ["--workers=1"]), ("b", ["--workers=2"]), ("c", ["--workers=1", "--last_answer"])):
    done = call("evo_jax.prepare", *flags, f"--output={tmp_path / name}", *more)
    assert done.returncode == 0 and "of answers" in done.stdout, done.stderr
  files = {name: sorted(f.name for f in (tmp_path / name).iterdir() if f.is_file()) for name in "ab"}
  assert files["a"] == files["b"] and "000-00000-0000.train.index" in files["a"]
  for file in files["a"]:
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
  shown = call("evo_jax.prepare", f"--inspect={tmp_path / 'a'}", "--documents=1").stdout
  assert re.search(
    r"^    read   '<\|im_start\|>user\\n.*<\|im_start\|>assistant\\n'\n    answer '[a-z ]+<\|im_end\|>'$", shown, re.M
  )
  assert "all checksums of 6 shards are right" in shown
  cached, prepared = (
    corpora_lib.load_corpora(config, load()) for config in (data(chats, chat="answers"), data(tmp_path / "a"))
  )
  assert cached[0].fingerprint == prepared[0].fingerprint
  with pytest.raises(UserError, match=r"config.data.chat: 'last' is not what .*a was prepared as: --chat$"):
    corpora_lib.load_corpora(data(tmp_path / "a", chat="last"), load())
  answers = [shards.read_manifest(str(tmp_path / name)).sources[0].splits["train"].answers for name in "ac"]
  assert 0 < answers[1] < answers[0]
  raw = bytearray((tmp_path / "a" / "000-00000-0000.train.index").read_bytes())
  raw[9] ^= 1
  (tmp_path / "a" / "000-00000-0000.train.index").write_bytes(raw)
  assert_refused(call("evo_jax.prepare", f"--inspect={tmp_path / 'a'}"), "train.index: record 0 is damaged")


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--tokenizer=bytes"], "--chat: --tokenizer=bytes has no chat template"),
    (["--tokenizer_path=FOLDER/unigram"], "has no chat template"),
    (["--field=messages"], "--field=messages: is for text"),
    (["--nochat", "--last_answer"], "--last_answer: is of conversations, and needs --chat"),
    (["--input=TEXT"], "a.txt has no lines of JSON"),
    (["--input=NONE"], "none.jsonl: has no answer|line 1 has no answer"),
  ],
)
def test_impossible_preparations_are_refused(tmp_path, flags, message):
  (tmp_path / "a.txt").write_text("text")
  (tmp_path / "a.jsonl").write_text(lines(1)[0])
  (tmp_path / "none.jsonl").write_text(json.dumps({"messages": conversation(("user", "a"))}))
  fill = lambda flag: (
    flag.replace("FOLDER", FOLDER).replace("TEXT", f"{tmp_path}/a.txt").replace("NONE", f"{tmp_path}/none.jsonl")
  )
  given = ["--chat", "--tokenizer=huggingface", f"--tokenizer_path={FOLDER}/smollm", f"--input={tmp_path}/a.jsonl"]
  done = call("evo_jax.prepare", *given, f"--output={tmp_path}/out", *map(fill, flags))
  assert re.search(message, done.stderr), done.stderr
  assert_refused(done, "")


def test_data_sets_of_text_are_written_as_before_there_were_others(tmp_path):
  """But for the version: so that the command that began one goes on."""
  (tmp_path / "a.jsonl").write_text("\n".join(lines(100)))
  manifest = preparation.prepare(plan.Job(str(tmp_path / "a.jsonl")), load(), "huggingface", str(tmp_path / "o"))
  written = json.loads((tmp_path / "o" / "manifest.json").read_text())
  assert written["version"] == shards.HUGGINGFACE_VERSION
  assert written["dtype"] == "uint16" and "chat" not in written["flags"]
  assert set(written["sources"][0]["splits"]["train"]) == {"shards"}
  assert shards.read_manifest(str(tmp_path / "o")) == manifest
  with pytest.raises(UserError, match="o: was begun without --chat; use another one"):
    job = plan.Job(str(tmp_path / "a.jsonl"), chat="answers")
    preparation.prepare(job, load(), "huggingface", str(tmp_path / "o"))


def test_text_and_conversations_are_read_side_by_side(tmp_path):
  """Of text all tokens but the first count, of conversations answers."""
  (tmp_path / "a.jsonl").write_text("\n".join(lines(100)))
  (tmp_path / "b.txt").write_text("of a river and time " * 300)
  tokenizer = load()
  shares = dict(valid_share=0.0, test_share=0.0)
  job = lambda file, **more: plan.Job(str(tmp_path / file), **shares, **more)
  for name, one in (("x", job("a.jsonl", chat="answers")), ("y", job("b.txt"))):
    preparation.prepare(one, tokenizer, "huggingface", str(tmp_path / name))
  config = data(f"{tmp_path}/x,{tmp_path}/y", weights=(0.5, 0.5))
  batch = next(batches_lib.TrainingText(corpora_lib.load_corpora(config, tokenizer), config, 64).batches())
  of_text = batch.answers[:, 1:].all(axis=1)
  assert of_text.sum() == 2 and (batch.answers[~of_text].sum(axis=1) > 5).all() and not batch.answers[:, 0].any()
  assert (batch.segments[of_text] == 0).all() and batch.counted is None


def train(workdir, file, **changes):
  fields = {
    "data.chat": "answers",
    "data.tokenizer": "huggingface",
    "data.tokenizer_path": f"{FOLDER}/smollm",
    "data.batch_size": 8,
    "model.isolate_documents": True,
    "model.context": 128,
    "model.kv_heads": 2,
    "train.steps": 8,
    "mesh.fsdp": 2,
    "eval.samples": 0,
    "loss.bound_windows": 0,
    "eval.paths": ("ar",),
    **changes,
  }
  return call("evo_jax.main", *train_flags(workdir, file, **fields), devices=2)


@pytest.fixture(scope="module")
def tuned(chats, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("tuned")
  done = train(workdir, chats)
  assert done.returncode == 0, done.stderr
  return workdir, done


def rows(workdir):
  return [
    {name: value for name, value in row.items() if name not in metrics_lib.TIMING_FIELDS}
    for row in metrics_lib.read_metrics(workdir / "metrics.jsonl")
  ]


def test_a_run_measures_answers_and_goes_on_bit_for_bit(tuned, chats, tmp_path):
  workdir, done = tuned
  assert re.search(r"conversations in \d+ sequences of 128 tokens", done.stdout)
  assert re.search(r"^path +bits per answer token +stderr", done.stdout, re.M), done.stdout
  table = json.loads((workdir / "table.json").read_text())
  assert [entry["passes_per_token"] for entry in table] == [1.0]
  stopped = shutil.copytree(workdir, tmp_path / "stopped")
  shutil.rmtree(stopped / "checkpoints" / "8")
  again = train(stopped, chats)
  assert again.returncode == 0 and "goes on after step 4" in again.stdout, again.stderr
  assert rows(stopped) == rows(workdir) and json.loads((stopped / "table.json").read_text()) == table


def test_evaluate_measures_answers_of_other_conversations(tuned, chats, tmp_path):
  """By the run's own reading of files, or by --chat; the model keeps conversations apart whatever its fields say."""
  (tmp_path / "other.jsonl").write_text("\n".join(lines(20, seed=1)))
  flags = [f"--workdir={tuned[0]}", f"--data={tmp_path}/other.jsonl", "--paths=ar", f"--json={tmp_path}/t.json"]
  bits = {}
  for chat in ("", "--chat=answers", "--chat=last", "--chat=text"):
    done = call("evo_jax.evaluate", *flags, *filter(None, [chat]))
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((tmp_path / "t.json").read_text())
    assert ("of which count" in done.stdout) == (chat != "--chat=text")
    bits[chat] = entry["bits"], entry["unit"]
  assert bits[""] == bits["--chat=answers"] and bits[""][1] == "bits per answer token"
  assert bits["--chat=last"] != bits[""] and bits["--chat=text"][1] == "bits per byte"
  refused = call("evo_jax.evaluate", f"--workdir={tuned[0]}", "--chat=last")
  assert_refused(refused, "--chat=last: is how --data is read, which is not given")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model.isolate_documents": False}, "isolate_documents: False lets conversations of one sequence read each other"),
    ({"data.chat": "all"}, "config.data.chat: 'all' is not one of answers, last"),
    ({"data.tokenizer": "bytes"}, "config.data.chat: 'answers' needs a chat template: data.tokenizer = huggingface"),
    ({"model.context": 8}, "no answer begins within config.model.context = 8 tokens"),
  ],
)
def test_runs_that_cannot_be_are_refused(tmp_path, changes, message):
  (tmp_path / "a.jsonl").write_text("\n".join(lines(20)))
  assert_refused(train(tmp_path / "run", tmp_path / "a.jsonl", **changes), message)


def test_prepared_conversations_must_be_kept_apart(tmp_path):
  (tmp_path / "a.jsonl").write_text("\n".join(lines(20)))
  job = plan.Job(str(tmp_path / "a.jsonl"), chat="answers", valid_share=0.2)
  preparation.prepare(job, load(), "huggingface", str(tmp_path / "chats"))
  refused = train(tmp_path / "run", tmp_path / "chats", **{"data.chat": "", "model.isolate_documents": False})
  assert_refused(refused, "isolate_documents: False lets conversations of one sequence read each other")


def test_windows_tile_answers():
  answers = np.zeros((2, 20), bool)
  answers[0, [0, 3, 4, 5, 6, 7, 19]] = True  # the first token is context only
  tiles = tile_answers(answers, 4)
  assert tiles.anchor_BxN.tolist() == [[2, 6, 18], [0, 0, 0]] and tiles.tokens_BxN.tolist() == [[4, 1, 1], [0, 0, 0]]
