"""Where an engine keeps HF tensors: against loaders and memory whose every element is looked at one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from mbridge.live import LiveTensors
from mbridge.pieces import Box, Copy, Piece, Region, TensorSpec, join, whole_pieces
from mbridge_rl.learning import constant_modules
from mbridge_rl.placement import (
    Expected,
    Format,
    Placement,
    compare_in_place,
    expected_of_copies,
    expected_of_tensors,
    place,
)
from mbridge_rl.recorder import dry_run

Named = Iterable[tuple[str, torch.Tensor]]
SPECS = (
    TensorSpec("q", (4, 6), torch.float32),
    TensorSpec("k", (2, 6), torch.float32),
    TensorSpec("out", (6, 4), torch.float32),
    TensorSpec("bias", (5,), torch.float32),
    TensorSpec("small", (3,), torch.float32),
)


class Engine(nn.Module):
    """q and k in one; out transposed; bias in padding; small cast."""

    def __init__(self) -> None:
        super().__init__()
        for module, shape, dtype in (
            ("attention", (6, 6), torch.float32),
            ("projection", (4, 6), torch.float32),
            ("padded", (8,), torch.float32),
            ("cast", (3,), torch.bfloat16),
        ):
            self.add_module(module, nn.Module())
            self.get_submodule(module).weight = nn.Parameter(torch.full(shape, -1.0, dtype=dtype))
        self.attention.register_buffer("scale", torch.ones(1))

    @torch.no_grad()
    def load_weights(self, named: Named) -> set[str]:
        for name, tensor in named:
            match name:
                case "q":
                    self.attention.weight[:4].copy_(tensor)
                case "k":
                    self.attention.weight[4:].copy_(tensor)
                case "out":
                    self.projection.weight.copy_(tensor.t())
                case "bias":
                    self.padded.weight[1:6].copy_(tensor)
                case "small":
                    self.cast.weight.copy_(tensor)
        return {name for name, _ in self.named_parameters()}


def placed(engine: nn.Module, load: Callable[[Named], set[str] | None], specs: Iterable[TensorSpec]) -> Placement:
    live = LiveTensors.of(engine)
    return place(dry_run(load, specs), live, {name: name.rpartition(".")[0] for name in live})


def sources() -> dict[str, torch.Tensor]:
    return {spec.name: torch.randn(spec.shape, dtype=spec.dtype) for spec in SPECS}


def test_pieces_lead_from_every_element_to_where_the_loader_puts_it() -> None:
    engine = Engine()
    placement = placed(engine, engine.load_weights, SPECS)
    before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    hf = sources()
    found = {name: tensor.clone() for name, tensor in before.items()}
    for piece in placement.pieces:  # element by element
        flat = found[piece.local_name].view(-1)
        for index in itertools.product(*(range(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))):
            steps = [(i - a) * s for i, a, s in zip(index, piece.box.start, piece.region.stride, strict=True)]
            flat[piece.region.offset + sum(steps)] = hf[piece.hf_name][index]
    engine.load_weights(hf.items())
    for name, tensor in engine.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert placement.formats["projection.weight"] == Format((4, 6), (6, 1), torch.float32)
    assert placement.unwritten() == {"padded.weight": 3}
    assert placement.written == {f"{m}.weight" for m in ("attention", "projection", "padded", "cast")}
    assert (placement.opaque, placement.computed, placement.reloaded_names()) == ({}, frozenset(), set())


def test_an_opaque_module_takes_all_its_hf_names_to_the_loader_and_no_others() -> None:
    engine = Engine()
    placement = placed(engine, engine.load_weights, SPECS)
    placement.opaque["attention"] = "why not"
    assert placement.reloaded_names() == {"q", "k"}


def test_what_the_loader_computes_makes_its_module_opaque() -> None:
    engine = Engine()

    def load(named: Named) -> set[str]:
        return engine.load_weights((name, tensor * 2 if name == "k" else tensor) for name, tensor in named)

    placement = placed(engine, load, SPECS)
    assert placement.opaque == {"attention": "k: mul"}
    assert placement.computed == {"k"}
    assert placement.reloaded_names() == {"q", "k"}


def test_what_goes_nowhere_may_be_anywhere_that_is_not_accounted_for() -> None:
    engine = Engine()
    kept: list[torch.Tensor] = []

    def load(named: Named) -> set[str]:
        kept.clear()
        return engine.load_weights((n, t) for n, t in named if n != "small" or kept.append(t))  # type: ignore[func-returns-value]

    placement = placed(engine, load, SPECS)
    reason = "small may go here: the loader keeps the tensor itself"
    assert placement.opaque == dict.fromkeys(("cast", "padded", "attention"), reason) | {
        "attention": reason  # its buffer `scale`
    }
    assert placement.reloaded_names() == {"q", "k", "bias", "small"}


def test_a_copy_to_memory_that_is_no_parameter() -> None:
    engine = Engine()
    elsewhere = torch.zeros(3)

    def load(named: Named) -> set[str]:
        for name, tensor in named:
            if name == "small":
                elsewhere.copy_(tensor)
            else:
                engine.load_weights([(name, tensor)])
        return set()

    placement = placed(engine, load, SPECS)
    assert placement.computed == {"small"}
    assert "it is copied to a tensor of shape [3] that is no parameter" in placement.opaque["cast"]
    assert "projection" not in placement.opaque


def test_tied_parameters_are_one() -> None:
    engine = Engine()
    engine.again = nn.Module()
    engine.again.weight = engine.projection.weight
    placement = placed(engine, engine.load_weights, SPECS)
    assert {piece.local_name for piece in placement.pieces if piece.hf_name == "out"} == {"projection.weight"}
    assert placement.formats["again.weight"] == placement.formats["projection.weight"]
    assert placement.opaque == {}


class Flat(nn.Module):
    """Its tensors are views of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        flat = torch.zeros(10)
        self.first.register_buffer("weight", flat[:4])
        self.second.register_buffer("weight", flat[4:])

    def load_weights(self, named: Named) -> set[str]:
        for name, tensor in named:
            self.get_submodule(name).weight.copy_(tensor)
        return {"first.weight", "second.weight"}


def test_views_of_one_memory_keep_their_own_pieces() -> None:
    engine = Flat()
    specs = [TensorSpec("first", (4,), torch.float32), TensorSpec("second", (6,), torch.float32)]
    placement = placed(engine, engine.load_weights, specs)
    assert placement.opaque == {}
    assert [(p.hf_name, p.local_name, p.region) for p in placement.pieces] == [
        ("first", "first.weight", Region(0, (4,), (1,))),
        ("second", "second.weight", Region(0, (6,), (1,))),
    ]


def test_a_copy_across_two_parameters_goes_to_the_loader() -> None:
    engine = Flat()
    whole = torch.as_strided(engine.first.weight, (10,), (1,), 0)

    def load(named: Named) -> set[str]:
        for _, tensor in named:
            whole.copy_(tensor)
        return {"first.weight", "second.weight"}

    placement = placed(engine, load, [TensorSpec("both", (10,), torch.float32)])
    assert placement.pieces == ()
    reason = "both: it is copied to memory that no parameter holds alone"
    assert placement.opaque == {"first": reason, "second": reason}
    assert placement.reloaded_names() == {"both"}


# --- what must lie in memory, and what does ---------------------------------------------------------------------------


def loaded() -> tuple[Engine, Placement, list[Copy], dict[str, torch.Tensor]]:
    engine, hf = Engine(), sources()
    placement = placed(engine, engine.load_weights, SPECS)
    engine.load_weights(hf.items())
    return engine, placement, list(join(whole_pieces(SPECS), placement.pieces)), hf


def shapes_of() -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in SPECS}


def differences(
    engine: Engine, placement: Placement, copies: list[Copy], hf: dict[str, torch.Tensor]
) -> dict[str, str]:
    shapes, live = shapes_of(), LiveTensors.of(engine)
    by_copies = expected_of_copies(copies, hf, placement.formats, shapes)
    by_tensors = expected_of_tensors(hf, placement.pieces, placement.formats)
    assert sorted(by_copies, key=_key) == sorted(by_tensors, key=_key)  # two ways to the same
    return compare_in_place(by_copies, live, placement.formats, shapes)


def _key(expected: Expected) -> tuple[str, Region, int]:
    region = expected.piece.region
    return expected.piece.local_name, (region.offset, region.shape, region.stride), expected.checksum  # type: ignore[return-value]


def test_what_is_kept_as_it_was_loaded_has_no_reason() -> None:
    assert differences(*loaded()) == {}


def test_padding_is_nobodys_business() -> None:
    engine, *rest = loaded()
    with torch.no_grad():
        engine.padded.weight[0] = 17
    assert differences(engine, *rest) == {}


@pytest.mark.parametrize(
    ("name", "index"), [("attention", (5, 5)), ("attention", (0, 0)), ("projection", (3, 2)), ("cast", (2,))]
)
def test_one_other_element_is_seen(name: str, index: tuple[int, ...]) -> None:
    engine, *rest = loaded()
    weight = engine.get_submodule(name).weight.data
    weight[index] = torch.nextafter(weight[index], torch.full_like(weight[index], 1e9))
    assert differences(engine, *rest) == {f"{name}.weight": "its values change after loading"}


def kept_as(engine: Engine, tensor: torch.Tensor) -> None:
    engine.projection.weight = nn.Parameter(tensor)


def test_another_form_is_seen_and_told() -> None:
    engine, *rest = loaded()
    weight = engine.projection.weight.detach()
    before = "loaded as [4, 6] torch.float32 of stride [6, 1], kept as "
    for tensor, text in (
        (weight.t(), "[6, 4] torch.float32 of stride [1, 6]"),
        (weight.t().contiguous().t(), "[4, 6] torch.float32 of stride [1, 4]"),
        (weight.double(), "[4, 6] torch.float64 of stride [6, 1]"),
        (weight.view(24), "[24] torch.float32 of stride [1]"),
        (torch.zeros(0), "[0] torch.float32 of stride [1]"),
    ):
        kept_as(engine, tensor)
        assert differences(engine, *rest) == {"projection.weight": before + text}
    kept_as(engine, weight.clone())  # elsewhere, but the same
    assert differences(engine, *rest) == {}
    del engine.projection.weight
    reasons = differences_of_gone(engine, *rest)
    assert reasons == {"projection.weight": before + "nothing"}


def differences_of_gone(
    engine: Engine, placement: Placement, copies: list[Copy], hf: dict[str, torch.Tensor]
) -> dict[str, str]:
    live = dict(engine.state_dict())
    shapes = shapes_of()
    return compare_in_place(expected_of_copies(copies, hf, placement.formats, shapes), live, placement.formats, shapes)


def test_memory_with_gaps_cannot_be_compared() -> None:
    gaps = torch.zeros(4, 6).t()
    formats = {"w": Format.of(gaps)}
    piece = Piece("a", Box.whole((6, 4)), "w", Region(0, (6, 4), gaps.stride()))
    expected = expected_of_tensors({"a": torch.ones(6, 4)}, [piece], formats)
    reasons = compare_in_place(expected, {"w": gaps}, formats, {"a": (6, 4)})
    assert reasons == {"w": "kept as [6, 4] torch.float32 of stride [1, 6], which is not contiguous"}


def test_a_piece_of_what_alternates() -> None:
    """Gate and up of the last dim, each apart in the engine: boxes of the unfolded view."""
    hf = torch.arange(24.0).view(3, 8)
    kept = torch.cat([hf[:, 0::2], hf[:, 1::2]], dim=1)
    pieces = [
        Piece("a", Box((0, 0, i), (3, 4, i + 1)), "w", Region(4 * i, (3, 4, 1), (8, 1, 1)))  # gate, then up
        for i in range(2)
    ]
    formats, shapes = {"w": Format.of(kept)}, {"a": (3, 8)}
    expected = expected_of_tensors({"a": hf}, pieces, formats)
    assert compare_in_place(expected, {"w": kept}, formats, shapes) == {}
    kept[2, 7] += 1
    assert list(compare_in_place(expected, {"w": kept}, formats, shapes)) == ["w"]


def test_constant_modules() -> None:
    engine, placement, _, hf = loaded()
    modules = {"attention", "projection", "padded", "cast"}

    def constant(among: set[str] = modules, **changes: torch.Tensor) -> set[str]:
        engine.load_weights({**hf, **changes}.items())
        return constant_modules(LiveTensors.of(engine), placement, among)

    assert constant() == set()
    assert constant(out=torch.ones(6, 4)) == {"projection"}
    assert constant(q=torch.ones(4, 6)) == set()  # k is not
    # Each of its tensors is constant; a permutation of rows of one is not seen, whatever the other is.
    assert constant(q=torch.ones(4, 6), k=torch.zeros(2, 6)) == {"attention"}
    nearly = torch.ones(6, 4)
    nearly[5, 3] += 1e-6
    assert constant(out=nearly) == set()
    assert constant(out=torch.full((6, 4), float("nan"))) == set()
    assert constant({"attention"}, out=torch.ones(6, 4)) == set()


class Overwriting(nn.Module):
    """`a` goes to all of its parameter, `b` to rows of it afterwards; odd and even columns of the other do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        self.first.register_buffer("weight", torch.zeros(4, 6))
        self.second.register_buffer("weight", torch.zeros(4, 6))

    def load_weights(self, tensors: Named) -> set[str]:
        for name, tensor in tensors:
            first, second = self.first.get_buffer("weight"), self.second.get_buffer("weight")
            into = {"a": first, "b": first[1:3], "odd": second[:, 1::2], "even": second[:, ::2]}[name]
            into.copy_(tensor)
        return {"first.weight", "second.weight"}


def test_elements_that_are_written_twice_are_left_to_the_loader() -> None:
    engine = Overwriting()
    shapes = {"a": (4, 6), "b": (2, 6), "odd": (4, 3), "even": (4, 3)}
    placement = placed(
        engine, engine.load_weights, tuple(TensorSpec(n, shape, torch.float32) for n, shape in shapes.items())
    )
    assert placement.computed == {"a", "b"}
    assert list(placement.opaque) == ["first"]
    assert "same elements of first.weight" in placement.opaque["first"]
    assert {piece.hf_name for piece in placement.pieces} == {"odd", "even"}
