"""lm-eval's own task definitions, over local files or over the hub.

Imported only when something is evaluated: it needs lm-eval at once, as its task class is derived from.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from sysconfig import get_paths
from traceback import walk_tb
from typing import Any

import lm_eval.api.task
import lm_eval.tasks
import lm_eval.utils
import yaml
from lm_eval.api.task import ConfigurableTask

from llmkit.errors import (
    InputError,
    LlmkitError,
    RequirementError,
    counted,
    in_a_line,
    is_memory_error,
    listing,
    suggestion,
)
from llmkit.evaluation.benches import Bench
from llmkit.evaluation.csv_forms import has_answers
from llmkit.evaluation.protocol import Documents
from llmkit.evaluation.task_files import task_names, unknown_task
from llmkit.evaluation.task_index import replaced, task_manager

Docs = Mapping[str, Sequence[Mapping[str, Any]]]
_FETCHING = ("datasets", "huggingface_hub", "requests", "httpx", "urllib3", "aiohttp")
_NO_MODULE = "Cannot import module"  # lm-eval, of a function that a definition names
_OWN_LM = "llmkit.evaluation.lm"
_SHOTS_SEED = 1234  # lm-eval's own
_DEFINING = {"dataset_path", "class", "include"}  # one of these is in what defines a task
_NOT_TASK_CONFIG = ("include", "tag", "group", "task_list", "dataset_kwargs")


class LocalTask(ConfigurableTask):  # type: ignore[misc]
    """One of lm-eval's tasks whose documents are handed in instead of downloaded."""

    def __init__(self, config: Mapping[str, Any], docs: Docs) -> None:
        self._docs = docs
        super().__init__(config=dict(config))

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Hand the documents over: lm-eval's documented place for data that is not on the hub."""
        from datasets import Dataset, DatasetDict

        self.dataset = DatasetDict({split: Dataset.from_list(list(rows)) for split, rows in self._docs.items() if rows})


def bench_task(bench: Bench, subject: str, docs: Docs | None) -> Any:
    """The lm-eval task of one subject, over `docs` (split -> documents) or, without them, over the hub's data.

    Raises:
        InputError: the hub cannot be reached.
        RequirementError: this lm-eval does not have the task.
    """
    config = _definition(bench.definition.format(subject=subject))
    if bench.description:
        config["description"] = bench.description.format(words=subject.replace("_", " "))
    config["task"] = bench.task_name(subject)
    if bench.split != bench.labelled:
        config.pop("validation_split", None)
        config["test_split"] = bench.split if docs is not None else bench.splits[bench.split]
    if docs is not None:
        if not docs.get(bench.shots_split):
            config.pop("fewshot_split", None)
            config.pop("fewshot_config", None)
        if not has_answers(docs[bench.split]):
            config["doc_to_target"] = 0  # lm-eval looks up the letter; nobody reads what it counts
        return LocalTask(config, docs)
    try:
        return ConfigurableTask(config=config)
    except Exception as error:  # the hub client raises from many trees; each means that the data did not come
        raise InputError(
            f"{bench.title} {subject}: the hub did not give {config.get('dataset_path')} ({type(error).__name__})",
            hint="check the network, or give the benchmark's CSV files: --data FOLDER",
        ) from error


def _definition(name: str) -> dict[str, Any]:
    """A task's YAML file below lm-eval's tasks folder, with what it includes."""
    path = Path(lm_eval.tasks.__file__).parent / name
    try:
        config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _loader(path))
    except FileNotFoundError as error:
        raise RequirementError(
            f"this lm-eval has no task definition {name}", hint="pip install 'lm-eval>=0.4.9,<0.5'"
        ) from error
    if include := config.get("include"):
        config = _definition(str(Path(name).parent / include)) | config
    return {k: v for k, v in config.items() if k not in _NOT_TASK_CONFIG}


def _loader(path: Path) -> type[yaml.SafeLoader]:
    """Of a task's file, whose `!function` names a function of a module beside it."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", partial(lm_eval.utils.import_function, yaml_path=path))
    return Loader


def load_lm_eval_tasks(names: Sequence[str], data: Path | None = None, include: Path | None = None) -> Any:
    """Any of lm-eval's tasks, groups or tags by name, in the form that its `evaluate` takes.

    Args:
        data: a folder with the data sets (`local_datasets`); None takes the hub's.
        include: a folder with definitions besides lm-eval's own, which win.

    Raises:
        InputError: an unknown name, a definition that cannot be read, or data that are not there.
        RequirementError: a task needs a package that is not installed.
    """
    from llmkit.evaluation.local_datasets import datasets_in

    manager = task_manager(names, include)
    for name in names:
        if name not in manager.all_tasks:
            _refuse_damaged(name, include)
            raise unknown_task(name, task_names(include))
    _refuse_groups(manager, names)
    try:
        with datasets_in(data):
            return manager.load(list(names))
    except LlmkitError:
        raise
    except ImportError as error:
        if error.name is None and _NO_MODULE in str(error):
            raise InputError(
                f"lm-eval could not load {listing(names)}: {in_a_line(error)}",
                hint="!function NAME.FUNCTION is of NAME.py beside the definition, or of a package: add or install it",
            ) from error
        missing = str(error.name or "").partition(".")[0]
        raise RequirementError(
            f"lm-eval's {listing(names)} needs a package that is not installed: {missing or error}",
            hint=f"pip install {missing}" if missing else "pip install 'lm-eval[TASK]', as its README says",
        ) from error
    except (Exception, SystemExit) as error:  # see bench_task; modules of definitions run here, too
        cause: BaseException = error
        while type(cause).__name__.startswith("DatasetGeneration") and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        files = [f for f in (getattr(manager.task_index.get(n), "yaml_path", None) for n in names) if f is not None]
        hint = "check the network, or give the data set: --data FOLDER"
        if data is not None:
            hint = f"its data comes from {data}"
        elif not _is_network(cause) and files:
            hint = f"see its definition and the data that it names: {listing(map(str, files))}"
        raise InputError(
            f"lm-eval could not load {listing(names)} ({type(cause).__name__}: {in_a_line(cause)})",
            hint=hint,
        ) from error


@contextmanager
def as_errors_of(names: Sequence[str]) -> Iterator[None]:
    """Run tasks whose templates, functions and metrics may be of one's own, so that their errors are the input's.

    Raises:
        InputError: naming the error, and the line where there is one; what comes out of llmkit's `LM` stays as it is.
    """
    try:
        yield
    except LlmkitError:
        raise
    except (Exception, SystemExit) as error:
        frames = walk_tb(error.__traceback__)
        if is_memory_error(error) or any(frame.f_globals.get("__name__") == _OWN_LM for frame, _ in frames):
            raise
        place = line_of_ones_own(error)
        reason = f"{type(error).__name__}: {in_a_line(error)}{f' in {place}' if place else ''}"
        raise InputError(
            f"lm-eval could not score {listing(names)} ({reason})",
            hint="correct the definition of the task, or the data that it reads",
        ) from error


def line_of_ones_own(error: BaseException) -> str:
    """The last line on an error's way that is of no installed package, llmkit or Python; empty where there is none."""
    installed = [Path(get_paths()[key]) for key in ("stdlib", "purelib", "platlib")]
    installed += [Path(lm_eval.__file__).parents[1], Path(__file__).parents[1]]
    lines = [(Path(frame.f_code.co_filename), line) for frame, line in walk_tb(error.__traceback__)]
    own = [(p, line) for p, line in lines if p.is_file() and not any(map(p.is_relative_to, installed))]
    return f"{own[-1][0]}, line {own[-1][1]}" if own else ""


def _refuse_groups(manager: Any, names: Sequence[str], above: tuple[str, ...] = ()) -> None:
    """Refuse a group that lists a name which nothing has, no name at all, or one that it is in itself.

    Raises:
        InputError: naming the group's file and the name.
    """
    for name in names:
        entry: Any = getattr(manager, "task_index", {}).get(name)
        config = getattr(entry, "cfg", None) or {}
        if not isinstance(config.get("task"), list):
            continue
        where = f"{entry.yaml_path}: the group {name}"
        members = list(_members(config, where))
        for member in members:
            if member not in manager.all_tasks:
                raise InputError(
                    f"{where} has {member!r}, which is no task",
                    hint=suggestion(member, manager.all_tasks, "correct the name, or add the task's definition"),
                )
            if member in (*above, name):
                raise InputError(f"{where} has {member}, which it is in itself")
        _refuse_groups(manager, members, (*above, name))


def _members(group: Mapping[str, Any], where: str) -> Iterator[str]:
    """The names in a group's list and in the groups inside it; tasks that are defined there need none elsewhere."""
    for each in group["task"]:
        keys = each if isinstance(each, Mapping) else {"task": each}
        name = keys.get("group", keys.get("task"))
        if not isinstance(name, str):
            raise InputError(
                f"{where} has {str(each)[:100]!r}, which names no task", hint="name one, or write {task: NAME}"
            )
        if "group" in keys and isinstance(keys.get("task"), list):
            yield from _members({**group, **keys}, where)
        elif not _DEFINING & {*group, *keys}:
            yield name


def _is_network(error: BaseException) -> bool:
    """Whether an error is that of a library that fetches, or of the connection itself."""
    source = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or source in _FETCHING


def _refuse_damaged(name: str, include: Path | None) -> None:
    """Refuse definitions of one's own that name a task and that lm-eval leaves out as unreadable.

    Raises:
        InputError: naming the file, and what lm-eval's reader says of it.
    """
    try:
        from lm_eval.tasks._index import load_yaml
    except ImportError:  # another version
        return
    word = re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
    for path in sorted(include.rglob("*.yaml")) if include is not None else ():
        try:
            if word.search(path.read_bytes()):
                load_yaml(path, resolve_func=False, recursive=True)
        except Exception as error:
            raise InputError(
                f"{path} is no definition that lm-eval reads ({type(error).__name__}: {in_a_line(error)})",
                hint="correct the file, or what it includes",
            ) from error


def set_shots(task: Any, shots: int | None) -> None:
    """The number of shots, by lm-eval's own rules: what a task fixes at 0 stays 0, and what nobody sets is 0."""
    fixed = task.get_config("num_fewshot")
    if shots is not None and fixed != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SHOTS_SEED)


def require_shots(task: Any) -> None:
    """Refuse a task that has fewer examples than shots.

    Raises:
        InputError: see above.
    """
    n = int(task.config.num_fewshot or 0)
    found = task.fewshot_docs() if n else None
    if found is not None and hasattr(found, "__len__") and len(found) < n:
        raise InputError(
            f"{task.config.task}: {counted(n, 'shot')}, but its data have {counted(len(found), 'example')} for them",
            hint=f"--shots {len(found)}",
        )


def documents_of(task: Any) -> Documents:
    """What a task scores, and the examples that all of its prompts begin with."""
    n = int(task.config.num_fewshot or 0)
    shots = task.fewshot_docs() if n else None
    return Documents(task.eval_docs, list(islice(shots, n)) if shots is not None else [])


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Run lm-eval without bars and informational log lines, and compile each prompt template once.

    lm-eval compiles the template anew for every shot of every question (6 ms a question, a tenth of what SmolLM2 needs
    to answer it). The names replaced here are guarded: where a version lacks them, only speed or silence is lost.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            stack.enter_context(replaced(lm_eval.api.task, "tqdm", lambda items, *args, **kwargs: items))
            if hasattr(lm_eval.utils, "env"):
                compiled = lru_cache(maxsize=1024)(lm_eval.utils.env.from_string)
                render = lambda template, doc: compiled(template).render(**doc)  # noqa: E731
                stack.enter_context(replaced(lm_eval.utils, "apply_template", render))
            yield
    finally:
        logger.setLevel(level)
