"""What GPTQ and AWQ have in common: `qweight`, `qzeros` and `scales` side by side, and a flat entry in config.json.

Both store matrices transposed: groups are rows, and a row of the file has one number, or one word, for each output.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from llmkit.errors import RequirementError, SpecError
from llmkit.quantization.codec import REMEDY, FolderCodec, Specs, StoredFolder, error_context, joined_experts, small
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.tensors.spec import DType, TensorSpec

_SUFFIXES = ("qweight", "qzeros", "zeros", "scales", "g_idx")


class QweightCodec(FolderCodec):
    """Tensors of the names that AutoGPTQ and AutoAWQ share.

    Attributes:
        form_key: the key of the entry that tells forms of the layout apart.
        forms: its values that are read.
    """

    form_key: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]
    scale_dtypes = (DType.F16, DType.BF16)
    holds_outer = False  # Optimum and AutoAWQ look into blocks

    def notes(self, matrices: Mapping[str, QuantizedMatrix], experts: Collection[str] = ()) -> list[str]:
        return joined_experts(matrices, experts)

    @abstractmethod
    def _words(self, qweight: TensorSpec, scales: TensorSpec | None, qzeros: TensorSpec | None) -> str | None:
        """Bits and groups in a few words, told by shapes; None for another layout."""

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        names = [name for name in specs if name.endswith(".qweight")]
        stems = (name.removesuffix("qweight") for name in names)
        shapes = Counter(
            (specs[f"{stem}qweight"], specs.get(f"{stem}scales"), specs.get(f"{stem}qzeros")) for stem in stems
        )
        words = {parts: self._words(*parts) for parts in shapes}  # of a few shapes: there may be 60,000 matrices
        if not names or next(iter(words.values())) is None:
            return None
        kinds = Counter[str]()
        for parts, n in shapes.items():
            if kind := words[parts]:
                kinds[kind] += n
        by_bits: dict[str, str] = {}  # the usual groups of each
        for kind, _ in kinds.most_common():
            by_bits.setdefault(kind.partition(" ")[0], kind)
        return ", ".join(by_bits.values()), names

    def matrices(self, stored: StoredFolder) -> tuple[dict[str, QuantizedMatrix], set[str]]:
        form = stored.entry.get(self.form_key)
        if form is not None and str(form).lower() not in self.forms:
            raise RequirementError(
                f"{stored.label}: the {self.name} {self.form_key} {str(form)[:60]!r} is not read; expected "
                f"{' or '.join(self.forms)}",
                hint=REMEDY,
            )
        modules = [name.removesuffix(".qweight") for name in stored.tensors if name.endswith(".qweight")]
        matrices, used = {}, set()
        for module in modules:
            parts, weight = stored.parts(module, _SUFFIXES), f"{module}.weight"
            used |= {f"{module}.{end}" for end in parts}
            shape = stored.shapes.get(weight, ())
            with error_context(module):
                matrices[weight] = self.read(parts, stored.entry, (shape[0], shape[1]) if len(shape) == 2 else None)
            bias = f"{module}.bias"
            is_extra = bool(stored.shapes) and bias not in stored.shapes and bias in stored.tensors
            if is_extra and not any(small(stored.tensors[bias], max_nbytes=stored.tensors[bias].spec.nbytes)):
                used.add(bias)  # GPTQ-for-LLaMa gives every layer one
        unused = [name for name in stored.tensors if name.endswith((".qzeros", ".g_idx")) and name not in used]
        if unused:
            raise SpecError(f"{stored.label}: {unused[0]} has no qweight beside it")
        return matrices, used


def group_size(n_in: int, n_groups: int, entry: Mapping[str, Any]) -> int | None:
    """Columns of a group; None for one a row. The number of groups tells, and the entry which size of several it is.

    Raises:
        SpecError: no size gives that many groups.
    """
    stated = entry.get("group_size", entry.get("q_group_size"))
    if type(stated) is int and 0 < stated <= n_in and -(-n_in // stated) == n_groups:
        return stated
    size = -(-n_in // n_groups)  # `dynamic` may give a matrix another one
    if -(-n_in // size) != n_groups:
        raise SpecError(f"{n_in} columns do not fall into {n_groups} groups")
    return size if n_groups > 1 else None
