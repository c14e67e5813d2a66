"""The other commands and the README's, as a user runs them."""

import json
import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT, assert_refused, call, environment, run, train_flags
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax.errors import UserError


def succeed(module, *flags, **kwargs):
  """Calls a command in this process, on one device."""
  done = call(module, *flags, **kwargs)
  assert done.returncode == 0, done.stderr
  return done


def test_evaluate_writes_json(trained, tmp_path, text):
  file = tmp_path / "table.json"
  succeed("evo_jax.evaluate", f"--workdir={trained}", "--paths=ar,diagonal:16,rolling:4,staircase", f"--json={file}")
  table = json.loads(file.read_text())
  assert [set(e) for e in table] == [{"path", "bits", "stderr", "passes_per_token", "unit"}] * 4
  assert [e["passes_per_token"] for e in table] == [1.0, 2.0, 0.5, 1.0]
  assert all(e["stderr"] > 0 and 0 < e["bits"] < 10 and e["unit"] == "bits per byte" for e in table)
  other = succeed("evo_jax.evaluate", f"--workdir={trained}", "--paths=ar", f"--data={text}", "--sequences=20")
  assert "20 sequences" in other.stdout
  test = succeed("evo_jax.evaluate", f"--workdir={trained}", "--paths=ar", "--split=test")
  assert "(test)" in test.stdout and abs(float(test.stdout.splitlines()[2].split()[1]) - table[0]["bits"]) > 1e-4


def test_generate_writes_text(trained):
  """The seed decides, not the process: the command gives the same text in one of its own."""
  flags = (f"--workdir={trained}", "--prompt=the ri", "--num=2", "--max_tokens=20")
  texts = [
    succeed("evo_jax.generate", *flags, *more)
    for more in (
      ("--seed=1",),
      ("--mode=adaptive", "--threshold=2"),
      ("--mode=verify", "--seed=2", "--top_k=9", "--coupling=rejection", "--draft=2"),
      ("--mode=flow", "--steps=3", "--path=rolling", "--stepper=ancestral", "--grid=precision"),
    )
  ]
  texts.append(run("evo_jax.generate", *flags, "--seed=1"))
  for done in texts:
    assert done.returncode == 0 and done.stdout.count("the ri") >= 2 and "tokens in" in done.stderr, done.stderr
  assert texts[-1].stderr.count("\n") == 1  # no noise of libraries beside the line of statistics
  assert texts[0].stdout == texts[-1].stdout and len({done.stdout for done in texts}) == 4


def test_generate_takes_prompts_from_files_and_writes_json_and_traces(trained, tmp_path):
  (tmp_path / "p.jsonl").write_text('"the"\n{"prompt": "a river"}\n{"text": ""}\n')
  prompts = ("--prompt=flow", f"--prompts={tmp_path}/p.jsonl")
  flags = ("--mode=adaptive", "--max_tokens=12", "--json", f"--trace={tmp_path}/t.html")
  generations = json.loads(succeed("evo_jax.generate", f"--workdir={trained}", *prompts, *flags).stdout)
  assert [g["prompt"] for g in generations] == ["flow", "the", "a river", ""]
  for g in generations:
    assert set(g) == {"prompt", "text", "tokens", "settled", "passes", "seconds", "end_id"}
    assert len(g["tokens"]) == len(g["settled"]) <= 12 and g["seconds"] > 0
    assert max(g["settled"], default=0) <= g["passes"]
  assert any(g["tokens"] for g in generations)
  page = (tmp_path / "t.html").read_text()
  assert "flow" in page and "adaptive" in page
  piped = succeed("evo_jax.generate", f"--workdir={trained}", "--prompts=-", "--max_tokens=4", input="the\na\n")
  assert piped.stdout.count("-" * 20) == 1 and piped.stdout.startswith("the")
  filled = succeed(
    "evo_jax.generate", f"--workdir={trained}", "--infill=the [...3] of", "--mode=flow", "--steps=2", "--window=4"
  )
  assert re.fullmatch(r"the .* of\n", filled.stdout, re.S)


def test_generate_takes_text_as_it_is(trained):
  """Flags' names are normalized, values are not, whatever they look like; a model of bytes takes bytes that are no
  UTF-8, which JSON shows as U+FFFD; lines end at line ends alone."""
  spaced = ("--dry-run is", "--", "--flagfile=no", "--config=x", "-a-b", "", "caf\udcc3", "x\u2028\x85\x0c\0")
  flags = [flag for text in spaced for flag in ("--prompt", text)] + ["-prompt=--a-b=c-d", "--prompts=-", "--nojson"]
  done = succeed(
    "evo_jax.generate", f"--workdir={trained}", *flags, "--max-tokens=2", "--json", input="a\u2028b\r\n\nc"
  )
  prompts = [g["prompt"] for g in json.loads(done.stdout)]
  assert prompts == [*(text.replace("\udcc3", "\ufffd") for text in spaced), "--a-b=c-d", "a\u2028b", "", "c"]


def test_generate_fills_the_context(trained):
  """Without --max_tokens, whatever the prompt's length."""
  flags = ("--prompt=the river", f"--prompt={'a' * 31}", "--endless", "--json", "--top_k=20")
  done = succeed("evo_jax.generate", f"--workdir={trained}", *flags)
  assert [len(g["tokens"]) for g in json.loads(done.stdout)] == [23, 1]


@pytest.mark.parametrize(
  "redirect, body, status, out, err",
  [
    (">/dev/full", "print('a')", 1, "", "evo_jax: standard output: cannot be written: No space left on device\n"),
    ("| head -c 3", "[print('ab', flush=True) for _ in range(99999)]", 141, "ab\n", ""),
    ("", "exec('raise KeyboardInterrupt')", 130, "", ""),
    ("", "print('é \\udcc3 \\u4e16')", 0, r"\\xe9 \\udcc3 \\u4e16" + "\n", ""),
    (">&- 2>&- <&-", "(print('a'), sys.stderr.write('b'), sys.stdin and 1 / 0)", 0, "", ""),
  ],
)
def test_output_that_cannot_be_written(redirect, body, status, out, err):
  """A full disk is one line; a reader that has left is none, as for other tools; a terminal that shows only ASCII
  gets escapes; closed streams are no fault."""
  program = f"import sys; from evo_jax import cli; cli.run(lambda: {body})"
  command = f'set -o pipefail; "$0" -c "$1" {redirect}'
  environ = environment() | {"PYTHONIOENCODING": "ascii"}
  done = subprocess.run(
    ["bash", "-c", command, sys.executable, program], capture_output=True, text=True, check=False, cwd=ROOT, env=environ
  )
  assert done.returncode == status and re.fullmatch(out, done.stdout), done
  assert re.fullmatch(err, done.stderr), done.stderr


@pytest.fixture(scope="module")
def learned(tmp_path_factory, text):
  """A run whose model infers a clock."""
  folder = tmp_path_factory.mktemp("learned")
  changes = dict(model__progression="learned", paths__learned=0.5, paths__streams=0.5, eval__paths=("ar", "learned:2"))
  done = succeed("evo_jax.main", *train_flags(folder, text, **changes))
  assert "learned:2" in done.stdout and "--- flow" in done.stdout
  return folder


@pytest.mark.slow
def test_evaluate_prints_the_path_gap(learned):
  """Every discretization of one checkpoint, what each costs above autoregression, and the limit of many passes."""
  table, gap = succeed("evo_jax.evaluate", f"--workdir={learned}", "--sequences=8").stdout.split("path gap")
  bits = {line.split()[0]: float(line.split()[1]) for line in table.splitlines()[2:] if line}
  gaps = {line.split()[0]: float(line.split()[1]) for line in gap.splitlines()[1:]}
  assert list(bits) == ["ar", "rolling:16", "diagonal:4", "diagonal:16", "diagonal:64", "random:16", "learned:8"]
  assert list(gaps) == [*list(bits)[1:], "diagonal:inf"]
  assert all(abs(gaps[path] - bits[path] + bits["ar"]) < 2e-4 for path in bits if path != "ar")
  assert abs(gaps["diagonal:inf"] - (4 * gaps["diagonal:64"] - gaps["diagonal:16"]) / 3) < 1e-3


@pytest.mark.slow
def test_evaluate_shows_the_inferred_progression(learned, tmp_path):
  file = tmp_path / "times.json"
  done = succeed("evo_jax.evaluate", f"--workdir={learned}", "--show-progression", "--passes=4", f"--json={file}")
  assert len(done.stdout.splitlines()) == 1 + 4 + 32
  tokens = json.loads(file.read_text())
  assert len(tokens) == 32 and all(0 < e["half"] < 1 and len(e["times"]) == 5 for e in tokens)
  assert all(e["times"] == sorted(e["times"], reverse=True) for e in tokens)
  assert all((e["times"][0], e["times"][-1]) == (1, 0) for e in tokens)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["learned", "entropy:6", "streams:2"])
def test_generate_follows_any_policy(learned, path):
  flags = ("--prompt=the ri", "--mode=flow", "--max_tokens=16", "--steps=4", f"--path={path}")
  done = succeed("evo_jax.generate", f"--workdir={learned}", *flags)
  assert done.stdout.startswith("the ri") and len(done.stdout) > 7


@pytest.mark.slow
def test_the_frontier_in_short(text, tmp_path, monkeypatch):
  """One training step of two methods, measured, collected and drawn; what exists is not done again."""
  values = config_lib.default()
  values.eval.batch_size = 8  # the text has seven sequences for each split
  monkeypatch.setattr(config_lib, "default", values.copy_and_resolve_references)
  flags = (
    "--budget=1",
    "--only=ar,bd3_4",
    "--test",
    f"--data={text}",
    f"--workdir={tmp_path}/runs",
    f"--output={tmp_path}",
  )
  done = succeed("experiments.frontier", *flags)
  assert re.search("formula counts (0.9|1.0)", done.stdout), done.stdout
  record = json.loads((tmp_path / "frontier_cpu.json").read_text())
  assert {"command", "commit", "machine", "result"} == set(record) and "ar,bd3_4" in record["command"]
  budgets = {
    row["budget"]: [m["name"] for m in row["methods"]] for row in record["result"]["budgets_baselines_as_published"]
  }
  assert budgets == {1.0: ["ar", "bd3_4"], 0.5: ["bd3_4"], 0.25: ["bd3_4"], 0.125: []}
  assert (tmp_path / "frontier_cpu.png").stat().st_size > 10_000
  again = succeed("experiments.frontier", *flags, "--only=ar")
  assert "step 1/1" in done.stderr and "step" not in again.stderr, again.stderr
  runs = json.loads((tmp_path / "frontier_cpu.json").read_text())["result"]["runs"]
  assert [r["name"] for r in runs] == ["ar", "bd3_4"]  # what the file held stays


def finished_point(folder, config, paths, bits):
  """What a run of the scaling experiment leaves, measured on four sequences and four items."""
  from experiments import common

  folder.mkdir(parents=True)
  measured = common.MeasuredRun(config, folder).kept("measured_test_4_1")
  for path in paths:
    measured.add(path, {"bits": bits, "stderr": 0.1, "each": [bits - 0.2, bits, bits, bits + 0.2]})
  asked = {"steps": config.train.steps, "tasks": ["arc_easy", "piqa"], "count": 4, "every_answer": True}
  answers = {"asked": asked, "bits": bits, "stderr": 0.1, "each": [bits * n for n in (7, 8, 17, 21)]}
  (folder / "items.json").write_text(json.dumps(answers | {"lengths": [8, 8, 18, 22], "accuracy": {}, "chance": {}}))
  (folder / "metrics.jsonl").write_text('{"step": 1, "tokens_per_second": 100.0}\n')


@pytest.mark.slow
def test_scaling_in_short(text, tmp_path):
  """Two sizes of both methods, fitted and drawn; what is finished is kept, the one that is not is trained, and asked
  questions."""
  from experiments import scaling

  scale = scaling.SCALES["small"]
  for size, method, bits in (("3k", "ar", 7.5), ("1k", "evo", 8.0), ("3k", "evo", 7.0)):
    config, _, _ = scaling.configure(scale["sizes"][size], method, 0, scale, str(text))
    folder = tmp_path / "runs" / "small" / f"{method}-{size}-0"
    finished_point(folder, config, scaling.METHODS[method][1], bits)
  choices = {"question": "What runs?", "choices": {"text": ["a river", "a token"], "label": ["A", "B"]}}
  goal = {"goal": "know the time", "sol1": "token of the flow", "sol2": "time is known at last"}
  for task, row in {"arc_easy": choices, "piqa": goal}.items():
    (tmp_path / "items" / task).mkdir(parents=True)
    lines = [json.dumps(row | {"answerKey": "AB"[i], "label": i}) for i in (0, 1)]
    (tmp_path / "items" / task / "validation.jsonl").write_text("\n".join(lines))
  command = ("experiments.scaling", "--scale=small", f"--data={text}", f"--output={tmp_path}", "--seeds=1")
  flags = ("--only=1k,3k", f"--workdir={tmp_path}/runs", f"--items={tmp_path}/items", "--tasks=arc_easy,piqa")
  done = succeed(*command, *flags)
  result = json.loads((tmp_path / "scaling_small.json").read_text())["result"]
  points = {(point["size"], point["method"]): point for point in result["runs"]}
  assert [*points] == [("1k", "ar"), ("1k", "evo"), ("3k", "ar"), ("3k", "evo")]
  trained = points["1k", "ar"]
  assert trained["learning_rate"] == scale["rate"] / trained["shape"]["width"] and trained["parameters"] == 848
  assert all(entry["bits"] > 6 and len(entry["each"]) == 4 for entry in trained["text"].values())
  answers = trained["items"]
  assert answers["bits"] == pytest.approx(sum(answers["each"]) / sum(answers["lengths"]), rel=1e-4)
  assert answers["lengths"] == [8, 8, 18, 22] and answers["chance"] == {"arc_easy": 0.5, "piqa": 0.5}
  assert answers["accuracy"] == {"arc_easy": 0.5, "piqa": 0.5}  # one question, twice, with either answer
  fitted = {(f["measure"], f["curve"], f["against"]): f for f in result["fits"]}
  assert len(fitted) == len(result["fits"]) == 2 * (4 + 2)
  kept = fitted["text", "evo, ar", "flops"]
  flops = [points[size, "evo"]["flops"] for size in ("1k", "3k")]
  assert kept["exponent"] == pytest.approx(np.log(8.0 / 7.0) / np.log(flops[1] / flops[0]))
  assert (tmp_path / "scaling_small.png").stat().st_size > 10_000
  shutil.rmtree(tmp_path / "runs")  # as on another machine: the results are enough
  again = succeed(*command, *flags)
  assert "step" in done.stderr and "step" not in again.stderr, again.stderr
  assert json.loads((tmp_path / "scaling_small.json").read_text())["result"] == result
  assert_refused(call(*command, f"--items={tmp_path}"), "arc_easy/validation.jsonl cannot be read")


def test_exponents_are_those_of_a_power_law():
  """Exactly, and within errors where sequences and seeds scatter; questions lose their beginning, answers do not."""
  from evo_jax.data import tokenizers
  from experiments import scaling

  rng = np.random.default_rng(0)
  x = np.array([1e11, 1e12, 1e13])[:, None] * np.ones(2)
  exponent, a = scaling.fit(x, 7.0 * x**-0.08)
  assert exponent == pytest.approx(0.08) and a == pytest.approx(7.0)
  assert scaling.curvature(x, 7.0 * x**-0.08) == pytest.approx(0.0, abs=1e-9)
  assert scaling.curvature(x, 1.0 + 7.0 * x**-0.08) > 1e-4  # an irreducible loss
  hardness = rng.uniform(0.5, 1.5, 200)
  seeds, sequences = np.exp(0.01 * rng.normal(size=x.shape)), 0.02 * rng.normal(size=(3, 2, 200))
  bits = 7.0 * (x**-0.08 * seeds)[..., None] * hardness + sequences
  points = [[{"flops": value} for value in row] for row in x]
  curve = scaling.Curve("ar", points, bits, np.full(200, 1.0))
  draws, _ = scaling.fit(x, scaling.resampled(curve))
  exponent, _ = scaling.fit(x, curve.y)
  assert abs(exponent - 0.08) < 4 * draws.std() < 0.02
  item = scaling.Item("piqa", "a long question", [" wrong", " right"], 1)
  batch, numbers = scaling.item_batch([item], tokenizers.Bytes(), 12, False)
  assert tokenizers.Bytes().decode(batch.tokens[0, 1:]) == "estion right"
  assert tokenizers.Bytes().decode(batch.tokens[batch.counted]) == " right"
  assert scaling.item_batch([item], tokenizers.Bytes(), 12, True)[1].tolist() == [0, 0] and numbers.tolist() == [0]


def test_a_budget_is_met_by_the_cheapest_pair_of_strategies():
  from experiments import frontier

  point = lambda bits, passes: {"bits": bits, "passes_per_token": passes, "each": [bits, bits]}
  points = {"slow": point(2.0, 1.0), "dear": point(3.0, 0.6), "fast": point(3.0, 0.25)}
  assert frontier.cheapest(points, 1.0) == [("slow", 1.0)] and frontier.cheapest(points, 0.25) == [("fast", 1.0)]
  mixture = dict(frontier.cheapest(points, 0.5))
  assert mixture == pytest.approx({"slow": 1 / 3, "fast": 2 / 3}) and frontier.cheapest(points, 0.1) is None
  assert frontier.mixed(points, list(mixture.items()), "bits") == pytest.approx(8 / 3)
  assert frontier.mixed(points, list(mixture.items()), "passes_per_token") == pytest.approx(0.5)


@pytest.mark.parametrize(
  "module, flags, message",
  [
    ("evaluate", ("--workdir=RUN", "--paths=ar,learned:4"), "the model has a shared clock"),
    ("evaluate", ("--workdir=RUN", "--paths=entropy:x"), "path 'entropy:x': needs a threshold from 0 to 64"),
    ("evaluate", ("--workdir=RUN", "--window=7"), "--window=7: does not divide the context of 32"),
    ("generate", ("--workdir=RUN", "--mode=flow", "--path=ar"), "--path=ar: has a mode of its own"),
    ("generate", ("--workdir=RUN", "--mode=flow", "--path=learned"), "has a shared clock"),
    ("evaluate", ("--workdir=/no/such",), "--workdir=/no/such: is no folder"),
    ("evaluate", ("--workdir=RUN", "--paths=spiral:2"), "path 'spiral:2'"),
    ("evaluate", ("--workdir=RUN", "--data=/no/such*"), "--data: no file matches"),
    ("evaluate", ("--workdir=RUN", "--json=/no/such/file"), "--json=/no/such/file: there is no folder /no/such"),
    ("evaluate", ("--workdir=RUN", "--step=999"), "holds no checkpoint of step 999"),
    ("evaluate", ("--workdir=RUN", "--pats=ar"), "Unknown command line flag 'pats'"),
    ("generate", ("--workdir=RUN", "--mode=spiral"), "--mode=spiral"),
    ("generate", ("--workdir=RUN", "--max_tokens=500"), "do not fit the context of 32"),
    ("generate", ("--workdir=RUN", "--mode=adaptive", "--threshold=-1"), "--threshold=-1.0: is not in [0, 64]"),
    ("generate", ("--workdir=RUN", "--trace=/no/such/t.html"), "--trace=/no/such/t.html: there is no folder"),
    ("generate", ("--workdir=RUN", "--infill=a [...] b"), "--infill: needs --mode=flow or --mode=adaptive"),
    ("generate", ("--workdir=RUN", "--chat", "--prompt=a"), "--chat: the tokenizer, bytes, has no chat template"),
    ("generate", ("--workdir=RUN", "--chat", "--prompts=-"), "--prompts=-: has no prompts"),
    ("generate", ("--workdir=RUN", "--prompts=/no/such"), "--prompts=/no/such: cannot be read"),
    ("generate", ("--workdir=RUN", "--prompts=-", "--prompts=-"), "--prompts=-: standard input can be read only once"),
    ("generate", ("--workdir=RUN", "--prompts=-"), "--prompts=-: has no prompts"),
    ("generate", ("--workdir=RUN", f"--prompt={32 * 'a'}"), "its 32 tokens leave no room for another in the context"),
    ("generate", ("--workdir=RUN", "--mode=flow", "--infill=a[...0]"), "[...0] has no token to fill"),
    ("generate", ("--workdir=RUN", "--mode=flow", "--infill=a[...999999999999]"), "do not fit the context of 32"),
    ("generate", ("--workdir=RUN", "--prompt=\ud800"), "is not valid Unicode"),
    ("generate", ("--workdir=RUN", "--temperature=nan"), "--temperature=nan: is not a finite number"),
    ("generate", ("--workdir=RUN", "--stop="), "--stop: is empty"),
    ("generate", ("--workdir=RUN", f"--num={2**63}"), "is more than 1000000 texts"),
    ("generate", ("--workdir=RUN", f"--seed={2**32}"), "--seed=4294967296: is not in [0, 2^32)"),
    ("evaluate", ("--workdir=RUN", f"--seed={2**64}"), "--seed=18446744073709551616: is not in [0, 2^32)"),
    ("generate", ("--workdir=RUN", f"--step={2**63}"), "holds no checkpoint of step 9223372036854775808"),
    ("generate", ("--workdir=/no\nsuch",), r"--workdir=/no\nsuch: is no folder"),
    ("generate", ("--workdir=configs",), "config.json: cannot be read"),
    ("evaluate", ("--workdir=RUN", "--show_progression"), "the model has a shared clock"),
    ("main", ("--config=configs/tiny.py", "stray"), "unexpected argument 'stray'"),
  ],
)
def test_bad_input_is_one_line(trained, module, flags, message):
  done = call(f"evo_jax.{module}", *(f.replace("RUN", str(trained)) for f in flags))
  assert_refused(done, message)
  assert done.stdout == ""


@pytest.mark.parametrize(
  "module, flag, message",
  [("generate", "--mode=flow --path=learned", "has a shared clock"), ("evaluate", "--pats=ar", "command line flag")],
)
def test_a_refusal_is_all_that_a_process_prints(trained, module, flag, message):
  """Libraries add nothing, in a process of its own."""
  done = run(f"evo_jax.{module}", f"--workdir={trained}", *flag.split())
  assert_refused(done, message)
  assert done.stdout == ""


@pytest.mark.parametrize(
  "arguments, message",
  [
    ("--process_id=5 --num_processes=2", "--process_id=5: is not below --num_processes=2"),
    ("--num_processes=0", "--num_processes=0: is not positive"),
    ("--process_id=-2", "--process_id=-2: is negative"),
    ("--coordinator=host", "--coordinator=host: is not HOST:PORT"),
    ("--coordinator=host:70000", "--coordinator=host:70000: is not HOST:PORT"),
    ("--coordinator=host:1234 --nodistributed", "--coordinator=host:1234: does not go with --nodistributed"),
    ("--heartbeat=0", "--heartbeat=0: is not positive"),
  ],
)
def test_impossible_flags_of_processes_are_refused(arguments, message):
  assert_refused(call("evo_jax.evaluate", "--workdir=/no/such", *arguments.split()), message)


@pytest.mark.parametrize(
  "arguments, variables, message",
  [
    ("--num_processes=2", {}, "--num_processes=2: JAX finds no cluster"),
    ("--distributed", {}, "--distributed: JAX finds no cluster"),
    ("", {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2: JAX finds no cluster"),
    ("", {"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b: JAX finds no cluster"),
    ("", {"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS=: is not HOST:PORT"),
    ("--nodistributed", {"SLURM_STEP_NUM_TASKS": "2"}, "--workdir=/no/such: is no folder"),
  ],
)
def test_half_set_clusters_are_refused(monkeypatch, arguments, variables, message):
  """Before anything is read; JAX is as in a process that has no devices yet."""
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
  assert_refused(call("evo_jax.evaluate", "--workdir=/no/such", *arguments.split()), message)


def test_a_platform_that_is_not_there_is_named(tmp_path):
  if shutil.which("nvidia-smi"):
    pytest.skip("cuda may be there")
  done = run("evo_jax.main", "--config=tiny", f"--workdir={tmp_path}", variables={"JAX_PLATFORMS": "cuda"})
  assert_refused(done, "JAX_PLATFORMS=cuda: cannot be used here (")


def test_recorded_runs_are_not_repeated(tmp_path):
  """The file alone knows them; of other settings it is refused, and stays as it is."""
  from experiments import common

  open_file = lambda minutes: common.RecordedRuns("some", tmp_path, {"minutes": minutes, "shape": (2, 3)})
  recorded = open_file(20.0)
  assert recorded.find(name="base") is None
  first = recorded.add({"name": "base", "steps": (2, 4), "bits": 3.5})
  assert {"commit", "machine"} < first.keys() and open_file(20.0).runs == [first]
  open_file(20.0).add({"name": "other", "steps": (2, 4), "bits": 3.0})
  again = open_file(20.0)
  assert again.find(name="base", steps=(2, 4)) == first and again.find(name="base", steps=(4,)) is None
  again.write(best="other")
  text = (tmp_path / "some.json").read_text()
  assert list(json.loads(text)["result"]) == ["settings", "best", "runs"] and len(open_file(20.0).runs) == 2
  with pytest.raises(UserError, match="some.json: has runs of another minutes"):
    open_file(10.0)
  assert (tmp_path / "some.json").read_text() == text


@pytest.mark.slow
def test_pieces_for_a_gpu_are_measured_once(tmp_path, monkeypatch):
  """In small on the CPU: a row that failed is measured again, the others are kept."""
  from experiments import common

  def missing():
    raise UserError("torch is not installed")

  monkeypatch.setattr(common, "transformers", missing)
  flags = ("experiments.on_gpu", f"--output={tmp_path}", "--small", "--only=throughput")
  assert_refused(call("experiments.on_gpu", f"--output={tmp_path}", "--only=decode,golden"), "--model is needed by dec")
  assert "goes on with throughput" in succeed(*flags, "--minutes=0.01").stdout
  file = tmp_path / "throughput.json"
  assert not file.exists()
  file.write_text('{"result": {"done": false, "rows": {"evo150m": {"batch": 3}, "evo1b": {"error": "no memory"}}}}')
  measured = succeed(*flags, "--piece=throughput").stdout
  assert "transformers is left out: torch is not installed" in measured and "evo150m" not in measured
  result = json.loads(file.read_text())["result"]
  assert result["done"] and result["rows"]["evo150m"] == {"batch": 3}
  row = result["rows"]["evo1b"]
  assert {*row["steps"]} == {"autoregression", "windows"} and row["shape"]["layers"] == 1
  assert all(step["tokens_per_second"] > 0 for step in row["steps"].values())
  assert succeed(*flags).stdout == "throughput: is done\n"


def test_pieces_for_a_gpu_have_a_limit_of_time(tmp_path):
  from experiments import on_gpu

  python = lambda code, seconds: on_gpu.run_limited("piece", [sys.executable, "-c", code], dict(os.environ), seconds)
  assert python("print('fine')", 60) == ""
  assert python("print('a line'); raise SystemExit(3)", 60) == "failed with exit status 3: a line"
  waits = "import subprocess; subprocess.run(['sleep', '1000'])"  # whose process has to end, too
  assert python(waits, 1) == "stopped after 1 s, its time"
  (tmp_path / "golden.json").write_text('{"result": {"done": true}}')
  for failure in ("stopped", ""):
    on_gpu.record_failure(tmp_path, "golden", failure)
    record = json.loads((tmp_path / "golden.json").read_text())
    assert record == {"result": {"done": True}} | ({"failure": "stopped"} if failure else {})


@pytest.mark.extended
def test_speed_beside_transformers_in_short():
  """Both libraries write as many tokens; the ratio of their speeds is printed."""
  for module in ("torch", "transformers"):
    pytest.importorskip(module)
  done = run("experiments.hf_speed", "--small", "--tokens=8", "--repeats=1")
  assert done.returncode == 0, done.stderr
  speeds = re.match(r"evo_jax ([\d.]+) tokens per second, transformers ([\d.]+) \(.*: ratio ([\d.]+)", done.stdout)
  evo_jax, transformers, ratio = map(float, speeds.groups())
  assert evo_jax > 0 < transformers and ratio == pytest.approx(evo_jax / transformers, rel=0.02, abs=0.006)
