"""GPTQ and AWQ layers as GPTQModel and AutoAWQ packed them (tests/golden/packed/record.py), restored bit for bit."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llmkit.errors import InputError, SpecError
from llmkit.quantization.codec import StoredFolder
from llmkit.quantization.codecs.awq import CODEC as AWQ
from llmkit.quantization.codecs.gptq import CODEC, CODEC_V2
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import pack, pack_words
from llmkit.tensors.lazy import Context
from llmkit.tensors.spec import DType
from tests.quantization.lazies import held, zeros_on

HOME = Path(__file__).parents[1] / "golden" / "packed"


def recorded(name: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """The layers of a file, by their keys, and digests."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(HOME / f"{name}.safetensors", "pt") as file:
        for full in file.keys():  # noqa: SIM118 - no mapping
            key, end = full.split(".")
            layers.setdefault(key, {})[end] = file.get_tensor(full)
        return layers, file.metadata()


GPTQ_LAYERS, GPTQ_DIGESTS = recorded("gptq")
AWQ_LAYERS, AWQ_DIGESTS = recorded("awq")


def digest(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()


def entry_of(key: str) -> dict[str, object]:
    return {"sym": key.startswith("sym"), "checkpoint_format": "gptq_v2" if key.endswith("v2") else "gptq"}


@pytest.mark.parametrize("key", GPTQ_LAYERS)
def test_gptq_is_what_gptqmodel_restores(key):
    """Also zero points of 0, which its first version takes from whole words."""
    stored = GPTQ_LAYERS[key]
    matrix = CODEC.read({end: held(part) for end, part in stored.items()}, entry_of(key), None)
    floats = matrix.dequantized()
    assert digest(floats.load()) == GPTQ_DIGESTS[key]
    sliced = [Context().rows(floats, rows) for rows in ((0, 5), (5, 32))]
    assert torch.equal(torch.cat(sliced), floats.load())
    assert (matrix.order is not None) == key.startswith("act")
    if not key.startswith("act") and key.endswith("v1"):  # as of April 2023
        plain = {end: held(part) for end, part in stored.items() if end != "g_idx"}
        assert digest(CODEC.read(plain, {}, None).dequantized().load()) == GPTQ_DIGESTS[key]


@pytest.mark.parametrize("key", [key for key in GPTQ_LAYERS if key.endswith("v2") or key.startswith("sym")])
def test_gptq_is_written_as_gptqmodel_does(key):
    stored = GPTQ_LAYERS[key]
    codec = CODEC_V2 if key.endswith("v2") else CODEC
    matrix = codec.read({end: held(part) for end, part in stored.items()}, entry_of(key), None)
    assert codec.refuses(matrix) is None
    written = codec.write(matrix)
    assert set(written) == set(stored)
    assert all(torch.equal(written[end].load(), part) for end, part in stored.items())


@pytest.mark.parametrize("group", [32, 64])
def test_awq_is_what_autoawq_restores(group):
    for form in ("gemm", "gemv", "gemv_fast"):
        stored = AWQ_LAYERS[f"{form}{group}"]
        matrix = AWQ.read({end: held(part) for end, part in stored.items()}, {"group_size": group}, None)
        floats = matrix.dequantized()
        if form == "gemv_fast":  # - scale * zero is rounded to float16
            gemm = AWQ.read({e: held(p) for e, p in AWQ_LAYERS[f"gemm{group}"].items()}, {}, None)
            assert torch.equal(matrix.codes.load(), gemm.codes.load())
            assert torch.allclose(floats.load().float(), gemm.dequantized().load().float(), atol=2e-3)
        else:
            assert digest(floats.load()) == AWQ_DIGESTS[str(group)]
        assert torch.equal(Context().rows(floats, (3, 8)), floats.load()[3:8])
    stored = AWQ_LAYERS[f"gemm{group}"]
    written = AWQ.write(AWQ.read({end: held(part) for end, part in stored.items()}, {}, None))
    assert all(torch.equal(written[end].load(), part) for end, part in stored.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_files_of_march_2023(bits):
    """Float zeros, which are zero points times scales; the original multiplies codes by scales and takes them away."""
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 1 << bits, (32, 64), dtype=torch.uint8, generator=generator)
    scales, points = torch.rand(32, 1, generator=generator) + 0.1, torch.randint(0, 1 << bits, (32, 1))
    zeros = scales * points
    parts = {"qweight": held(pack_words(q, bits).t().contiguous()), "zeros": held(zeros), "scales": held(scales)}
    for settings, shape in (({}, (32, 64)), ({"bits": bits}, None)):
        assert torch.equal(CODEC.read(parts, settings, shape).dequantized().load(), q.float() * scales - zeros)
    with pytest.raises(SpecError, match="its bits are not stored"):
        CODEC.read(parts, {}, None)


def test_what_the_tensors_say_against_the_config():
    stored = {end: held(part) for end, part in GPTQ_LAYERS["asym4v1"].items()}
    for version, other in (("gptq", '"gptq_v2", if they are not'), ("gptq_v2", '"gptq", if they are')):
        with pytest.raises(InputError, match="says that the grid is symmetric") as error:
            CODEC.read(stored, {"sym": True, "checkpoint_format": version}, None).dequantized().load()
        assert f'"checkpoint_format": {other} stored minus 1' in error.value.hint
    beyond = stored | {"g_idx": held(torch.full((64,), 4, dtype=torch.int32))}
    with pytest.raises(SpecError, match="g_idx has groups 4 to 4; expected 0 to 3"):
        CODEC.read(beyond, {}, None)
    unwritten = stored | {"g_idx": held(torch.zeros(64, dtype=torch.int32))}  # as it is before anything is loaded
    with pytest.raises(SpecError, match="g_idx puts all 64 columns into group 0 of 4"):
        CODEC.read(unwritten, {}, None)
    for end, bad in {"qzeros": (4, 7), "scales": (3, 32), "qweight": (8, 31)}.items():
        dtype = torch.float16 if end == "scales" else torch.int32
        with pytest.raises(SpecError, match="no grid for"):
            CODEC.read(stored | {end: held(torch.zeros(bad, dtype=dtype))}, {}, None)


def test_no_groups_at_all():
    """A damaged file, which must be refused and not divide by zero."""
    stored = {end: held(part) for end, part in GPTQ_LAYERS["asym4v1"].items()}
    empty = {"scales": held(torch.zeros(0, 32).half()), "qzeros": held(torch.zeros(0, 4, dtype=torch.int32))}
    with pytest.raises(SpecError, match="expected floats"):
        CODEC.read(stored | empty, {}, None)


def test_a_zero_point_that_the_first_version_cannot_hold_is_an_error():
    points = torch.tensor([[0, 3]] * 32, dtype=torch.uint8)
    codes = held(pack(torch.zeros(32, 64, dtype=torch.uint8), 4))
    matrix = QuantizedMatrix(Grid(4, 32, False), (32, 64), codes, held(torch.ones(32, 2).half()), held(points))
    with pytest.raises(InputError, match="zero point 0") as caught:
        CODEC.write(matrix)["qzeros"].load()
    assert "gptq_v2" in caught.value.hint
    assert CODEC_V2.write(matrix)["qzeros"].load()[:, 0].tolist() == [0, 0x33333333]
    wide = QuantizedMatrix(Grid(4, 32), (32, 64), codes, held(torch.ones(32, 2)))
    assert CODEC.refuses(wide) == "gptq has no scales in float32"
    assert wide.dequantized(DType.F16).load().shape == (32, 64)


@pytest.mark.parametrize(("codec", "bits", "symmetric"), [(CODEC, 4, True), (CODEC, 8, True), (AWQ, 4, False)])
@pytest.mark.parametrize("group", [32, None])
def test_what_vllm_makes_room_for(codec, bits, symmetric, group):
    """Names, shapes and dtypes of the parameters that its loader fills, and the keys of the entry that it reads.

    `AutoGPTQLinearMethod.create_weights` and `AutoGPTQConfig.from_config` of vllm-project/vllm@055e47c2,
    vllm/model_executor/layers/quantization/auto_gptq.py, whose kernels take symmetric grids of 4 and 8 bits (TYPE_MAP);
    `AutoAWQMarlinLinearMethod.create_weights` and `AutoAWQConfig.from_config` of auto_awq.py at 0043d6b5.
    """
    n_in, n_out, n_groups = 128, 64, 128 // (group or 128)
    grid, pack_factor = Grid(bits, group, symmetric), 32 // bits
    zeros = None if symmetric else held(torch.full((n_out, n_groups), 3, dtype=torch.uint8))
    codes = held(pack(torch.zeros(n_out, n_in, dtype=torch.uint8), bits))
    matrix = QuantizedMatrix(grid, (n_out, n_in), codes, held(torch.ones(n_out, n_groups).half()), zeros)
    assert codec.refuses(matrix) is None
    found = {end: (part.load().dtype, tuple(part.shape)) for end, part in codec.write(matrix).items()}
    words = (n_in // pack_factor, n_out) if codec is CODEC else (n_in, n_out // pack_factor)
    wanted = {
        "qweight": (torch.int32, words),
        "qzeros": (torch.int32, (n_groups, n_out // pack_factor)),
        "scales": (torch.float16, (n_groups, n_out)),
    }
    assert found == (wanted | {"g_idx": (torch.int32, (n_in,))} if codec is CODEC else wanted)
    entry = codec.describe({"model.layers.0.a": matrix}, ["lm_head"], are_all=True)
    assert (entry["bits"], entry["group_size"]) == (bits, group or -1)
    if codec is CODEC:
        assert (entry["sym"], entry["desc_act"], entry["lm_head"]) == (True, False, False)
        ((skipped, override),) = entry["dynamic"].items()  # a match with an empty override leaves the module in floats
        assert re.match(skipped.removeprefix("-:"), "lm_head")
        assert not override
    else:
        assert (entry["zero_point"], entry["modules_to_not_convert"]) == (True, ["lm_head"])


@pytest.mark.parametrize(
    ("floats", "listed"),
    [
        (["lm_head"], None),
        (["m.0.mlp.gate", "lm_head"], ["q_proj", "gate_proj"]),
        (["m.1.attn.q_proj"], ["m.0.attn.q_proj", "m.0.mlp.gate_proj"]),
        (["m.0.mlp.shared.gate_proj"], ["attn.q_proj", "mlp.gate_proj"]),
    ],
)
def test_gptq_lists_what_is_quantized_by_the_shortest_names_that_tell(floats, listed):
    """Optimum goes by the ends of names, vLLM by any part of them."""
    matrices = dict.fromkeys(["m.0.attn.q_proj", "m.0.mlp.gate_proj"], zeros_on(Grid(4, 32)))
    entry = CODEC.describe(matrices, floats, are_all=True)
    assert (entry["block_name_to_quantize"], entry.get("modules_in_block_to_quantize")) == ("m", listed and [listed])


def test_a_name_in_that_of_a_quantized_module_is_refused_for_awq():
    """Loaders of AWQ look for the names of floats anywhere in a name."""
    matrices = {"m.0.mlp.gate_proj": zeros_on(Grid(4, 32))}
    assert AWQ.describe(matrices, ["m.0.mlp.router"], are_all=True)["modules_to_not_convert"] == ["m.0.mlp.router"]
    with pytest.raises(
        SpecError, match=r"^m\.0\.mlp\.gate stays in floats, and loaders of AWQ then leave out m\.0\.mlp"
    ):
        AWQ.describe(matrices, ["m.0.mlp.gate"], are_all=True)


def test_matrices_of_other_grids_have_rules_of_their_own():
    """`dynamic` of GPTQModel: the most frequent kind stands in the entry, each other module by an anchored pattern."""
    kinds = {"a.0": Grid(4, 32), "a.1": Grid(4, 32), "b.2": Grid(8, None)}
    matrices = {module: zeros_on(grid) for module, grid in kinds.items()}
    matrices["c"] = zeros_on(Grid(4, 32), order=held(torch.zeros(32, dtype=torch.int32)))
    entry = CODEC.describe(matrices, [], are_all=True)
    assert (entry["bits"], entry["group_size"], entry["desc_act"]) == (4, 32, False)
    assert entry["dynamic"] == {
        r"+:^b\.2$": {"bits": 8, "group_size": -1, "sym": True, "desc_act": False},
        "+:^c$": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    }
    with pytest.raises(SpecError, match="awq has one group size for all matrices"):
        AWQ.describe({"a": zeros_on(Grid(4, 32)), "b": zeros_on(Grid(4))}, [], are_all=True)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"bits": 4, "group_size": 32}, None),
        ({}, None),
        ({"bits": 8, "group_size": 32, "dynamic": {r"+:^m$": {"bits": 4}}}, None),
        ({"bits": 8, "group_size": 32}, "bits 8, group_size 32, and the shapes of m say 4 bits in groups of 32"),
        ({"bits": 4, "group_size": -1}, "bits 4, group_size -1, and the shapes of m"),
        ({"bits": 4, "group_size": 32, "dynamic": {"+:n": {"bits": 8}, "-:o": {}}}, None),
    ],
)
def test_bits_and_groups_of_the_config_that_contradict_shapes_are_said(entry, says):
    parts = {f"m.{end}": held(part) for end, part in GPTQ_LAYERS["asym4v1"].items()}  # 64 inputs, groups of 16
    parts |= {
        "m.scales": held(torch.ones(2, 32).half()), "m.qzeros": held(torch.zeros(2, 4, dtype=torch.int32)),
    }  # fmt: skip
    warnings = CODEC.warnings(StoredFolder("q", parts, {"quantization_config": {"quant_method": "gptq", **entry}}))
    assert [says is not None and says in warning for warning in warnings] == [True] * (says is not None)
