"""The door to lm-eval (EleutherAI's lm-evaluation-harness): its tasks, asked of many adapters in the packed passes of ours.

lm-eval evaluates one model at a time. The requests of a task are the same for every model, so that the first adapter's are put
to all adapters at once, and what the others would ask is known already. Prompts, metrics and data are lm-eval's own; a context
that is too long loses its beginning, as in lm-eval's own models.

Import it through `open_harness` (`alone.py`): lm-eval is an extra. HF_HUB_OFFLINE and HF_DATASETS_OFFLINE are heeded by the
libraries that load a task's data; tasks of a folder of one's own need no network at all.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager, get_task_dict
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.asking import Decode, ask_candidates
from chrysalis_ray.evaluate.judging import Find
from chrysalis_ray.evaluate.questions import Answered, Prompt, Questions, Replies, cut_at, room_of
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.training.pack import Pack

MOST_NEW_TOKENS = 256  # where a task does not say, as in lm-eval's own models
ROOM = 2048  # tokens, where a base does not say
RESAMPLES = 1000  # for the standard errors that lm-eval has no formula for
EXACT = 1e-9  # how far a share of marks may be from the metric that it is

Heard = tuple[float, bool]
Marks = dict[str, list[int]]  # by metric: 1 for every item that is right, 0 for every other
Asked = Callable[[Questions, Decode], dict[str, Replies]]


def evaluate_tasks(
    pack: Pack,
    base: Path,
    longest: int | None,
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    task_folder: Path | None = None,
    limit: int | None = None,
    find: Find = Path,
) -> dict[str, Any]:
    """lm-eval's results: ``{"version", "tasks": {task: {"items", "version", "candidates": {name: metrics}}}}``.

    `task_folder` holds YAML files of tasks beside those that lm-eval knows; `limit` takes so many items of each task. Raises
    EvaluationError for a task that nobody knows, that cannot be loaded, or that wants more than losses and greedy text.
    """
    panel = Panel(
        base,
        longest,
        [candidate.name for candidate in candidates],
        lambda questions, decode: ask_candidates(pack, questions, candidates, find, decode),
    )
    told, _ = told_by(panel, tasks, task_folder, limit)
    return told


def told_by(
    panel: Panel, tasks: Sequence[str], task_folder: Path | None, limit: int | None
) -> tuple[dict[str, Any], dict[str, dict[str, Marks]]]:
    """lm-eval's results on everybody of a panel, as `evaluate_tasks` has them; and by task and name the metrics that count
    items which are right or wrong, with a mark for each item."""
    manager = known_tasks(tasks, task_folder)
    told: dict[str, dict[str, Any]] = {}
    marks: dict[str, dict[str, Marks]] = {}
    for place, name in enumerate(panel.names):
        found = _evaluated(Voice(panel, place), tasks, manager, limit)
        for task, metrics in found["results"].items():
            sizes = found.get("n-samples", {}).get(task, {})
            about = {"items": sizes.get("effective"), "version": found.get("versions", {}).get(task)}
            told.setdefault(task, {**about, "candidates": {}})["candidates"][name] = _plain(metrics)
            marks.setdefault(task, {})[name] = _marks(metrics, found.get("samples", {}).get(task, ()))
    return {"version": lm_eval.__version__, "tasks": told}, marks


def known_tasks(tasks: Sequence[str], task_folder: Path | None) -> TaskManager:
    """Whoever knows these tasks. Raises EvaluationError for one that nobody knows."""
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        close = ", ".join(difflib.get_close_matches(unknown[0], manager.all_tasks, 3)) or "none is spelt like it"
        raise EvaluationError(
            f"lm-eval {lm_eval.__version__} knows no task {unknown[0]!r}; close to it: {close}",
            "look into its list of tasks, or give a folder with the YAML of your own (--lm-eval-path, evaluate.lm_eval.folder)",
        )
    return manager


def check_tasks(tasks: Sequence[str], task_folder: Path | None) -> None:
    """Raises EvaluationError for tasks that are not known, or whose data cannot be loaded here and now."""
    manager = known_tasks(tasks, task_folder)
    with _data_of(tasks):
        get_task_dict(list(tasks), manager)


def _evaluated(voice: Voice, tasks: Sequence[str], manager: TaskManager, limit: int | None) -> dict[str, Any]:
    with _data_of(tasks):
        found: Any = simple_evaluate(
            model=voice, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=True, bootstrap_iters=RESAMPLES
        )
    return dict(found)


@contextmanager
def _data_of(tasks: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # what is not on disk, in no cache, and cannot be fetched
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise EvaluationError(
            f"the data of {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {reason})",
            "load it once where there is a network (offline, only what is in the cache of `datasets` is there), or give a "
            "folder with tasks whose data lie in files (--lm-eval-path, evaluate.lm_eval.folder)",
        ) from error


def _marks(metrics: dict[str, Any], samples: Sequence[dict[str, Any]]) -> Marks:
    """What every item got by the metrics that are the share of items which are right, in the order of the items."""
    found = {}
    for key, value in metrics.items():
        metric, _, kept = key.partition(",")
        own = [each for each in samples if each.get("filter", "none") == kept and metric in each]
        marks = [each[metric] for each in sorted(own, key=lambda each: each["doc_id"])]
        if marks and all(mark in (0, 1) for mark in marks) and abs(sum(marks) / len(marks) - value) < EXACT:
            found[_plain_name(metric, kept)] = [int(mark) for mark in marks]
    return found


def _plain_name(metric: str, kept: str) -> str:
    return metric if kept in ("", "none") else f"{metric} ({kept})"


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "acc_stderr,none": ...}`` with plain keys, and numbers alone."""
    found = {}
    for key, value in metrics.items():
        metric, _, kept = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and metric != "sample_len":
            found[_plain_name(metric, kept)] = float(value)
    return found


class Panel:
    """All candidates, who are asked together; what each replied to what was asked before is kept.

    `ask` puts questions to everybody of `names`; it may make text of what they write as the panel does.
    """

    def __init__(self, base: Path, longest: int | None, names: Sequence[str], ask: Asked) -> None:
        from transformers import AutoTokenizer

        self.names, self.ask = tuple(names), ask
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
        self.room = min(room for room in (longest, room_of(base), ROOM if longest is None else None) if room)
        self._heard: dict[Answered, list[Heard]] = {}
        self._said: dict[Prompt, list[list[int]]] = {}

    def hear(self, rows: Sequence[Answered], place: int) -> list[Heard]:
        """What one candidate makes of every row."""
        self._ask(Questions(tuple(dict.fromkeys(row for row in rows if row not in self._heard))))
        return [self._heard[row][place] for row in rows]

    def write(self, prompts: Sequence[Prompt], place: int) -> list[str]:
        """What one candidate writes to every prompt, cut where it ends."""
        self._ask(Questions((), tuple(dict.fromkeys(prompt for prompt in prompts if prompt not in self._said))))
        return [cut_at(self.decode(self._said[prompt][place]), prompt.stop) for prompt in prompts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _ask(self, questions: Questions) -> None:
        if not questions.answered and not questions.prompts:
            return
        replies = self.ask(questions, self.decode)
        everyone = [replies[name] for name in self.names]
        for number, row in enumerate(questions.answered):
            self._heard[row] = [heard[number] for heard, _ in everyone]
        for number, prompt in enumerate(questions.prompts):
            self._said[prompt] = [said[number] for _, said in everyone]


class Voice(TemplateLM):
    """One candidate of a panel, as lm-eval sees it."""

    def __init__(self, panel: Panel, place: int) -> None:
        super().__init__()
        self.panel, self.place = panel, place
        self.tokenizer = panel.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begun = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        special = not begun if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_special_tokens=special)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> list[Heard]:
        rows = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-(self.panel.room + 1) :]  # the last one is predicted, and not read
            start = max(1, len(ids) - len(continuation))
            rows.append(Answered(tuple(ids), start, 0))
        return [(-loss, written) for loss, written in self.panel.hear(rows, self.place)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.panel.room,
                context_len=1,
            )
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            totals.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self.panel.write([self._prompt(*request.args) for request in requests], self.place)

    def _prompt(self, context: str, wanted: dict[str, Any]) -> Prompt:
        if wanted.get("do_sample") or (wanted.get("temperature") or 0.0) > 0.0 or wanted.get("num_beams", 1) != 1:
            raise EvaluationError(f"a task wants text that is drawn or searched ({wanted})", "take tasks of greedy text")
        most = next(
            (int(wanted[key]) for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if wanted.get(key)), MOST_NEW_TOKENS
        )
        until = wanted.get("until") or ()
        stop = tuple(word for word in ([until] if isinstance(until, str) else until) if word)
        if most >= self.panel.room:
            raise EvaluationError(
                f"a task wants up to {most} new tokens, the base takes {self.panel.room} together with the prompt",
                "take a base of a longer context, or write max_gen_toks into the task's generation_kwargs",
            )
        ids = self.tok_encode(context)[-(self.panel.room - most) :]
        return Prompt(tuple(ids or [self.prefix_token_id]), most, stop)
