"""The checkpoint bundle and how one is opened. Opening reads headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from llmkit.architecture import registry
from llmkit.architecture.architecture import Architecture
from llmkit.architecture.model import Model
from llmkit.checkpoint.embeddings import with_true_tying
from llmkit.checkpoint.file_content import FileContent, read_generation_config
from llmkit.checkpoint.hub import resolve_path
from llmkit.checkpoint.manifest import recipe_of
from llmkit.checkpoint.order import in_order, sort_tensors
from llmkit.checkpoint.spelling import in_family_names
from llmkit.checkpoint.templates import with_named_templates
from llmkit.errors import listing
from llmkit.formats.container import Container, SafetensorsFiles
from llmkit.formats.folder import is_weight_file, left_unread, weight_set
from llmkit.formats.json_text import read_object
from llmkit.formats.tokenizer_files import TOKENIZER_FILES
from llmkit.formats.unreadable import refuse_no_files
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import OpenedLayout
from llmkit.layouts.opening import open_foreign
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import TensorSpec

T = TypeVar("T")
_COPIED_SUFFIXES = (".json", ".txt", ".md", ".model", ".jinja", ".tiktoken", ".yaml", ".yml")
_READ = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_COPIED_NAMES = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


@dataclass(frozen=True)
class Checkpoint:
    """An ordered mapping of tensor names to lazy tensors, with the config, the other files and the history.

    Attributes:
        label: a short name for messages (the folder's name).
        tensors: name -> lazy tensor, in natural order of names.
        config: the contents of config.json.
        files: name -> content of every other small file: tokenizer, generation config, model card, licence.
        origin: the folder or file it was opened from; None when it was made from others.
        history: one entry for each transform: {"transform": name, **parameters}.
        notes: what was decided on the way and the user should see in the plan.
        warnings: what the user should act on.
        container: how its tensors are laid out in files when it is written.
        layout: the file layout it was read from; `hf` when it was made from others.
        details: what else its files say of themselves (`llmkit.layouts.layout.OpenedLayout`).
        float_specs: dtype and shape of what its tensors stand for, by name, where they were encoded just now; None
            where they are what they are, or have to be looked at.
    """

    label: str
    tensors: Mapping[str, Lazy]
    config: Mapping[str, Any]
    files: Mapping[str, FileContent] = field(default_factory=dict)
    origin: Path | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    container: Container = field(default_factory=SafetensorsFiles)
    layout: str = "hf"
    details: Mapping[str, Any] = field(default_factory=dict)
    float_specs: Mapping[str, TensorSpec] | None = None

    def __getitem__(self, name: str) -> Lazy:
        """The tensor of a name; KeyError where there is none."""
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @cached_property
    def architecture(self) -> Architecture | None:
        """The architecture that claims the config; None where no plugin does.

        Raises:
            PluginError: two plugins claim it.
        """
        return registry.find(self.config)

    @cached_property
    def model(self) -> Model | None:
        """The architecture with the sizes of this config: slots, names, shapes. None where no plugin describes it.

        Raises:
            PluginError: two plugins claim it.
            SpecError: the config lacks a key or contradicts itself.
        """
        return None if self.architecture is None else self.architecture.bind(self.config).fitted(self.tensors)

    def require_model(self) -> Model:
        """The model, for work that needs one.

        Raises:
            RequirementError: no plugin describes it.
        """
        return self.model or registry.require_model(self.config, self.label)

    def prompt_suffix(self) -> tuple[int, ...]:
        """Ids that every prompt of the model ends with; none where no plugin says so."""
        return () if self.architecture is None else self.architecture.prompt_suffix_of(self.config)

    def fingerprints(self) -> list[list[str | int]]:
        """Name, digest of the expression and index of each tensor: identifies a checkpoint, but not by its content."""
        return [[name, lazy.origin.fingerprint(), lazy.index] for name, lazy in self.tensors.items()]

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The contents of generation_config.json; empty where there is none that can be read."""
        return read_generation_config(self.files)[0]

    @property
    def tokenizer_files(self) -> dict[str, FileContent]:
        """The files that belong to the tokenizer."""
        return {k: v for k, v in self.files.items() if k in TOKENIZER_FILES}

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each tensor, by name."""
        return {name: lazy.spec for name, lazy in self.tensors.items()}

    @cached_property
    def spec_counts(self) -> Mapping[TensorSpec, int]:
        """How many tensors have each dtype and shape: few are there of those, and many may be of one."""
        by_form = {spec.form: spec for spec in self.specs.values()}
        return {by_form[form]: n for form, n in Counter([spec.form for spec in self.specs.values()]).items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(n * spec.nbytes for spec, n in self.spec_counts.items())

    @cached_property
    def _known(self) -> dict[Callable[[Checkpoint], Any], Any]:
        return {}

    def once(self, compute: Callable[[Checkpoint], T]) -> T:
        """What `compute` gives of this checkpoint, computed when it is asked for first."""
        if compute not in self._known:
            self._known[compute] = compute(self)
        known: T = self._known[compute]
        return known

    def derive(
        self,
        *,
        tensors: Mapping[str, Lazy] | None = None,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, FileContent] | None = None,
        step: Mapping[str, Any] | None = None,
        container: Container | None = None,
        notes: Iterable[str] = (),
        warnings: Iterable[str] = (),
    ) -> Checkpoint:
        """A new checkpoint made from this one by a transform; what is not given stays."""
        return replace(
            self,
            tensors=dict(self.tensors) if tensors is None else in_order(tensors, self.tensors),
            config=dict(self.config if config is None else config),
            files=dict(self.files if files is None else files),
            origin=None,
            history=self.history + ((dict(step),) if step is not None else ()),
            notes=self.notes + tuple(notes),
            warnings=self.warnings + tuple(warnings),
            container=self.container if container is None else container,
            layout="hf",
            details={},
            float_specs=None,
        )

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, {len(self.tensors)} tensors, {self.nbytes} bytes)"


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a checkpoint: a folder, a weight file, or a hub id already in the local cache (or downloadable).

    Reads headers, config.json and the names of the other files; no tensor data, but where a head is stored that the
    config ties to the embedding (`embeddings`). Tensors have the names of their family, also where the file leaves the
    beginning out (`notes` says so).

    Raises:
        InputError: nothing there, no weights, or malformed files.
    """
    return with_true_tying(_opened(resolve_path(model)))


def open_tokenizer_folder(model: str | Path) -> Checkpoint | None:
    """The tokenizer and config of a folder without weight files, as a checkpoint without tensors; None for others.

    Raises:
        InputError: nothing there, or a config that is no JSON.
    """
    path = resolve_path(model)
    if not path.is_dir() or any(p.suffix != ".json" and is_weight_file(p.name) for p in path.iterdir()):
        return None
    refuse_no_files(path, _READ)
    config = read_object(path / "config.json") if (path / "config.json").is_file() else {}
    return Checkpoint(path.name or path.resolve().name, {}, config, _small_files(path), origin=path)


def _small_files(path: Path) -> dict[str, FileContent]:
    files = {p.name: FileContent(path=p) for p in sorted(path.iterdir()) if p.is_file() and _is_copied(p.name)}
    return with_named_templates(files, path)


def _opened(path: Path) -> Checkpoint:
    refuse_no_files(*((path, _READ) if path.is_dir() else (path.parent, _READ[:1])))
    candidate = Candidate(path)
    opened = open_foreign(candidate)
    if opened is not None:
        return _from_layout(path, replace(opened, notes=(*candidate.wrapper_notes, *opened.notes)))
    if path.is_file():
        config = _config_beside(path)
        tensors, notes = in_family_names(candidate.tensors, config)
        return Checkpoint(
            path.stem, sort_tensors(tensors), config, origin=path, notes=(*candidate.wrapper_notes, *notes)
        )
    config_path = path / "config.json"
    config = read_object(config_path) if config_path.is_file() else {}
    warnings = [] if config else [f"{path} has no config.json: only tensor-wise work is possible"]
    chosen, unread = weight_set(path), left_unread(path, candidate.tensors)
    if chosen is not None and unread:
        warnings.append(
            f"{path} holds more weights than one set: {chosen.name} is read, as transformers does, and "
            f"{listing(unread)} {'are' if len(unread) > 1 else 'is'} not"
        )
    tensors, notes = in_family_names(candidate.tensors, config)
    files = _small_files(path)
    return Checkpoint(
        label=path.name or path.resolve().name,
        tensors=sort_tensors(tensors),
        config=config,
        files=files,
        origin=path,
        history=recipe_of(path),
        notes=(*candidate.wrapper_notes, *notes),
        warnings=(*warnings, *read_generation_config(files)[1]),
    )


def _from_layout(path: Path, opened: OpenedLayout) -> Checkpoint:
    """A checkpoint of a foreign layout: transformers' view of it, with the small files beside it."""
    folder = path if path.is_dir() else path.parent
    beside = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in opened.own]
    files = {n: FileContent(data=f) if isinstance(f, bytes) else FileContent(path=f) for n, f in opened.files.items()}
    small = {p.name: FileContent(path=p) for p in beside if _is_copied(p.name) and _belongs(path, p.name)}
    files |= with_named_templates(small, folder)
    if opened.vocabulary:
        from llmkit.tokenization.from_gguf import tokenizer_files

        files |= tokenizer_files(opened.vocabulary, opened.config)
    if opened.scored_pieces is not None and "tokenizer.model" not in files:
        from llmkit.tokenization.scored_pieces import from_scored_pieces

        content, where = FileContent(path=opened.scored_pieces).read(), str(opened.scored_pieces)
        model = from_scored_pieces(content, int(opened.config["vocab_size"]), where)
        files["tokenizer.model"] = FileContent(data=model.serialized())
    label = (path.name or path.resolve().name) if path.is_dir() else path.stem
    recipe = recipe_of(folder) if path.is_dir() else ()
    tensors, config = sort_tensors(opened.tensors), dict(opened.config)
    return Checkpoint(
        label=label,
        tensors=tensors,
        config=config,
        files=files,
        origin=path,
        history=recipe,
        notes=opened.notes,
        warnings=(*opened.warnings, *read_generation_config(files)[1]),
        layout=opened.layout,
        details=opened.details,
    )


def _belongs(path: Path, name: str) -> bool:
    """Whether a file belongs to the checkpoint; beside a single weight file only tokenizer files do."""
    return path.is_dir() or name in TOKENIZER_FILES


def _is_copied(name: str) -> bool:
    if name in ("config.json", "llmkit.json") or is_weight_file(name) or name.startswith("."):
        return False
    return name in TOKENIZER_FILES or name in _COPIED_NAMES or name.endswith(_COPIED_SUFFIXES)


def _config_beside(path: Path) -> dict[str, Any]:
    beside = path.parent / "config.json"
    return read_object(beside) if beside.is_file() else {}
