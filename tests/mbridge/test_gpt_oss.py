"""gpt-oss: fused, interleaved experts with biases, sinks, windows and yarn: layouts, real ranks, logits, refusals.

The reference shards are written out from the definition by plain loops, as in reference.py, whose functions are used
for what gpt-oss has in common with other models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mbridge.errors import CheckpointError, ConfigError, PlanError, TopologyError, UnsupportedConfigError
from mbridge.families import find_family
from mbridge.hf_config import normalise
from mbridge.pieces import Box, Piece, Region, TensorSpec, join
from mbridge.plan import Table, check_owned, stored_by
from mbridge.spelling import Spelling
from mbridge.topology import Coordinates, Topology
from tests.mbridge.moe_reference import Place, place_of
from tests.mbridge.reference import gate_up, padded_vocab, qkv, row_parallel, vocabulary
from tests.mbridge.test_bridge_ranks import logits_of, read_all, scramble, tensor_problems

YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False,
    "original_max_position_embeddings": 512,
}  # fmt: skip
LENGTH = 80


@dataclass(frozen=True)
class Model:
    """Sizes of a small gpt-oss, no two of which could be confused."""

    layers: int = 3
    hidden: int = 24
    ffn: int = 20
    num_experts: int = 8
    heads: int = 4
    groups: int = 2
    head_dim: int = 8
    vocab: int = 67
    tied: bool = False

    def config(self, **more: Any) -> dict[str, Any]:
        """config.json with the fields of the released ones, every special value away from its default."""
        return {
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "experts_per_token": 3,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initial_context_length": 512,
            "initializer_range": 0.02,
            "intermediate_size": self.ffn,
            "layer_types": [["full_attention", "sliding_attention"][n % 2] for n in range(self.layers)],
            "max_position_embeddings": 2048,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 3,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.groups,
            "num_local_experts": self.num_experts,
            "output_router_logits": False,
            "rms_norm_eps": 1e-3,
            "rope_scaling": dict(YARN),  # transformers writes into it
            "rope_theta": 5000.0,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 7,
            "swiglu_limit": 0.8,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
            "use_cache": True,
            "vocab_size": self.vocab,
            **more,
        }

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, ffn, num = self.hidden, self.ffn, self.num_experts
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes[at + "input_layernorm.weight"] = (hidden,)
            for letter, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
                shapes[at + f"self_attn.{letter}_proj.weight"] = (heads * self.head_dim, hidden)
                shapes[at + f"self_attn.{letter}_proj.bias"] = (heads * self.head_dim,)
            shapes[at + "self_attn.o_proj.weight"] = (hidden, self.heads * self.head_dim)
            shapes[at + "self_attn.o_proj.bias"] = (hidden,)
            shapes[at + "self_attn.sinks"] = (self.heads,)
            shapes[at + "post_attention_layernorm.weight"] = (hidden,)
            shapes[at + "mlp.router.weight"] = (num, hidden)
            shapes[at + "mlp.router.bias"] = (num,)
            shapes[at + "mlp.experts.gate_up_proj"] = (num, hidden, 2 * ffn)
            shapes[at + "mlp.experts.gate_up_proj_bias"] = (num, 2 * ffn)
            shapes[at + "mlp.experts.down_proj"] = (num, ffn, hidden)
            shapes[at + "mlp.experts.down_proj_bias"] = (num, hidden)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, hidden)
        return shapes

    def coded(self, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
        """Every tensor filled with integers, none of which occurs twice."""
        tensors, first = {}, 1
        for name, shape in self.hf_shapes().items():
            tensors[name] = torch.arange(first, first + math.prod(shape)).to(dtype).reshape(shape)
            first += math.prod(shape)
        assert first < 2**24
        return tensors


def local_tensors(
    model: Model,
    hf: dict[str, torch.Tensor],
    place: Place,
    *,
    naming: str,
    grouped: bool,
    layers: Sequence[int] | None = None,
    first: bool = True,
    last: bool = True,
) -> dict[str, torch.Tensor]:
    """All that a rank of a stage holds, under names with global layer numbers."""
    tp, size = place.tp, place.tp_size
    padded = padded_vocab(model.vocab, size)
    out = {}
    if first:
        out["embedding.word_embeddings.weight"] = vocabulary(hf["model.embed_tokens.weight"], tp, size, padded)
    for layer in range(model.layers) if layers is None else layers:
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        norm = "self_attention.linear_qkv.layer_norm_weight" if naming == "te" else "input_layernorm.weight"
        out[ours + norm] = hf[theirs + "input_layernorm.weight"]
        out[ours + "pre_mlp_layernorm.weight"] = hf[theirs + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            q, k, v = (hf[f"{theirs}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
            out[f"{ours}self_attention.linear_qkv.{kind}"] = qkv(model, q, k, v, tp, size)  # type: ignore[arg-type]
            out[f"{ours}mlp.router.{kind}"] = hf[f"{theirs}mlp.router.{kind}"]
        out[ours + "self_attention.linear_proj.weight"] = row_parallel(hf[theirs + "self_attn.o_proj.weight"], tp, size)
        out[ours + "self_attention.linear_proj.bias"] = hf[theirs + "self_attn.o_proj.bias"]
        share = model.heads // size
        sinks = [hf[theirs + "self_attn.sinks"][tp * share + head] for head in range(share)]
        out[ours + "self_attention.core_attention.softmax_offset"] = torch.stack(sinks)
        num_local = model.num_experts // place.ep_size
        for i in range(num_local):
            for name, tensor in expert(model, hf, theirs, place.ep * num_local + i, place).items():
                linear, _, kind = name.partition(".")
                at = ours + "mlp.experts."
                out[f"{at}{name}{i}" if grouped else f"{at}local_experts.{i}.{linear}.{kind}"] = tensor
    if last:
        out["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not model.tied or not first:
            head = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
            out["output_layer.weight"] = vocabulary(hf[head], tp, size, padded)
    return out


def expert(
    model: Model, hf: dict[str, torch.Tensor], theirs: str, number: int, place: Place
) -> dict[str, torch.Tensor]:
    """One expert's parameters. Its gate is in the even columns, its up in the odd ones."""
    fused, bias = hf[theirs + "mlp.experts.gate_up_proj"][number], hf[theirs + "mlp.experts.gate_up_proj_bias"][number]
    gate, up = (torch.stack([fused[:, 2 * i + odd] for i in range(model.ffn)]) for odd in (0, 1))
    gate_bias, up_bias = (torch.stack([bias[2 * i + odd] for i in range(model.ffn)]) for odd in (0, 1))
    down = hf[theirs + "mlp.experts.down_proj"][number].t()
    return {
        "linear_fc1.weight": gate_up(gate, up, place.etp, place.etp_size),
        "linear_fc1.bias": gate_up(gate_bias, up_bias, place.etp, place.etp_size),
        "linear_fc2.weight": row_parallel(down, place.etp, place.etp_size),
        "linear_fc2.bias": hf[theirs + "mlp.experts.down_proj_bias"][number],
    }


def table_and_spelling(model: Model, dtype: torch.dtype = torch.int64) -> tuple[Table, Spelling]:
    family, config = find_family("gpt_oss"), normalise(model.config())
    table = Table(family.rows(config), model.layers, dtype)
    return table, Spelling.of(table, family.fused_experts(config), family.duplicates(config), {})


# ---- layouts, without processes

GRIDS = [(tp, ep, etp) for tp in (1, 2, 4) for ep in (1, 2, 4) for etp in (1, 2)]
STAGES: dict[str, list[list[int]]] = {"PP1": [[0, 1, 2]], "PP2 uneven": [[0], [1, 2]]}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize(("naming", "grouped"), [("te", True), ("te", False), ("local", False)])
@pytest.mark.parametrize(("tp", "ep", "etp"), GRIDS, ids=[f"TP{t} EP{e} ETP{x}" for t, e, x in GRIDS])
def test_every_rank_holds_the_reference_shards(
    tp: int, ep: int, etp: int, naming: str, grouped: bool, stages: str, tied: bool
) -> None:
    """Loading gives each rank the reference; what the ranks own makes up each HF tensor, each element once."""
    model = Model(tied=tied)
    hf = model.coded()
    table, spelling = table_and_spelling(model)
    size = max(tp, ep * etp)
    topology = Topology(tp=tp, pp=len(STAGES[stages]), ep=ep, etp=etp, dp=size // tp)
    rebuilt = {name: torch.full_like(tensor, -1) for name, tensor in hf.items()}
    owned: list[list[Piece]] = []
    for pp, layers in enumerate(STAGES[stages]):
        for rank in range(size):
            place = place_of(rank, tp, ep, etp)
            reference = local_tensors(
                model, hf, place, naming=naming, grouped=grouped, layers=layers,
                first=pp == 0, last=pp == topology.pp - 1,
            )  # fmt: skip
            specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in reference.items()]
            at = Coordinates(tp=place.tp, pp=pp, dp=rank // tp, etp=place.etp, ep=place.ep, edp=rank // (etp * ep))
            stored = stored_by(table, topology, at, specs)
            loaded = {name: torch.full_like(tensor, -1).contiguous() for name, tensor in reference.items()}
            for piece in spelling.pieces(stored.pieces, with_copies=False):
                piece.region.of(loaded[piece.local_name]).copy_(piece.box.of(hf[piece.hf_name]))
            for name, region in stored.padding:
                region.of(loaded[name]).zero_()
            assert [name for name, tensor in reference.items() if not torch.equal(loaded[name], tensor)] == []
            owned.append(spelling.pieces(stored.owned, with_copies=True))
            for piece in owned[-1]:
                piece.box.of(rebuilt[piece.hf_name]).copy_(piece.region.of(reference[piece.local_name].contiguous()))
    assert [name for name, tensor in hf.items() if not torch.equal(rebuilt[name], tensor)] == []
    specs = [spec for group in spelling.groups(table.groups()) for spec in group]
    assert {spec.name: spec.shape for spec in specs} == model.hf_shapes()
    check_owned(specs, owned)
    with pytest.raises(PlanError, match="pieces cover"):
        check_owned(specs, [[piece for piece in owned[0] if "gate_up" not in piece.hf_name], *owned[1:]])


def test_interleaved_pieces_join_with_plain_rows() -> None:
    """A refit's buckets know nothing of the unfolded view: they hold rows of the fused tensor."""
    fused = torch.arange(3 * 5 * 8).view(3, 5, 8)
    sources = {f"{part}{e}": fused[e, :, part::2].t().contiguous() for e in range(3) for part in (0, 1)}
    pieces = [
        Piece("t", Box((e, 0, 0, part), (e + 1, 5, 4, part + 1)), f"{part}{e}", Region(0, (1, 5, 4, 1), (0, 1, 5, 0)))
        for e in range(3)
        for part in (0, 1)
    ]
    parts = {"one": Box((0, 0, 0), (2, 5, 8)), "two": Box((2, 0, 0), (3, 5, 4)), "three": Box((2, 0, 4), (3, 5, 8))}
    plain = [Piece("t", box, name, Region.contiguous(box.shape)) for name, box in parts.items()]
    arrived = {name: torch.full(box.shape, -1) for name, box in parts.items()}
    for copy in join(pieces, plain):
        copy.destination.of(arrived[copy.destination_name]).copy_(copy.source.of(sources[copy.source_name]))
    assert all(torch.equal(arrived[name], box.of(fused)) for name, box in parts.items())
    back = {name: torch.full_like(tensor, -1) for name, tensor in sources.items()}
    for copy in join(plain, pieces):
        copy.destination.of(back[copy.destination_name]).copy_(copy.source.of(arrived[copy.source_name]))
    assert all(torch.equal(back[name], tensor) for name, tensor in sources.items())


def test_a_part_that_ends_between_a_gate_and_its_up_is_refused() -> None:
    piece = Piece("t", Box((0, 0, 0), (1, 4, 1)), "gate", Region.contiguous((1, 4, 1)))
    odd = Piece("t", Box((0, 0), (1, 3)), "x", Region.contiguous((1, 3)))
    with pytest.raises(PlanError, match=r"\[0:1, 0:3\] parts what alternates"):
        list(join([piece], [odd]))


# ---- real models


def write_transformers(model: Model, folder: Path, **config: Any) -> torch.Tensor:
    """A checkpoint that transformers wrote, in several files; returns its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**model.config(**config)), attn_implementation="eager", dtype=torch.float32
        ).eval()
        for name, parameter in theirs.named_parameters():
            parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.25)
            if name.endswith("sinks"):
                parameter.data.add_(1.0)
    theirs.save_pretrained(folder, max_shard_size="60KB")
    with torch.no_grad():
        logits: torch.Tensor = theirs(tokens(model)).logits
    return logits


def tokens(model: Model) -> torch.Tensor:
    return torch.randint(0, model.vocab, (2, LENGTH), generator=torch.Generator().manual_seed(11))


MODEL = Model(layers=4, hidden=32, head_dim=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whether it is tied -> (folder, transformers' logits); made once each."""

    @cache
    def made(tied: bool) -> tuple[Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp("gpt_oss")
        return folder, write_transformers(Model(layers=4, hidden=32, head_dim=16, tied=tied), folder)

    return made


def on_rank(*, path: str, tied: bool, topology: dict[str, int], save_to: str) -> dict[str, Any]:
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    model = Model(layers=4, hidden=32, head_dim=16, tied=tied)
    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model()
    scramble(chunks)
    num_bytes = bridge.load_weights(chunks, path)
    original = read_all(Path(path))
    sizes, at = read_topology()
    held = bridge.local_tensors(chunks)
    layers = sorted({int(name.split(".")[2]) for name in held if name.startswith("decoder.layers.")})
    reference = local_tensors(
        model, original, Place(at.tp, sizes.tp, at.ep, sizes.ep, at.etp, sizes.expert_tp), naming="local",
        grouped=False, layers=layers, first=at.pp == 0, last=at.pp == sizes.pp - 1,
    )  # fmt: skip
    problems = tensor_problems("local", held, reference)
    problems += tensor_problems("export_weights", dict(bridge.export_weights(chunks)), original)
    for bucket in bridge.export_buckets(chunks, bucket_bytes=20_000):
        problems += tensor_problems("export_buckets", dict(bucket.tensors), {n: original[n] for n, _ in bucket.tensors})
    bridge.save_weights(chunks, save_to)
    plan = bridge.plan(chunks)
    return {
        "problems": problems,
        "num_bytes": num_bytes,
        "own_bytes": sum(tensor.nbytes for tensor in held.values()),
        "plan": plan,
        "tp": at.tp,
        "logits": logits_of(chunks, tokens(model)),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "topology"),
    [
        (1, {}),
        (2, {"ep": 2}),
        (2, {"pp": 2}),
        (2, {"tp": 2, "etp": 1}),
        (4, {"tp": 2, "ep": 2, "etp": 1, "pp": 2, "vpp": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_load_export_save_and_logits(
    ranks: Any, checkpoint: Any, tmp_path: Path, num_ranks: int, topology: dict[str, int], tied: bool
) -> None:
    folder, expected = checkpoint(tied)
    results = ranks.run(
        on_rank, num_ranks, path=str(folder), tied=tied, topology=topology, save_to=str(tmp_path / "saved")
    )
    original = read_all(folder)
    assert [problem for result in results for problem in result["problems"]] == []
    assert all(result["num_bytes"] <= result["own_bytes"] for result in results)  # gate and up by one read
    assert tensor_problems("saved", read_all(tmp_path / "saved"), original) == []
    assert (tmp_path / "saved/config.json").read_text() != ""
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads((folder / "config.json").read_text())

    # The plan for an engine speaks of the fused tensors, and its pieces make them up.
    plans = [result["plan"] for result in results]
    assert {spec.name: list(spec.shape) for spec in plans[0].tensors} == {n: list(t.shape) for n, t in original.items()}
    assert len({plan.digest for plan in plans}) == 1
    check_owned(plans[0].tensors, [plan.owned for plan in plans])

    made = [result["logits"] for result in results if result["logits"] is not None]
    tp = topology.get("tp", 1)
    # Ranks of one tensor-parallel group follow each other.
    for start in range(0, len(made), tp):
        logits = torch.cat(made[start : start + tp], dim=-1)[..., : MODEL.vocab]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 8},
        {"layer_types": ["full_attention"] * 4},
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
        {"swiglu_limit": 7.0},
        {"rope_scaling": {**YARN, "truncate": True}},
        {"rope_scaling": {**YARN, "factor": 3.0}},
        {"rope_scaling": {**YARN, "beta_fast": 32.0}},
        {"rope_theta": 10000.0},
        {"rms_norm_eps": 1e-5},
    ],
    ids=str,
)
def test_a_wrong_config_value_would_show_in_the_logits(checkpoint: Any, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, expected = checkpoint(False)
    config = AutoConfig.for_model(**MODEL.config(**changes))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        changed = theirs(tokens(MODEL)).logits
    assert float((changed - expected).abs().max()) > 20 * 1e-4


def other_ropes(*, folders: list[str]) -> list[torch.Tensor | None]:
    from mbridge import AutoBridge, init_parallel

    init_parallel()
    bridges = [AutoBridge.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    return [logits_of(bridge.get_model(bridge.path), tokens(MODEL)) for bridge in bridges]


@pytest.mark.slow
def test_other_ropes_and_windows(ranks: Any, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {"rope_scaling": {**YARN, "truncate": True}},
        {"rope_scaling": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.7}},
        {"rope_scaling": {**YARN, "mscale": 1.3}},  # which has no effect alone
        {"layer_types": ["full_attention"] * 4},
    ]
    folders = [tmp_path / str(number) for number in range(len(variants))]
    expected = [write_transformers(MODEL, folder, **fields) for folder, fields in zip(folders, variants, strict=True)]
    (found,) = ranks.run(other_ropes, 1, folders=[str(folder) for folder in folders])
    for logits, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(logits[..., : MODEL.vocab], theirs, atol=1e-4, rtol=0)


# ---- refusals


def etp2(*, path: str) -> str:
    from mbridge import AutoBridge, init_parallel

    init_parallel(tp=2)
    try:
        AutoBridge.from_pretrained(path).get_model()
    except TopologyError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.slow
def test_expert_tensor_parallelism_is_refused(ranks: Any, checkpoint: Any) -> None:
    for said in ranks.run(etp2, 2, path=str(checkpoint(False)[0])):
        assert "etp=2 must be 1: Megatron-Core has expert biases only without expert TP" in said


REFUSED: dict[str, tuple[type[ConfigError], dict[str, Any]]] = {
    "attention_bias = False": (UnsupportedConfigError, {"attention_bias": False}),
    "swiglu_alpha = 1.5": (UnsupportedConfigError, {"swiglu_alpha": 1.5}),
    "experts_per_token = 4": (UnsupportedConfigError, {"experts_per_token": 4}),
    "chunked_attention": (UnsupportedConfigError, {"layer_types": ["chunked_attention"] * 3}),
    "attention_factor": (UnsupportedConfigError, {"rope_scaling": {**YARN, "attention_factor": 1.2}}),
    "rope type 'longrope'": (UnsupportedConfigError, {"rope_scaling": {"rope_type": "longrope"}}),
    "rope type 'default'": (UnsupportedConfigError, {"rope_scaling": None}),
    "yarn rope needs factor": (ConfigError, {"rope_scaling": {**YARN, "factor": None}}),
    "layer_types has 2 entries for 3 layers": (ConfigError, {"layer_types": ["full_attention"] * 2}),
    "sliding_window = None": (ConfigError, {"sliding_window": None}),
    "quantization_config": (UnsupportedConfigError, {"quantization_config": {"quant_method": "awq"}}),
    "num_experts_per_tok = 1": (UnsupportedConfigError, {"num_experts_per_tok": 1, "experts_per_token": 1}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message: str) -> None:
    from mbridge import AutoBridge

    error, changes = REFUSED[message]
    with pytest.raises(error) as caught:
        AutoBridge.from_config(Model().config(**changes))
    assert type(caught.value) is error and message in str(caught.value)


def test_without_files_the_tensors_are_the_fused_ones() -> None:
    from mbridge import AutoBridge

    assert "gpt_oss" in AutoBridge.list_supported_models()
    specs = AutoBridge.from_config(Model().config()).hf_tensors()
    assert {spec.name: spec.shape for spec in specs} == Model().hf_shapes()


def load_mxfp4(*, path: str) -> str:
    from mbridge import AutoBridge, init_parallel

    init_parallel()
    bridge = AutoBridge.from_pretrained(path)
    chunks = bridge.get_model()
    try:
        bridge.load_weights(chunks, path)
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.slow
def test_mxfp4_files_are_one_error(ranks: Any, tmp_path: Path) -> None:
    """The released files: a config that says so, and two tensors in the place of each expert tensor."""
    model = Model()
    config = model.config(quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = model.coded(torch.float32)
    for layer in range(model.layers):
        for name, rows, columns in (("gate_up_proj", 2 * model.ffn, 32), ("down_proj", model.hidden, 32)):
            at = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[at]
            tensors[at + "_blocks"] = torch.zeros(model.num_experts, rows, columns // 32, 16, dtype=torch.uint8)
            tensors[at + "_scales"] = torch.zeros(model.num_experts, rows, columns // 32, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (said,) = ranks.run(load_mxfp4, 1, path=str(tmp_path))
    assert "6 tensors are in MXFP4, which is not read" in said
    assert "Mxfp4Config(dequantize=True)" in said
