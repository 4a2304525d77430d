"""Detection of a delta's published convention from names, shapes, dtypes and small files; no data is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import MARKER_NAME
from llmkit.errors import RequirementError
from llmkit.tensors.spec import DType
from llmkit.transforms.delta.profiles import Profile, find_profile

_EMBEDDING_GLOBS = ("*embed_tokens.weight", "*word_embeddings.weight", "*tok_embeddings.weight", "*wte*", "*embed*")
# Pad, end, begin, unknown and a few markers; a vocabulary that grew by more was trained, not padded.
_FEW_ROWS = 16
_BY_NAME = (
    ("wizard", "wizardlm"), ("tulu", "tulu"), ("open-instruct", "tulu"), ("gist", "gist"), ("knowlm", "knowlm"),
    ("zhixi", "knowlm"), ("alpaca-farm", "alpaca-farm"), ("alpaca_farm", "alpaca-farm"),
)  # fmt: skip
_ZIYA_ROWS = 39424


@dataclass(frozen=True)
class Detection:
    """The profile found, why, and what else it could be."""

    profile: Profile | None  # None for llmkit's own deltas, which carry their rules with them
    reason: str
    alternatives: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The profile's name."""
        return "llmkit" if self.profile is None else self.profile.name


def detect(base: Checkpoint, delta: Checkpoint) -> Detection:
    """The profile of `delta` over `base`.

    Raises:
        RequirementError: what is visible fits no published convention, or several that would give different models.
    """
    if MARKER_NAME in delta.files:
        return Detection(None, f"it carries {MARKER_NAME}")
    names = list(delta.tensors)
    if "tok_embeddings.weight" in delta.tensors and "tok_embeddings.weight" not in base.tensors:
        raise RequirementError(
            f"{delta.label} is in the layout of the original .pth files, {base.label} is in the converted one",
            hint="give both in the same layout",
        )
    if delta.layout == "easylm":
        return _detection("koala", "it is in EasyLM's layout")
    hint = f"{delta.label} {delta.config.get('_name_or_path', '')}".lower()
    if any("mm_projector" in n for n in names):
        return _detection("llava", "it has an mm_projector")
    if any(n.startswith("backbone_model.") for n in names):
        return _detection("alpaca-farm", "its names nest under backbone_model.")
    if "model_sum.txt" in delta.files:
        return _detection("alpaca-farm", "it carries model_sum.txt")
    rows, base_rows = embedding_rows(delta), embedding_rows(base)
    if "billa" in hint:
        return _detection("billa", f"its name says so ({delta.label})")
    if rows == _ZIYA_ROWS:
        return _detection("ziya", f"it has {rows} embedding rows")
    return _by_rows(main_dtype(delta), rows, base_rows, hint)


def _by_rows(dtype: DType | None, rows: int | None, base_rows: int | None, hint: str) -> Detection:
    of = "no float" if dtype is None else dtype.torch_name
    if rows is None or base_rows is None or rows <= base_rows:
        seen = f"{of}, {rows} embedding rows, no more than the base's {base_rows}"
        return _detection("vicuna" if dtype is DType.F16 else "plain", seen)
    seen = f"{of}, {rows} embedding rows over the base's {base_rows}"
    if rows - base_rows > _FEW_ROWS:
        raise RequirementError(
            f"the delta ({seen}) fits several conventions: the new rows may be full values or hidden under a mean",
            hint="say which: --profile ziya (embedding and head are full values), --profile llava (full values "
            "beyond the base's rows), --profile alpaca (new rows over the mean)",
        )
    if dtype is DType.F32:
        named = next((profile for word, profile in _BY_NAME if word in hint), "alpaca")
        return _detection(named, seen, "vicuna-v0 (new rows over zero)")
    return _detection("vicuna-v0", seen, "knowlm (half-precision Alpaca recipe: new rows over the mean)")


def _detection(name: str, reason: str, *alternatives: str) -> Detection:
    return Detection(find_profile(name), reason, alternatives)


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the input embedding, else `vocab_size` of the config; None if both are unknown."""
    for glob in _EMBEDDING_GLOBS:
        for name, lazy in checkpoint.tensors.items():
            if fnmatchcase(name, glob) and len(lazy.shape) == 2:
                return lazy.spec.n_rows
    rows = checkpoint.config.get("vocab_size")
    return rows if isinstance(rows, int) else None


def main_dtype(checkpoint: Checkpoint) -> DType | None:
    """The dtype that most float elements have; None without any."""
    counts: Counter[DType] = Counter()
    for spec, n in checkpoint.spec_counts.items():
        counts[spec.dtype] += n * spec.numel if spec.dtype.is_float else 0
    counts = +counts
    return counts.most_common(1)[0][0] if counts else None


def model_sum(files: Mapping[str, Any]) -> float | None:
    """The expected sum that an AlpacaFarm delta carries in model_sum.txt."""
    if "model_sum.txt" not in files:
        return None
    try:
        return float(files["model_sum.txt"].read().decode("utf-8", "replace").strip())
    except ValueError:
        return None
