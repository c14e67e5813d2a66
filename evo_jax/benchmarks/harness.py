"""lm-evaluation-harness: the model that it asks, its tasks with documents from files, and one evaluation of them.

The only module that imports it. From the harness's own command, with what `EvoJax` takes as --model_args:

  python -c 'import evo_jax.benchmarks.harness; from lm_eval.__main__ import cli_evaluate; cli_evaluate()' \
    --model evo_jax --model_args workdir=runs/tiny,mode=verify --tasks arc_easy

or from Python: `lm_eval.simple_evaluate(model=EvoJax("runs/tiny"), tasks=["arc_easy"])`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
from pathlib import Path
import random
import sys
import tempfile
from typing import Any
from unittest import mock

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
import numpy as np

from evo_jax import functions
from evo_jax import run as run_lib
from evo_jax.benchmarks import tasks as tasks_lib
from evo_jax.benchmarks.answers import GAPS, Answer, Likelihood, Likelihoods, Question, Texts
from evo_jax.benchmarks.kept import KeptAnswers, digest
from evo_jax.benchmarks.pairs import Encoder
from evo_jax.benchmarks.sandbox import CodeEval, Sandbox
from evo_jax.benchmarks.tasks import Benchmark
from evo_jax.data import chat as chat_lib
from evo_jax.decoding.engine import Engine, default_pass_rows
from evo_jax.decoding.settings import DEFAULT_PATH, Sampling, check_sampling
from evo_jax.errors import UserError
from evo_jax.evaluation.batches import BatchScorer
from evo_jax.evaluation.continuations import ContinuationScorer
from evo_jax.evaluation.prefix_trees import PrefixTreeScorer

os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of bootstraps: a process with JAX must not be forked

_SEED = 1234  # the harness's, of few-shot examples and bootstraps
_BOOTSTRAPS = 1000
_CONTINUES = "EVO_JAX_CONTINUES "  # behind a message that is to be continued; its end tells whether a template strips
_MAX_TOKENS = 256  # of an answer, where a task does not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Model(LM):
  """A model as the harness asks it. Statistics of what was asked for are in `counts`, by task."""

  def __init__(
    self,
    run: run_lib.Run,
    encoder: Encoder,
    likelihoods: Likelihoods | None = None,
    texts: Texts | None = None,
    sampling: Sampling | None = None,
    infill: bool = False,
  ):
    """sampling: of texts, without what a request says itself. infill: whether tasks that ask for the middle of a
    document get it by infilling."""
    super().__init__()
    self._run, self._encoder, self._likelihoods, self._texts = run, encoder, likelihoods, texts
    self._sampling, self._infill = sampling or Sampling(), infill
    self.counts: dict[str, dict[str, float]] = {}

  @property
  def tokenizer_name(self) -> str:
    return self._run.tokenizer.identity

  @property
  def eot_token_id(self) -> int:
    return self._run.tokenizer.separator_id

  @property
  def prefix_token_id(self) -> int:
    return self._encoder.prefix_id

  @property
  def max_length(self) -> int:
    return self._run.config.model.position_limit

  def tok_encode(self, string: str, **_) -> list[int]:
    return self._encoder.encode(string)

  @functools.cached_property
  def _template(self) -> chat_lib.ChatTemplate:
    return chat_lib.ChatTemplate(self._run.tokenizer, chat_lib.DATE)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    return getattr(self._run.tokenizer, "chat_template", None) if chat_template else None

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation as text; without a generation prompt it ends with the last message's text, which is continued."""
    messages = [{"role": message["role"], "content": message["content"]} for message in chat_history]
    if add_generation_prompt:
      return self._template.render(messages, True)
    messages[-1]["content"] += _CONTINUES
    text = self._template.render(messages, False)
    end = text.rindex(_CONTINUES.strip())
    keeps_space = text[end:].startswith(_CONTINUES)  # the template; else it strips messages, as transformers sees it
    return text[:end] if keeps_space else text[:end].rstrip()

  def loglikelihood(self, requests: list[Instance], **_) -> list[tuple[float, bool]]:
    found = self._likelihoods([request.args[:2] for request in requests])
    self._count_likelihoods(requests, found)
    return [(one.log_p, one.greedy) for one in found]

  def loglikelihood_rolling(self, requests: list[Instance], **_) -> list[float]:
    found = self._likelihoods.rolling([request.args[0] for request in requests])
    self._count_likelihoods(requests, found)
    return [one.log_p for one in found]

  def generate_until(self, requests: list[Instance], **_) -> list[str]:
    seen: dict[str, int] = {}
    questions = []
    for request in requests:
      question = self._question(request)
      key = repr(question)
      questions.append(dataclasses.replace(question, number=seen.get(key, 0)))
      seen[key] = seen.get(key, 0) + 1
    answers = self._texts(questions)
    for request, answer in zip(requests, answers):
      self._count_answer(request, answer)
    return [answer.text for answer in answers]

  def _question(self, request: Instance) -> Question:
    context, asked = request.args[0], dict(request.args[1])
    until = asked.get("until") or []
    stop = tuple(string for string in ([until] if isinstance(until, str) else until) if string)
    tokens = next((int(asked[name]) for name in _LENGTHS if asked.get(name) is not None), _MAX_TOKENS)
    changes: dict[str, Any] = {"stop": stop, "max_tokens": tokens, "greedy": True}
    temperature = float(asked.get("temperature") or 0.0)
    if asked.get("do_sample", temperature > 0.0) and temperature > 0.0:
      changes |= {"greedy": False, "temperature": temperature}
      changes |= {name: kind(asked[name]) for name, kind in (("top_p", float), ("top_k", int)) if name in asked}
    document = None
    if self._infill and request.task_name in tasks_lib.INFILLING:
      document = request.doc["prompt"], request.doc["suffix"]
    return Question(context, dataclasses.replace(self._sampling, **changes), document=document)

  def _count_likelihoods(self, requests: Sequence[Instance], found: Sequence[Likelihood]) -> None:
    for request, one in zip(requests, found):
      self._add(request.task_name, requests=1, cut=one.cut, draws_variance=(one.stderr or 0.0) ** 2)

  def _count_answer(self, request: Instance, answer: Answer) -> None:
    self._add(request.task_name, requests=1, cut=answer.cut, tokens=answer.tokens, passes=answer.passes)

  def _add(self, task: str, **values: float) -> None:
    counts = self.counts.setdefault(task, {})
    for name, value in values.items():
      counts[name] = counts.get(name, 0) + value


@register_model("evo_jax")
class EvoJax(Model):
  """The model of a work directory, for the harness's own commands; it stops with the process."""

  def __init__(
    self,
    workdir: str,
    mode: str = "ar",
    path: str = "ar",
    draws: int = 1,
    threshold: float = 0.25,
    infill: bool = True,
    begin: str = "auto",
    chat: bool = False,
    context: int = 0,
    rows: int = 16,
    seed: int = 0,
    output: str | None = None,
    step: int | None = None,
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    """chat: whether special tokens in texts are meant as such; to be True with --apply_chat_template. The harness's own
    batch_size, max_batch_size and device mean nothing here: an engine has `rows`, on the devices that JAX has."""
    del batch_size, max_batch_size, device
    self._chat = bool(chat)
    run = run_lib.load_run(workdir, step)
    sampling = Sampling(mode=mode, threshold=float(threshold), greedy=True)
    check_sampling(sampling, run.config)
    infill = bool(infill) and mode in DEFAULT_PATH
    self._asker = asker = Asker(run, output, begin=begin, chat=bool(chat), context=int(context), seed=int(seed))
    likelihoods = asker.likelihoods(path, int(draws), asker.scorer(path, int(draws), rows=int(rows)))
    super().__init__(run, asker.encoder, likelihoods, None, sampling, infill)
    self._rows = int(rows)

  def generate_until(self, requests: list[Instance], **_) -> list[str]:
    if self._texts is None:  # tasks of likelihoods need no engine
      engine = self._asker.make_engine(self._rows, [self._sampling], self._infill)
      self._texts = self._asker.texts(engine, self._sampling)
    return super().generate_until(requests)

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    if not self._chat:
      raise UserError("--apply_chat_template: needs chat=True among the --model_args of evo_jax")
    return super().apply_chat_template(chat_history, add_generation_prompt)


class Asker:
  """Makes what answers requests, with one store for each setting that answers depend on."""

  def __init__(
    self,
    run: run_lib.Run,
    output: str | None,
    *,
    begin: str = "auto",
    chat: bool = False,
    context: int = 0,
    seed: int = 0,
  ):
    """output: folder in which answers are kept; None: nowhere. context: tokens of the longest text; 0: 4,096, or what
    the model can read. Raises UserError."""
    self.run, self.encoder, self._output, self._seed = run, Encoder(run.tokenizer, begin, chat), output, seed
    self.context = min(context or 4096, run.config.model.position_limit)
    self._stores: dict[str, KeptAnswers] = {}
    self._about = {"begin": begin, "chat": chat, "context": self.context, "step": run.step}
    self._about["model"] = run_lib.fingerprint(run)  # by all processes

  def make_engine(self, rows: int, modes: Sequence[Sampling], infill: bool) -> Engine:
    modes = [dataclasses.replace(mode, max_tokens=None, greedy=False) for mode in modes] or ["ar"]
    return Engine(
      self.run,
      rows,
      modes=modes,
      context=self.context,
      cache_tokens=max(rows * 1024, 2 * self.context),
      infill=infill,
      pass_rows=default_pass_rows(rows, self.run.mesh),  # the last texts are often long ones
    )

  def scorer(self, path: str, draws: int, window: int = 0, rows: int = 4) -> BatchScorer:
    if path == "ar":
      return PrefixTreeScorer(self.run, self.context, rows)
    return ContinuationScorer(self.run, functions.read_path(path), draws, self._seed, window, rows)

  def likelihoods(self, path: str, draws: int, scorer: BatchScorer, window: int = 0) -> Likelihoods:
    if path == "ar":
      return Likelihoods(scorer, self.encoder, self._keep("likelihoods", {"path": path, "limit": scorer.limit}))
    asked = {"path": path, "draws": draws, "seed": self._seed, "window": window}
    if functions.is_own(path):
      asked["file"] = functions.digest(path)
    return Likelihoods(scorer, self.encoder, self._keep("likelihoods", asked), self.context)

  def texts(self, engine: Engine, sampling: Sampling, gaps: Sequence[int] = GAPS) -> Texts:
    counted = "tokens that are kept"  # of infilling; answers that were kept before count those of all gaps
    kept = self._keep("texts", {**dataclasses.asdict(sampling), "seed": self._seed, "counted": counted})
    return Texts(engine, self.encoder, kept, self._seed, gaps)

  def _keep(self, kind: str, settings: dict[str, Any]) -> KeptAnswers:
    settings = {**self._about, **settings}
    name = f"{kind} {digest(settings)}"
    if name not in self._stores:
      self._stores[name] = KeptAnswers(self._output, kind, settings)
    return self._stores[name]


@dataclasses.dataclass
class LoadedTasks:
  """Tasks of the harness, ready to be asked. tasks, groups: by name; members: by benchmark, its tasks; substituted: by
  task, the file that stands for another split; left_out: by benchmark, why it is not among them."""

  tasks: dict[str, Task] = dataclasses.field(default_factory=dict)
  groups: dict[str, Any] = dataclasses.field(default_factory=dict)
  members: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  substituted: dict[str, str] = dataclasses.field(default_factory=dict)
  left_out: dict[str, str] = dataclasses.field(default_factory=dict)
  folder: tempfile.TemporaryDirectory = dataclasses.field(  # of documents, as long as the tasks are used
    default_factory=lambda: tempfile.TemporaryDirectory(prefix="evo_jax_tasks_")
  )

  def select(self, wanted: Callable[[Task], bool]) -> list[str]:
    """Names of the benchmarks all of whose tasks are wanted."""
    return [name for name, members in self.members.items() if all(wanted(self.tasks[member]) for member in members)]


def is_written(task: Task) -> bool:
  """Whether a task's answers are written texts."""
  return task.OUTPUT_TYPE == "generate_until"


def load_tasks(
  benchmarks: Sequence[Benchmark], data: str | None, sandbox: Sandbox | None, shots: int | None = None
) -> LoadedTasks:
  """Loads benchmarks with their documents.

  Args:
    data: folder of documents (`tasks.LOCAL`); None: from the hub, as the harness does.
    sandbox: where programs that the model wrote are run; None: benchmarks that do so are left out.
    shots: examples in front of each question, for all; None: as each benchmark says.

  Raises UserError for a name that the harness does not have, and where no benchmark is left.
  """
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  manager, loaded = TaskManager(), LoadedTasks()
  unknown = [benchmark.task for benchmark in benchmarks if benchmark.task not in manager.task_index]
  if unknown:
    raise UserError(f"--tasks: the harness has no task {unknown[0]!r}; suites are {', '.join(tasks_lib.SUITES)}")
  benchmarks = list(_without_tags(manager.task_index, benchmarks))
  index, folder = manager.task_index, Path(loaded.folder.name)
  local = _LocalTasks(index, data, folder) if data else None
  with _code_runs_in(sandbox):
    for benchmark in benchmarks:
      name = benchmark.task
      if sandbox is None and any((index[leaf].cfg or {}).get("unsafe_code") for leaf in _leaves(index, name)):
        loaded.left_out[name] = "runs what the model writes; --run_code allows that"
      elif local and not local.write(benchmark):
        loaded.left_out[name] = f"no documents in {data}"
      elif local:
        _load_benchmark(TaskManager(include_path=str(folder / name), include_defaults=False), name, benchmark, loaded)
      else:
        spec = name
        if benchmark.changes:
          spec = str(folder / f"{name}.yaml")
          _save(spec, {"include": str(index[name].yaml_path), **benchmark.changes})
        _load_benchmark(manager, spec, benchmark, loaded)
  _check_disjoint(loaded.members)
  for name, benchmark in {benchmark.task: benchmark for benchmark in benchmarks}.items():
    for member in loaded.members.get(name, ()):
      documents = tasks_lib.local_documents(member) if data else None
      _set_shots(loaded.tasks[member], benchmark.shots if shots is None else shots, documents)
      if documents and (note := _substitution(loaded.tasks[member], documents)):
        loaded.substituted[member] = note
  if not loaded.tasks:
    raise UserError("--tasks: nothing is left: " + "; ".join(f"{name}: {why}" for name, why in loaded.left_out.items()))
  return loaded


def _without_tags(index, benchmarks: Iterable[Benchmark]) -> Iterator[Benchmark]:
  """The benchmarks, with what a tag stands for in its place: the harness has no result of a tag."""
  for benchmark in benchmarks:
    if index[benchmark.task].kind.name == "TAG":
      yield from _without_tags(index, map(tasks_lib.find_benchmark, _children(index, benchmark.task)))
    else:
      yield benchmark


def _check_disjoint(members: Mapping[str, Sequence[str]]) -> None:
  """Raises UserError where two benchmarks have a task in common, whose shots and items could not be those of both."""
  of: dict[str, str] = {}
  for name, tasks in members.items():
    for task in tasks:
      if task in of:
        raise UserError(f"--tasks: {of[task]} and {name} have {task} in common; ask for them in two commands")
      of[task] = name


def _load_benchmark(manager: TaskManager, spec: str, benchmark: Benchmark, loaded: LoadedTasks) -> None:
  try:
    found = manager.load([spec])
  except ModuleNotFoundError as error:
    raise UserError(f"--tasks={benchmark.task}: needs {error.name}: pip install 'evo_jax[bench]'") from error
  except Exception as error:  # whatever the hub, or a task's own code, raises
    raise UserError(f"--tasks={benchmark.task}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
  loaded.members[benchmark.task] = list(found["tasks"])
  loaded.tasks |= found["tasks"]
  loaded.groups |= found.get("groups", {})


def _set_shots(task: Task, shots: int | None, documents: tasks_lib.LocalDocuments | None) -> None:
  own = task.get_config("num_fewshot")
  shots = own if shots is None or own == 0 else shots  # as the harness, which does not overrule a task's 0
  if documents and documents.shots is not None:
    shots = min(shots or 0, documents.shots)
  task.set_config("num_fewshot", shots or 0)


def _substitution(task: Task, documents: tasks_lib.LocalDocuments) -> str | None:
  split = task.config.test_split or task.config.validation_split
  file = documents.splits[split]
  return None if file == split else f"{file} for {split}"


def _leaves(index, name: str) -> Iterator[str]:
  """The tasks of a group or tag."""
  children = _children(index, name)
  if children is None:
    yield name
  for child in children or ():
    yield from _leaves(index, child)


def _children(index, name: str) -> list[str] | None:
  entry = index[name]
  if entry.kind.name == "TAG":
    return sorted(entry.tags)
  if entry.kind.name != "GROUP":
    return None
  members = [
    member if isinstance(member, str) else member.get("task", member.get("group")) for member in entry.cfg["task"]
  ]
  return [member for member in members if member in index]


class _LocalTasks:
  """Configurations of tasks whose documents are files, each on top of the harness's own, in a folder."""

  def __init__(self, index, data: str, folder: Path):
    self._index, self._data, self._folder = index, data, folder

  def write(self, benchmark: Benchmark) -> bool:
    """Writes those of a benchmark; False: it has no documents."""
    return self._write(benchmark.task, benchmark, self._folder / benchmark.task)

  def _write(self, name: str, benchmark: Benchmark, folder: Path) -> bool:
    children = _children(self._index, name)
    if children is None:
      return self._write_task(name, benchmark, folder)
    written = [child for child in children if self._write(child, benchmark, folder)]
    if written and self._index[name].kind.name == "GROUP":
      _save(folder / f"{name}.yaml", {"include": str(self._index[name].yaml_path), "group": name, "task": written})
    return bool(written)

  def _write_task(self, name: str, benchmark: Benchmark, folder: Path) -> bool:
    documents = tasks_lib.local_documents(name)
    config = self._index[name].cfg or {}
    files = documents.files(self._data) if documents else {}
    changes = {**benchmark.changes, **(documents.changes if documents else {})}
    splits = {field: changes.get(field, config.get(field)) for field in ("test_split", "validation_split")}
    if not files or not any(split in files for split in splits.values()):
      return False
    if documents.only:
      files = {split: self._filtered(folder, f"{name}-{split}", file, *documents.only) for split, file in files.items()}
    for field in ("training_split", "validation_split", "test_split", "fewshot_split"):
      if changes.get(field, config.get(field)) not in files:
        changes[field] = None
    own = {
      "include": str(self._index[name].yaml_path),
      "task": name,
      "dataset_path": "json",
      "dataset_name": None,
      "dataset_kwargs": {"data_files": files, "cache_dir": str(self._folder / "cache")},
    }
    _save(folder / f"{name}.yaml", own | changes)
    return True

  def _filtered(self, folder: Path, name: str, file: str, field: str, value: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with open(file, encoding="utf-8") as lines, path.open("w", encoding="utf-8") as out:
      out.writelines(line for line in lines if line.strip() and json.loads(line).get(field) == value)
    return str(path)


def _save(path: Path | str, config: dict[str, Any]) -> None:
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(config))  # JSON is YAML


@contextlib.contextmanager
def _code_runs_in(sandbox: Sandbox | None) -> Iterator[None]:
  """Gives tasks the sandbox where they load the metric that runs programs, which otherwise comes from the hub and runs
  them in this process."""
  import evaluate

  load = evaluate.load
  ours = lambda path, *args, **kwargs: (
    CodeEval(sandbox) if path == "code_eval" and sandbox else load(path, *args, **kwargs)
  )
  with mock.patch.object(evaluate, "load", ours):
    yield


@dataclasses.dataclass(frozen=True)
class Conversation:
  """How prompts become conversations; the harness's flags of the same names."""

  apply_chat_template: bool = False
  system_instruction: str | None = None
  fewshot_as_multiturn: bool = False


def evaluate_tasks(
  model: Model, loaded: LoadedTasks, names: Sequence[str], limit: int, conversation: Conversation
) -> dict[str, Any]:
  """The harness's results for some benchmarks. limit: items of a benchmark, spread over its tasks, each of which gets
  one or more; 0: all."""
  random.seed(0)
  np.random.seed(_SEED)
  members = list(itertools.chain.from_iterable(loaded.members[name] for name in names))
  samples = None
  if limit:
    samples = {
      member: list(range(min(len(loaded.tasks[member].eval_docs), max(limit // len(loaded.members[name]), 1))))
      for name in names
      for member in loaded.members[name]
    }
  for member in members:
    loaded.tasks[member].set_fewshot_seed(_SEED)
  groups = {name: group for name, group in loaded.groups.items() if set(_tasks_of(group)) <= set(members)}
  with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result
    return evaluator.evaluate(
      model,
      {"tasks": {member: loaded.tasks[member] for member in members}, "groups": groups, "group_map": {}},
      samples=samples,
      bootstrap_iters=_BOOTSTRAPS,
      confirm_run_unsafe_code=True,  # only loaded with a sandbox
      **dataclasses.asdict(conversation),
    )


def _tasks_of(group) -> list[str]:
  return [task.task_name for task in group.get_all_tasks()]
