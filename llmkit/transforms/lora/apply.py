"""One adapter applied to the tensors of one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.embeddings import find_embeddings
from llmkit.errors import RequirementError, SpecError, counted, listing
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_config import divisor_of, rounds_update, saved_modules
from llmkit.formats.adapter_other import FOLDED
from llmkit.quantization.method import Observe
from llmkit.quantization.quality import Meter
from llmkit.tensors.alike import Alike
from llmkit.tensors.equality import are_equal
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms.lora import arithmetic
from llmkit.transforms.lora.completeness import missing_parts
from llmkit.transforms.lora.folded import fold_bias, fold_scale, missing_biases
from llmkit.transforms.lora.names import OTHER_BASE, Paths
from llmkit.transforms.lora.parameters import Update, parameter_updates, targets_of, unwrapped
from llmkit.transforms.lora.spelling import in_base_names
from llmkit.transforms.lora.tying import plan_embeddings

_COMPARED_NBYTES = 2**25  # of a copy of the base's embedding or head; its ends first
# Buffers that old checkpoints carry and that nothing reads.
_OF_BIASES = ("lora_B.bias", "ia3_l")
_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


class Application:
    """The tensors after one adapter, and what changed besides them.

    Attributes:
        n_rows: rows of the vocabulary afterwards; None when they stay.
        unties: the head is no longer the embedding.
        config_changes: keys of config.json that follow from new tensors.
        files: of the checkpoint afterwards.
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        adapter: Adapter,
        factor: float,
        meter: Meter | None,
        prefix: str,
        force: bool,
    ) -> None:
        self.ckpt = ckpt
        adapter = in_base_names(adapter, ckpt)
        self.factor = factor
        self.meter = meter
        self._alike = Alike(self._made)
        self.prefix = prefix
        self.notes: list[str] = []
        self.config_changes: dict[str, Any] = {}
        self._embeddings = find_embeddings(ckpt)
        self._slots = ckpt.model.tensors() if ckpt.model is not None else {}
        replaced = [name.rpartition(".")[0] for name in adapter.replacements]
        self._paths = Paths(ckpt, self._embeddings, [*adapter.modules, *adapter.tokens, *replaced])
        if self._paths.note:
            self.notes.append(self._paths.note)
        layers = {name.rpartition(".")[0] for name, slot in self._slots.items() if not slot.is_optional}
        incomplete = missing_parts(adapter, self._paths, self._embeddings, layers or self._paths.modules, force=force)
        plan = plan_embeddings(ckpt, adapter, self._embeddings, self._paths, force=force)
        self.adapter, self.tensors, self.files = plan.adapter, plan.tensors, plan.files
        self._has_targets = bool(self.adapter.config.get("target_parameters"))
        self.n_rows, self.unties = plan.n_rows, plan.unties
        self.notes += plan.notes
        self.warnings = [*incomplete, *plan.warnings]

    def run(self) -> dict[str, Lazy]:
        """Everything the adapter does: whole tensors first, then trained rows, then updates.

        Raises:
            SpecError: a tensor of the adapter has no place in the base, or does not fit.
        """
        self._replace()
        for module, (ids, rows) in self.adapter.tokens.items():
            self._replace_rows(module, ids, rows)
        changed = 0
        for module, parts in self.adapter.modules.items():
            if module == unwrapped(module):  # wrappers of parameters go with their module
                self._update(module, parts)
                changed += 1
        self._check_vocabulary()
        if self.adapter.kind == FOLDED:
            self.config_changes, zeros = missing_biases(self.ckpt, self.tensors)
            self.tensors.update(zeros)
        self._summarise(changed)
        same = self.ckpt.tensors
        for name, tensor in self.tensors.items():
            if (old := same.get(name)) is not tensor and (old is None or old.spec.dtype is not tensor.spec.dtype):
                self.tensors[name] = tensor.cast(self._stored_dtype(name, tensor))
        return self.tensors

    def _stored_dtype(self, name: str, tensor: Lazy) -> DType:
        """The dtype that a tensor is stored in: what the base has."""
        if not tensor.dtype.is_float:
            return tensor.dtype
        stored = self.ckpt.tensors.get(name)
        if stored is None and self._embeddings.embed is not None:
            stored = self.ckpt.tensors[self._embeddings.embed]
        return tensor.dtype if stored is None else stored.dtype

    def _check_vocabulary(self) -> None:
        embeddings = self._embeddings
        if embeddings.embed is None or self.n_rows is None:
            return
        for name in (embeddings.embed, embeddings.head):
            if name in self.tensors and self.tensors[name].shape[0] != self.n_rows:
                raise RequirementError(
                    f"{self.adapter.label} brings {self.n_rows} rows for embedding or head alone; {name} has "
                    f"{self.tensors[name].shape[0]}, and the adapter has none for it",
                    hint="save the adapter with embedding and head (modules_to_save), or extend the base first",
                )

    # What the adapter holds, part by part.

    def _replace(self) -> None:
        named = saved_modules(self.adapter.config)
        unnamed = []
        for path, tensor in self.adapter.replacements.items():
            module, _, leaf = path.rpartition(".")
            name = f"{self._paths.module(module)}.{leaf}" if module else leaf
            if name not in self.tensors and path.endswith(_BUFFERS):
                self.notes.append(f"{path} is a buffer that nothing needs: left out")
                continue
            if name not in self.tensors:
                raise self._paths.missing(self.adapter.label, path, "the tensor")
            old = self.tensors[name]
            is_vocabulary = name in (self._embeddings.embed, self._embeddings.head)
            if old.shape[1:] != tensor.shape[1:] or (old.shape != tensor.shape and not is_vocabulary):
                raise SpecError(
                    f"{self.adapter.label}: {path} is {list(tensor.shape)}, {name} of {self.ckpt.label} "
                    f"{list(old.shape)}",
                    hint=OTHER_BASE,
                )
            if leaf != "bias" and not is_vocabulary and not any(module.endswith(m) for m in named):
                unnamed.append(path)
            # As PEFT loads it: in the base's precision, also where an update follows.
            full = tensor.cast(self._stored_dtype(name, tensor))
            # A vocabulary that grew is said elsewhere.
            is_copy = path in self.adapter.base_copies and old.shape == full.shape
            if is_copy and are_equal(full, old, _COMPARED_NBYTES) is False:
                self.warnings.append(
                    f"{self.adapter.label} holds the {name} that it was trained on, which is not that of "
                    f"{self.ckpt.label} and takes its place, as in peft: what another adapter or training changed "
                    "there is lost (the updates of several adapters of one base: llmkit lora combine)"
                )
            self.tensors[name] = full
        if unnamed and self.adapter.kind not in ("LN_TUNING", FOLDED):
            self.warnings.append(
                f"{self.adapter.label} holds {len(unnamed)} whole tensors that modules_to_save does not name; they "
                f"take the base's place, as in peft: {listing(unnamed, 3)}"
            )

    def _replace_rows(self, module: str, ids: tuple[int, ...], rows: Lazy) -> None:
        name = f"{self._paths.module(module)}.weight"
        weight = self.tensors.get(name)
        if weight is None:
            raise self._paths.missing(self.adapter.label, module, "trained rows")
        n_rows = max(weight.shape[0], self.n_rows or 0)  # rows that the vocabulary grew by are all among these
        bad = [i for i in ids if not 0 <= i < n_rows]
        if bad or rows.shape[1:] != weight.shape[1:]:
            raise SpecError(
                f"{self.adapter.label}: rows {listing(map(str, bad or ids), 3)} of width {list(rows.shape[1:])} have "
                f"no place in {name} {list(weight.shape)}",
                hint="the base needs the vocabulary that the adapter was trained with",
            )
        self.tensors[name] = arithmetic.replace_rows(weight, ids, rows)

    def _update(self, module: str, parts: Mapping[str, Lazy]) -> None:
        name = f"{self._paths.module(module)}.weight"
        weight = self.tensors.get(name)
        bare = targets_of(self.adapter.config, module) if self._has_targets and "lora_A" in parts else []
        if "weight" in bare or (bare and weight is None):
            for update in parameter_updates(self.adapter, self.tensors, module, self._paths.module(module)):
                self._update_parameter(update)
            return
        if weight is None:
            raise self._paths.missing(self.adapter.label, module, listing(parts, 3))
        if not weight.dtype.is_arithmetic:
            raise RequirementError(f"{name} is {weight.dtype.name}: adapters are merged into float weights")
        if self.meter is not None:
            self.meter.expect(self.prefix + name, weight.spec.n_rows)
        slot = self._slots.get(name)
        how = slot.is_transposed if slot is not None else name  # which other weights tell, without a plugin
        kind = (tuple(parts), self.adapter.scaling.get(module, 1.0), self._stored_dtype(name, weight), how)
        updated = self._alike(kind, (weight, *parts.values()), module, name, tuple(parts))
        self.tensors[name] = updated["weight"]
        if self.adapter.kind == FOLDED or not parts.keys().isdisjoint(_OF_BIASES):
            self._update_bias(module, name.removesuffix("weight") + "bias", parts)

    def _made(self, weight: Lazy, *given: Any) -> dict[str, Lazy]:
        """A weight with the update of its module, for `Alike`: `given` are the parts, the names and those of parts."""
        *lazies, module, name, keys = given
        observe = self.meter.observer(self.prefix + name, weight.node.n_rows) if self.meter is not None else None
        return {"weight": self._updated(module, name, weight, dict(zip(keys, lazies, strict=True)), observe)}

    def _update_parameter(self, update: Update) -> None:
        name, weight = update.name, self.tensors[update.name]
        dtype, scale = self._stored_dtype(name, weight), update.scale * self.factor
        observe = self.meter.observer(self.prefix + name, weight.node.n_rows) if self.meter is not None else None
        if len(weight.shape) == 3:
            changed = arithmetic.add_experts(
                weight, update.left, update.right, scale, dtype, name=name, observe=observe
            )
        else:
            changed = arithmetic.add_low_rank(
                weight, update.left, update.right, scale, dtype, name=name, rounds_update=True, observe=observe
            )
        self.tensors[name] = changed

    def _updated(
        self, module: str, name: str, weight: Lazy, parts: Mapping[str, Lazy], observe: Observe | None
    ) -> Lazy:
        dtype = self._stored_dtype(name, weight)
        scale = self.adapter.scaling.get(module, 1.0) * self.factor
        is_transposed = self._is_transposed(name)
        if self.adapter.kind == FOLDED:
            weight = fold_scale(weight, parts, DType.F32 if "lora_A" in parts else dtype, name)
            if "lora_A" not in parts:
                return weight
        if "ia3_l" in parts:
            return self._scaled(module, name, weight, parts["ia3_l"], dtype, observe)
        if "hada_w1_a" in parts:
            factors = [parts[p] for p in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")]
            self._fit(module, name, weight, (factors[0].shape[0], factors[1].shape[1]))
            return arithmetic.add_hadamard(weight, factors, scale, dtype, name=name, observe=observe)
        if any(p.startswith("lokr_") for p in parts):
            first, second = (self._factor(parts, f"lokr_w{i}") for i in (1, 2))
            shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
            self._fit(module, name, weight, shape)
            return arithmetic.add_kronecker(weight, first, second, scale, dtype, name=name, observe=observe)
        if "lora_embedding_A" in parts:
            left = arithmetic.transposed(parts["lora_embedding_A"])
            right = arithmetic.transposed(parts["lora_embedding_B"])
        elif "lora_A" in parts:
            left, right = parts["lora_B"], _with_singular_values(parts)
            if is_transposed:
                left, right = arithmetic.transposed(right), arithmetic.transposed(left)
        else:
            raise SpecError(f"{self.adapter.label}: {module} holds only {listing(parts)}: no update is made of that")
        self._fit(module, name, weight, (left.shape[0], right.shape[1]))
        is_embedding = "lora_embedding_A" in parts
        if (lengths := parts.get("lora_magnitude_vector")) is not None:
            by_column = is_transposed or is_embedding
            return arithmetic.add_dora(
                weight, left, right, lengths, scale, dtype, by_column=by_column, name=name, observe=observe
            )
        return arithmetic.add_low_rank(
            weight, left, right, scale, dtype, name=name, observe=observe,
            rounds_update=is_embedding or rounds_update(self.adapter.config),
            divisor=divisor_of(self.adapter.config, self.adapter.kind, right.shape[0]),
        )  # fmt: skip

    def _is_transposed(self, name: str) -> bool:
        """Whether a weight is stored [in, out]: the family says so, as the class of the layer does for PEFT.

        Without one its own shape beside its update's does; if it is square the most of the others; else the config.
        """
        slot = self._slots.get(name)
        if slot is not None:
            return slot.is_transposed
        shown = {f"{self._paths.module(m)}.weight": self._shows_transposed(m) for m in self.adapter.modules}
        votes = [vote for vote in shown.values() if vote is not None]
        shape = shown[name]
        return shape if shape is not None else 2 * sum(votes) > len(votes) if votes else self.adapter.is_transposed

    def _shows_transposed(self, module: str) -> bool | None:
        weight = self.ckpt.tensors.get(f"{self._paths.module(module)}.weight")
        parts = self.adapter.modules[module]
        if "lora_A" not in parts or "lora_B" not in parts or weight is None:
            return None
        update = (parts["lora_B"].shape[0], parts["lora_A"].shape[1])
        is_square = update[0] == update[1]
        return None if is_square or weight.shape not in (update, update[::-1]) else weight.shape != update

    def _factor(self, parts: Mapping[str, Lazy], stem: str) -> Lazy:
        return parts[stem] if stem in parts else arithmetic.product(parts[f"{stem}_a"], parts[f"{stem}_b"])

    def _scaled(
        self, module: str, name: str, weight: Lazy, factor: Lazy, dtype: DType, observe: Observe | None
    ) -> Lazy:
        """IA3: [1, in] scales the input of a feed-forward layer, [out, 1] the output of another."""
        is_input = factor.shape[0] == 1
        by_column = is_input != self._is_transposed(name)
        if factor.spec.numel != weight.shape[1 if by_column else 0]:
            self._fit(module, name, weight, tuple(max(a, b) for a, b in zip(factor.shape, weight.shape, strict=True)))
            raise SpecError(
                f"{self.adapter.label}: ia3_l of {module} has {factor.spec.numel} factors for {weight.spec}"
            )
        scale = arithmetic.scale_columns if by_column else arithmetic.scale_rows
        return scale(weight, factor, dtype, name=name, observe=observe)

    def _update_bias(self, module: str, name: str, parts: Mapping[str, Lazy]) -> None:
        bias = self.tensors.get(name)
        if self.adapter.kind == FOLDED:
            weight = self.tensors[name.removesuffix("bias") + "weight"]
            folded = fold_bias(bias, parts, self._stored_dtype(name, weight), name)
            if folded is not None:
                self.tensors[name] = folded
            return
        if "lora_B.bias" in parts:
            if bias is None:
                raise RequirementError(
                    f"{self.adapter.label}: {module} has a trained bias (lora_bias), but {self.ckpt.label} has no "
                    f"{name}",
                    hint="merge it with peft into a model class that has biases",
                )
            scale = self.adapter.scaling.get(module, 1.0) * self.factor
            dtype = self._stored_dtype(name, bias)
            self.tensors[name] = arithmetic.add_vector(bias, parts["lora_B.bias"], scale, dtype, name=name)
        if "ia3_l" in parts and parts["ia3_l"].shape[0] != 1 and bias is not None:
            self.tensors[name] = arithmetic.scale_rows(bias, parts["ia3_l"], self._stored_dtype(name, bias), name=name)

    def _fit(self, module: str, name: str, weight: Lazy, shape: tuple[int, ...]) -> None:
        if weight.shape == shape:
            return
        hint = OTHER_BASE
        if name in (self._embeddings.embed, self._embeddings.head) and weight.shape[1:] == shape[1:]:
            hint = (
                f"it was trained with {shape[0]} rows of vocabulary, {self.ckpt.label} has {weight.shape[0]}: merge "
                "the adapter that brings them first, or extend the vocabulary"
            )
        elif weight.shape == shape[::-1] and len(shape) == 2:
            hint = "the weight is stored the other way round: fan_in_fan_out of adapter_config.json is wrong"
        raise SpecError(
            f"{self.adapter.label}: the update of {module} is {list(shape)}, {name} of {self.ckpt.label} "
            f"{list(weight.shape)}",
            hint=hint,
        )

    def _summarise(self, n_changed: int) -> None:
        what = [f"{counted(n_changed, 'module')} updated"] if n_changed else []
        if self.adapter.replacements:
            what.append(f"{len(self.adapter.replacements)} tensors replaced")
        if self.adapter.tokens:
            what.append(f"{sum(len(ids) for ids, _ in self.adapter.tokens.values())} rows of tokens replaced")
        ranks = sorted(set(self.adapter.ranks.values()))
        rank = f", rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}" if ranks else ""
        self.notes.append(f"{self.adapter.label} ({self.adapter.kind.lower()}{rank}): {', '.join(what)}")


def _with_singular_values(parts: Mapping[str, Lazy]) -> Lazy:
    """A, or for AdaLoRA A with its rows times the singular values E."""
    a = parts["lora_A"]
    if "lora_E" not in parts:
        return a
    spec = TensorSpec(DType.F32, a.shape)
    return Apply("scale rows", [a, parts["lora_E"]], spec, lambda x, e: x.float() * e.float()).output()
