"""Dry runs of loaders: what they use, where they write, and that nothing is written.

What is recorded is replayed box by box on real tensors, and compared with what the same loader does with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch

from mbridge.pieces import Box, Region, TensorSpec
from mbridge_rl.errors import EngineMismatchError
from mbridge_rl.recorder import DryRun, dry_run, engine_pieces, storage_key

Named = Iterable[tuple[str, torch.Tensor]]
SPECS = [TensorSpec(name, (4, 6), torch.float32) for name in ("q", "k", "v", "o")]


def test_views_and_arithmetic_keep_the_name_and_nothing_is_written() -> None:
    qkv, o = torch.full((12, 3), 7.0), torch.full((6, 4), 7.0)

    def load(named: Named) -> set[str]:
        for name, tensor in named:
            if name == "o":
                o.copy_(tensor.t().contiguous())
                continue
            shard = {"q": 0, "k": 1, "v": 2}[name]
            qkv.narrow(0, 4 * shard, 4).copy_(tensor.chunk(2, dim=1)[1].float() * 2)
        return {"qkv", "o"}

    found = dry_run(load, SPECS)
    assert found.consumed == {"q", "k", "v", "o"}
    assert found.loaded == {"qkv", "o"}
    assert found.twice == []
    assert qkv.eq(7).all()
    assert o.eq(7).all()


def test_what_is_skipped_is_not_consumed() -> None:
    target = torch.zeros(4, 6)

    def load(named: Named) -> None:
        for name, tensor in named:
            if name == "q":
                target.data.copy_(tensor)

    found = dry_run(load, SPECS)
    assert found.consumed == {"q"}
    assert found.loaded is None


def test_two_names_in_one_place() -> None:
    target = torch.zeros(4, 6)

    def load(named: Named) -> None:
        for _, tensor in named:
            target[:, :].copy_(tensor)

    assert dry_run(load, SPECS[:2]).twice == [("q", "k")]


def test_cat_and_stack_carry_all_names() -> None:
    target = torch.zeros(8, 6)

    def load(named: Named) -> None:
        target.copy_(torch.cat([tensor for _, tensor in named]))

    found = dry_run(load, SPECS[:2])
    assert found.consumed == {"q", "k"}
    assert found.twice == []  # one write of both


def test_a_scalar_that_is_read() -> None:
    def load(named: Named) -> None:
        for _, tensor in named:
            assert tensor.item() == 0

    assert dry_run(load, [TensorSpec("scale", (), torch.float32)]).consumed == {"scale"}


@pytest.mark.parametrize("shape", [(4, 5), (2, 6), (3,)])
def test_a_copy_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    def load(named: Named) -> None:
        for _, tensor in named:
            torch.zeros(shape).copy_(tensor)

    with pytest.raises(EngineMismatchError, match=r"q \[4, 6\] torch.float32") as caught:
        dry_run(load, SPECS)
    assert caught.value.failure.tensor == "q"


def test_a_loader_that_raises_names_the_tensor() -> None:
    def load(named: Named) -> None:
        for name, _ in named:
            if name == "v":
                raise KeyError(name)

    with pytest.raises(EngineMismatchError, match=r"at v .*KeyError"):
        dry_run(load, SPECS)


HF = torch.arange(1.0, 97.0).view(8, 12)
Way = Callable[[torch.Tensor, torch.Tensor], object]  # copies the HF tensor (its second argument) to the engine's


def record(way: Way, target: torch.Tensor, dtype: torch.dtype = torch.float32) -> DryRun:
    """Run `way` from HF tensor "t" to `target` dry; the target must be left alone."""
    before = target.clone()

    def load(named: Named) -> None:
        for _, tensor in named:
            way(target, tensor)

    found = dry_run(load, [TensorSpec("t", tuple(HF.shape), dtype)])
    assert target.is_meta or torch.equal(target, before)
    return found


def replay(found: DryRun, hf: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of `targets` with the pieces of `found` copied to them."""
    owners = {storage_key(tensor): (name, tensor.storage_offset()) for name, tensor in targets.items()}
    pieces, reasons = engine_pieces(found, owners)
    assert reasons == {}
    result = {name: tensor.detach().clone() for name, tensor in targets.items()}
    for piece in pieces:
        piece.region.of(result[piece.local_name]).copy_(piece.box.of(hf[piece.hf_name]))
    return result


def set_rows(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.data[2:5] = tensor[:3]


def pad(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """As vLLM does with vocabularies and with experts."""
    target[:6].fill_(0)
    target[:6].copy_(tensor[:6])
    target[6:].data.fill_(0)


def heads_apart(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.view(4, 2, 12)[:, :1].copy_(tensor.view(4, 2, 12)[:, 1:])


def element(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target[1][2] = tensor[3, 4]


PLAIN: dict[str, Way] = {
    "whole": lambda target, t: target.copy_(t),
    "data": lambda target, t: target.data.copy_(t),
    "broadcast of size one": lambda target, t: target[:1, None].copy_(t[5]),
    "chunk": lambda target, t: target[:4].copy_(t.chunk(2)[1]),
    "transposed": lambda target, t: target.view(12, 8).copy_(t.t()),
    "to a transposed": lambda target, t: target.view(12, 8).t().copy_(t),
    "reshaped copy": lambda target, t: target.view(-1).copy_(t.t().reshape(-1)),
    "permuted, contiguous, narrowed": lambda target, t: target[:3, :8].copy_(t.t().contiguous().narrow(0, 4, 3)),
    "permuted clone keeps its strides": lambda target, t: target[:5, :6].copy_(t.t()[1:].clone()[2:7, 1:7]),
    "copies of copies": lambda target, t: target[:3, :4].copy_(t.t().contiguous()[3:9].t().contiguous()[1:4, 2:]),
    "copy of a part": lambda target, t: target[:2, :3].copy_(t[3:, 4:].contiguous()[1:3, 2:5]),
    "alternating, transposed copy": lambda target, t: target.view(12, 8)[:6].copy_(t[:, 1::2].t().contiguous()),
    "alternating in a copy": lambda target, t: target.view(12, 8)[:, :4].copy_(t.t().contiguous()[:, ::2]),
    "one of what was repeated": lambda target, t: target[:3].copy_(t.repeat_interleave(2, 0)[1:6:2]),
    "every third row": lambda target, t: target[:3].copy_(t[::3]),
    "to another device": lambda target, t: target.copy_(t.to(target.device).detach()),
    "cast to what it is": lambda target, t: target.copy_(t.to(torch.float32)),
    "rows by index": set_rows,
    "padding": pad,
    "heads apart": heads_apart,
    "element": element,
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_was_recorded_is_what_the_loader_does(name: str) -> None:
    way, target = PLAIN[name], torch.full((8, 12), 0.0 if name == "padding" else -1.0)
    found = record(way, target)
    assert found.opaque == {}
    assert found.consumed == {"t"}
    expected = target.clone()
    way(expected, HF)
    assert not torch.equal(expected, target)
    assert torch.equal(replay(found, {"t": HF}, {"target": target})["target"], expected)


@pytest.mark.parametrize(
    "way",
    [
        lambda target, t: target.copy_(t),
        lambda target, t: target.copy_(t.bfloat16()),
        lambda target, t: target.copy_(t.contiguous().type(torch.bfloat16)),
        lambda target, t: target.view(12, 8).copy_(t.t().to("cpu", torch.bfloat16)),
    ],
)
def test_one_cast_to_the_targets_dtype(way: Way) -> None:
    hf, target = HF / 7, torch.zeros(8, 12, dtype=torch.bfloat16)
    found = record(way, target)
    assert found.opaque == {}
    expected = target.clone()
    way(expected, hf)
    assert torch.equal(replay(found, {"t": hf}, {"target": target})["target"], expected)


def negative_exponential(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """As vLLM's composed_weight_loader: what was copied is read back."""
    target.data.copy_(tensor)
    target.data.copy_(-torch.exp(target))


def scaled_in_place(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor)
    target.mul_(2)


def overwritten(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target[:2].copy_(tensor[:2])
    target[1:].fill_(0)


def copied_over(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor)
    target[0].copy_(torch.ones(12))


def cleared(target: torch.Tensor, tensor: torch.Tensor) -> None:
    tensor[2:].zero_()
    target.copy_(tensor)


def by_way_of_another(target: torch.Tensor, tensor: torch.Tensor) -> None:
    between = torch.zeros(10, 12)
    between[:8].copy_(tensor)
    target.copy_(between[:8])


def copied_on(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target[0].copy_(tensor[0])
    target[1].copy_(target[0])


def in_place_of_another(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(torch.ones(8, 12).mul_(2).add_(tensor))


def by_index(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target[torch.arange(8)] = tensor


def read_out(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.fill_(tensor[0, 0].item())


def decided_by_value(target: torch.Tensor, tensor: torch.Tensor) -> None:
    if tensor.sum() > 5:
        target.copy_(tensor)


OPAQUE: dict[str, tuple[Way, str]] = {
    "a norm of 1 + weight": (lambda target, t: target.copy_(t + 1), "add"),
    "the first of two operations": (lambda target, t: target.copy_((t * 2).t().contiguous().t().exp()), "mul"),
    "repeat": (lambda target, t: target.copy_(t[:4].repeat(2, 1)), "repeat"),
    "heads repeated": (lambda target, t: target.copy_(t[:4].repeat_interleave(2, 0)), "a broadcast"),
    "expanded": (lambda target, t: target.copy_(t[:1].expand(8, 12)), "a broadcast"),
    "broadcast by the copy": (lambda target, t: target.copy_(t[0]), "a broadcast"),
    "cat": (lambda target, t: target.copy_(torch.cat([t[4:], t[:4]])), "cat"),
    "stack": (lambda target, t: target.view(2, 4, 12).copy_(torch.stack([t[4:], t[:4]])), "stack"),
    "index": (lambda target, t: target.copy_(t[torch.arange(8)]), "index"),
    "index_put": (by_index, "index_put_"),
    "cast and back by the copy": (lambda target, t: target.copy_(t.bfloat16()), "cast through torch.bfloat16"),
    "cast and back": (lambda target, t: target.copy_(t.double().float()), "cast through torch.float64"),
    "bits": (lambda target, t: target.copy_(t.view(torch.int32)), "reinterpreted as torch.int32"),
    "copied bits": (lambda target, t: target.copy_(t.view(torch.int32).clone()), "reinterpreted as torch.int32"),
    "bits of the target": (
        lambda target, t: target.view(torch.int32).copy_(t),
        "its destination is reinterpreted as torch.int32",
    ),
    "cleared": (cleared, "zero_"),
    "scaled in place": (scaled_in_place, "mul_"),
    "read back": (negative_exponential, "exp"),
    "overwritten": (overwritten, "overwritten by fill_"),
    "copied on": (copied_on, "copied on from another tensor of the engine"),
    "copied over": (copied_over, "overwritten by copy_"),
    "by way of another": (by_way_of_another, "copied in parts to another tensor"),
    "in place of another": (in_place_of_another, "add_"),
    "added": (lambda target, t: target.add_(t), "add_"),
    "out": (lambda target, t: torch.mul(t, 2, out=target), "mul"),
    "foreach": (lambda target, t: torch._foreach_copy_([target], [t]), "_foreach_copy_"),
    "set": (lambda target, t: target.set_(t), "set_"),
    "read out": (read_out, "the loader reads its value (local_scalar_dense)"),
    "decided by value": (decided_by_value, "the loader reads its value (sum)"),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_more_than_a_copy_is_opaque(name: str) -> None:
    way, reason = OPAQUE[name]
    target = torch.full((8, 12), -1.0)
    found = record(way, target)
    assert found.consumed == {"t"}
    assert found.opaque["t"].startswith(reason)
    pieces, reasons = engine_pieces(found, {storage_key(target): ("target", 0)})
    assert pieces == []
    assert reasons == {}
    # It is known where it goes, but for what the loader may do or not do with its value.
    assert found.by_destination() == ({} if name == "decided by value" else {storage_key(target): {"t"}})


def test_the_engines_tensors_are_left_alone_the_loaders_own_are_not() -> None:
    target, seen = torch.full((8, 12), -1.0), []

    def way(target: torch.Tensor, tensor: torch.Tensor) -> None:
        target.zero_()
        target[2:].mul_(3)
        target[0] = 5
        torch.nn.init.normal_(target)
        own = torch.zeros(3)
        own[1:].add_(2)
        own[0].copy_(torch.tensor(7.0))
        seen.extend(own.tolist())
        target[int(own[1])].copy_(tensor[0])

    found = record(way, target)
    assert seen == [7, 2, 2]
    assert found.opaque == {}
    assert [(w.box, w.region) for w in found.writes] == [(Box((0, 0), (1, 12)), Region.contiguous((1, 12), offset=24))]


def test_a_probe_that_becomes_the_parameters_data() -> None:
    target = torch.nn.Parameter(torch.empty(8, 12, device="meta"))

    def way(target: torch.Tensor, tensor: torch.Tensor) -> None:
        target.data = tensor[2:].float()

    found = record(way, target)
    assert found.opaque == {"t": "the loader keeps the tensor itself"}
    assert found.consumed == {"t"}


def test_a_probe_that_is_kept_for_later() -> None:
    kept = []
    assert record(lambda _, tensor: kept.append(tensor[0]), torch.zeros(1)).opaque == {
        "t": "the loader keeps the tensor itself"
    }


def test_a_loader_that_collects_its_tensors_keeps_none() -> None:
    target = torch.zeros(4, 6)

    def load(named: Named) -> None:
        tensors = dict(named)
        tensors["loop"] = tensors  # only the garbage collector gets rid of this one
        target.copy_(tensors["q"])

    found = dry_run(load, SPECS)
    assert (found.consumed, found.opaque) == ({"q"}, {})


def test_storages_that_come_and_go_are_not_confused() -> None:
    """Temporary tensors get the addresses of those before them."""
    target = torch.zeros(60, 4, 6)

    def load(named: Named) -> None:
        for index, (_, tensor) in enumerate(named):
            if index % 2:
                torch.empty(4, 6, device="meta").copy_(tensor + 1)
            else:
                target[index].copy_(torch.empty(4, 6, device="meta").fill_(index) if index % 4 else tensor.double())

    specs = [TensorSpec(f"t{i}", (4, 6), torch.float32) for i in range(60)]
    found = dry_run(load, specs)
    assert found.opaque == {f"t{i}": "cast through torch.float64" for i in range(0, 60, 4)}
    assert found.consumed == found.opaque.keys()


def test_regions_count_from_the_parameter_and_names_without_an_owner_have_a_reason() -> None:
    flat = torch.zeros(30)
    parameter, loose = flat[6:].view(4, 6), torch.zeros(4, 6)

    def load(named: Named) -> None:
        for name, tensor in named:
            match name:
                case "q":
                    parameter[1:].copy_(tensor[:3])
                case "k":
                    parameter[:1].copy_(tensor[:1])
                    loose[:].copy_(tensor)
                case "v":
                    flat[:6].copy_(tensor[0])

    found = dry_run(load, SPECS)
    pieces, reasons = engine_pieces(found, {storage_key(parameter): ("p", 6)})
    assert [(p.hf_name, p.box, p.local_name, p.region) for p in pieces] == [
        ("q", Box((0, 0), (3, 6)), "p", Region.contiguous((3, 6), offset=6))
    ]
    assert reasons == {
        "k": "it is copied to a tensor of shape [4, 6] that is no parameter",
        "v": "it is copied to a tensor of shape [6] that is no parameter",
    }
    assert found.by_destination() == {storage_key(flat): {"q", "k", "v"}, storage_key(loose): {"k"}}


HEADS, GROUPS, HEAD, HIDDEN, EXPERTS, INNER = 4, 2, 3, 10, 3, 8


class SmallEngine(torch.nn.Module):
    """Loads as vLLM's models do: fused, sharded (rank 1 of 2), transposed, padded, cast."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "qkv": (HEADS // 2 * HEAD + 2 * HEAD, HIDDEN),
            "fused_qkv": (3, HEADS, HEAD, HIDDEN),
            "w13": (EXPERTS, INNER, HIDDEN),
            "w2": (EXPERTS, HIDDEN, INNER // 2),
            "router": (EXPERTS, HIDDEN),
            "norm": (HIDDEN,),
            "repeated": (2 * GROUPS * HEAD, HIDDEN),
            "embedding": (16, HIDDEN),
            "scale": (1,),
        }
        for name, shape in shapes.items():
            dtype = torch.float32 if name in ("router", "scale") else torch.bfloat16
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape).to(dtype)))

    def load_weights(self, named: Named) -> set[str]:
        loaded = set()
        for name, tensor in named:
            kind, _, index = name.partition(".")
            loaded.add(self._load(kind, int(index or 0), tensor))
        return loaded

    def _load(self, kind: str, expert: int, tensor: torch.Tensor) -> str:
        match kind:
            case "q" | "k" | "v":
                rows = HEADS // 2 * HEAD if kind == "q" else HEAD
                start = {"q": 0, "k": HEADS // 2 * HEAD, "v": HEADS // 2 * HEAD + HEAD}[kind]
                self.qkv.data.narrow(0, start, rows).copy_(tensor.narrow(0, rows, rows))
                return "qkv"
            case "fused_qkv":
                for i, part in enumerate(tensor.view(HEADS, 3, HEAD, HIDDEN).chunk(3, dim=1)):
                    self.fused_qkv[i].copy_(part.squeeze(1))
                return "fused_qkv"
            case "gate" | "up":
                half = self.w13.data[expert].narrow(0, 0 if kind == "gate" else INNER // 2, INNER // 2)
                half.copy_(tensor.chunk(2)[1])
                return "w13"
            case "down":
                self.w2.data[expert].copy_(tensor.t()[:, INNER // 2 :])
                return "w2"
            case "gate_up":  # of all experts, gate and up alternating, (experts, in, out)
                self.w13.data[:, : INNER // 2].copy_(tensor[..., ::2].transpose(1, 2))
                self.w13.data[:, INNER // 2 :].copy_(tensor[..., 1::2].transpose(1, 2))
                return "w13"
            case "router":
                self.router.copy_(tensor.to(torch.float32))
                return "router"
            case "norm":
                self.norm.copy_(tensor + 1)
                return "norm"
            case "repeated":
                self.repeated.copy_(tensor.view(GROUPS, HEAD, HIDDEN).repeat_interleave(2, 0).flatten(0, 1))
                return "repeated"
            case "embedding":
                self.embedding[:12].data.copy_(tensor)
                self.embedding[12:].data.fill_(0)
                return "embedding"
            case _:
                self.scale.data[0] = tensor
                return "scale"


def small_tensors(*, alternating: bool) -> dict[str, torch.Tensor]:
    shapes = {
        "q": (HEADS * HEAD, HIDDEN),
        "k": (GROUPS * HEAD, HIDDEN),
        "v": (GROUPS * HEAD, HIDDEN),
        "fused_qkv": (HEADS * 3 * HEAD, HIDDEN),
        "router": (EXPERTS, HIDDEN),
        "norm": (HIDDEN,),
        "repeated": (GROUPS * HEAD, HIDDEN),
        "embedding": (12, HIDDEN),
        "scale": (),
        **{f"down.{e}": (INNER, HIDDEN) for e in range(EXPERTS)},
    }
    if alternating:
        shapes["gate_up"] = (EXPERTS, HIDDEN, INNER)
    else:
        shapes |= {f"{kind}.{e}": (INNER, HIDDEN) for kind in ("gate", "up") for e in range(EXPERTS)}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("alternating", [False, True])
def test_a_models_weights_replayed_are_those_it_loads(alternating: bool) -> None:
    torch.manual_seed(0)
    model, hf = SmallEngine(), small_tensors(alternating=alternating)
    model.embedding.data[12:] = 0  # padding, written when the engine was made
    before = copy.deepcopy(model.state_dict())

    found = dry_run(model.load_weights, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in hf.items()])

    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "embedding")
    assert found.consumed == set(hf)
    assert found.loaded == set(before)
    assert found.opaque.keys() == {"norm", "repeated"}
    assert found.opaque["norm"] == "add"
    assert found.opaque["repeated"].startswith("a broadcast")
    assert found.twice == []

    replayed = replay(found, hf, dict(model.named_parameters()))
    with torch.no_grad():
        model.load_weights((name, tensor) for name, tensor in hf.items() if name not in found.opaque)
    for name, parameter in model.named_parameters():
        assert torch.equal(replayed[name], parameter), name
        assert torch.equal(parameter, before[name]) == (name in ("norm", "repeated")), name
