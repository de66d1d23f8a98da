"""Small models with which engines and transports go wrong, and a module that holds any of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..checksum import BITS
from .bridge import Groups, Tensors

BUCKET_BYTES = 1024  # of the suites: the models below fill several
DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


class Model(NamedTuple):
    """What an engine holds, and how its trainer sends it. Two names of one tensor are tied: they share memory."""

    tensors: Tensors  # HF name -> tensor, in the order of the engine
    groups: Groups = ()
    optional: frozenset[str] = frozenset()
    unsent: frozenset[str] = frozenset()  # names that only the engine knows

    @property
    def sent(self) -> Tensors:
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.unsent}

    def reversed(self) -> Model:
        """The same tensors, sent in the opposite order."""
        return self._replace(tensors=dict(reversed(list(self.tensors.items()))), groups=self.groups[::-1])


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of random bits."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).view(dtype).view(shape)


def changed(tensor: torch.Tensor, step: int) -> torch.Tensor:
    """Every element other than in `tensor`, and in every `step`, a little: its bits, as an integer, plus `step`."""
    return (bits(tensor) + step).view(tensor.dtype).view(tensor.shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bits as flat integers, by which NaNs are compared too. A view if the tensor is contiguous."""
    return tensor.contiguous().reshape(-1).view(BITS[tensor.dtype.itemsize])


def at_step(tensors: Tensors, step: int) -> dict[str, torch.Tensor]:
    """`tensors` as the trainer has them in `step`; tied ones stay equal."""
    return {name: changed(tensor, step) for name, tensor in tensors.items()}


def usual() -> Model:
    """Several dtypes, several buckets, a fusion group: for cases in which the model does not matter."""
    tensors = {
        "embed": made((40, 16), torch.bfloat16),
        "layers.0.q": made((24, 16), torch.bfloat16),
        "layers.0.k": made((8, 16), torch.bfloat16),
        "layers.0.norm": made((16,)),
        "layers.1.up": made((12, 48)),
        "layers.1.bias": made((48,), torch.float64),
        "head": made((40, 16), torch.bfloat16),
    }
    return Model(tensors, groups=[("layers.0.q", "layers.0.k")])


def every_dtype() -> Model:
    """Odd sizes, so that a tensor's end is no place for the next one."""
    return Model(
        {f"in_{str(d).removeprefix('torch.')}": made((7, 11), d) for d in DTYPES} | {"odd": made((3,), torch.int8)}
    )


def no_dims_and_no_elements() -> Model:
    shapes = [(), (0,), (5, 0), (0, 5), (1,), (2, 0, 3)]
    return Model({f"t{i}": made(shape, torch.bfloat16) for i, shape in enumerate(shapes)} | {"last": made(())})


def nothing() -> Model:
    return Model({})


def no_elements() -> Model:
    return Model({"a": made((0, 4)), "b": made((0,))})


def oversize() -> Model:
    """Tensors larger than a bucket, one whose every row is, and small ones between them."""
    return Model(
        {
            "a": made((3,)),
            "many_rows": made((10 * BUCKET_BYTES // 20 + 1, 5)),
            "b": made((5,)),
            "long_rows": made((3, BUCKET_BYTES // 2 + 7), torch.bfloat16),
            "vector": made((3 * BUCKET_BYTES + 1,), torch.int8),
            "c": made((7,)),
        }
    )


def grouped() -> Model:
    """A group within a bucket, one over several, one of different dtypes, whose members are not neighbours."""
    tensors = {
        "q": made((4, 8)),
        "gate": made((100, 8)),
        "scale": made((3,), torch.float64),
        "k": made((2, 8)),
        "up": made((100, 8)),
        "weight": made((16, 16), torch.float8_e4m3fn),
        "v": made((2, 8)),
    }
    return Model(tensors, groups=[("q", "k", "v"), ("gate", "up"), ("weight", "scale")])


def mixed_precision() -> Model:
    """bf16 weights, and an fp32 buffer that bf16 cannot hold."""
    return Model({"router": made((8, 16), torch.bfloat16), "expert_bias": made((8,)), "up": made((9, 16))})


def tied(*, unsent: bool = False, optional: bool = False) -> Model:
    """head is embed. The trainer sends it as a tensor of its own, unless `unsent`."""
    embed, names = made((40, 16), torch.bfloat16), frozenset(["head"])
    return Model(
        {"embed": embed, "up": made((30, 16)), "head": embed},
        unsent=names if unsent else frozenset(),
        optional=names if optional else frozenset(),
    )


class ReferenceModule(torch.nn.Module):
    """Holds the tensors of a Model, tied ones too; loads them by name, notes the order, and fails when told to."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.calls: list[list[str]] = []  # the names of each load call with data
        self.fail_at: str | None = None  # raise, once, when data of this name comes
        twins: dict[int, torch.Tensor] = {}
        for name, tensor in tensors.items():
            own = twins.setdefault(id(tensor), torch.zeros_like(tensor))
            self.register_buffer(name.replace(".", "/"), own)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        self.calls.append([])
        loaded = set()
        for name, tensor in weights:
            if not tensor.is_meta:
                self.calls[-1].append(name)
                if name == self.fail_at:
                    self.fail_at = None
                    raise RuntimeError("a loader's error on purpose")
            own = name.replace(".", "/")
            target = self.get_buffer(own)
            if target.shape != tensor.shape:
                raise ValueError(f"{list(tensor.shape)} does not fit into {list(target.shape)}")
            self.write(name, target, tensor)
            loaded.add(own)
        return loaded

    def write(self, name: str, target: torch.Tensor, tensor: torch.Tensor) -> None:
        """Load `tensor` of HF name `name`."""
        target.copy_(tensor)

    def tensors(self) -> dict[str, torch.Tensor]:
        """HF name -> tensor, the module's own memory."""
        return {name.replace("/", "."): tensor for name, tensor in self.named_buffers(remove_duplicate=False)}
