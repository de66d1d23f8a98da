"""safetensors checkpoints: reads slices straight into local tensors, writes shards that appear all at once.

Knows files, names, shapes and pieces; knows no model, no process group.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError, listed
from .fp8 import BLOCK, SCALE_SUFFIX, dequantise, scale_box, scale_shape
from .pieces import Box, Piece, Region, TensorSpec

logger = logging.getLogger("mbridge")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 1024**3
NUM_THREADS = 4

# Header names of the dtypes that a weight may have on disk; it is cast to the parameter's dtype while it is read.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TAG = re.compile(r"\.[0-9a-f]{8}$")  # of a shard whose plain name was taken when it was saved
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?(\.[0-9a-f]{8})?\.safetensors")
_PASSENGERS = (
    "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.tiktoken", "*.model", "*.py",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: which tensors lie in which file of `folder`, with their shapes and dtypes."""

    folder: Path
    files: Mapping[str, str]  # HF name -> file name
    specs: Mapping[str, TensorSpec]
    odd_dtypes: Mapping[str, str]  # HF name -> what the header says, where it is no float
    scaled: frozenset[str] = frozenset()  # HF names that are fp8 with block scales; their spec says bfloat16

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the index and every header. Raises CheckpointError if files are absent, damaged or contradictory."""
        folder = Path(folder)
        claimed = _claimed_files(folder)
        files: dict[str, str] = {}
        specs: dict[str, TensorSpec] = {}
        odd: dict[str, str] = {}
        for file in sorted(set(claimed.values())) if claimed else [SINGLE]:
            with _open(folder / file) as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    if claimed.get(name, file) != file:
                        continue  # the index says that another file counts
                    view = handle.get_slice(name)
                    dtype = view.get_dtype()
                    if dtype not in _DTYPES:
                        odd[name] = dtype
                    specs[name] = TensorSpec(name, tuple(view.get_shape()), _DTYPES.get(dtype, torch.uint8))
                    files[name] = file
        absent = sorted(set(claimed) - set(files))
        if absent:
            raise CheckpointError(
                f"{folder / INDEX} names tensors that their files do not hold:\n"
                + listed(f"{name} in {claimed[name]}" for name in absent)
            )
        scaled = frozenset(name for name, dtype in odd.items() if dtype == "F8_E4M3" and name + SCALE_SUFFIX in specs)
        for name in scaled:
            del odd[name]
            scales = specs.pop(name + SCALE_SUFFIX)
            if scales.shape != scale_shape(specs[name].shape):
                raise CheckpointError(
                    f"{folder}: {scales.name} has shape {list(scales.shape)}; blocks of {BLOCK} x {BLOCK} of {name} "
                    f"{list(specs[name].shape)} need {list(scale_shape(specs[name].shape))}"
                )
            specs[name] = specs[name]._replace(dtype=torch.bfloat16)
        return cls(folder, files, specs, odd, scaled)

    def check(self, expected: Sequence[TensorSpec], redundant: Sequence[str] = ()) -> None:
        """Raise CheckpointError listing each missing, extra, mis-shaped or non-float tensor.

        `redundant` are names (with `{layer}`) that may be there and are left unread, which is logged.
        """
        wanted = {spec.name: spec for spec in expected}
        packed = [name for name in wanted if {name + "_blocks", name + "_scales"} <= self.specs.keys()]
        if packed:
            raise CheckpointError(
                f"{self.folder}: {len(packed)} tensors are in MXFP4, which is not read, such as {packed[0]}_blocks. "
                "Write the checkpoint in bf16 first, for example with transformers: "
                "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(...)"
            )
        patterns = [re.compile(re.escape(name).replace(r"\{layer\}", r"\d+")) for name in redundant]
        extra = [name for name in self.specs if name not in wanted]
        unread = [name for name in extra if any(pattern.fullmatch(name) for pattern in patterns)]
        if unread:
            logger.info("%s: %d redundant tensors are not read: %s ...", self.folder, len(unread), unread[0])
        problems = [f"missing: {spec.name} {list(spec.shape)}" for spec in expected if spec.name not in self.specs]
        problems += [f"extra: {name} {list(self.specs[name].shape)}" for name in sorted(set(extra) - set(unread))]
        for name, spec in wanted.items():
            found = self.specs.get(name)
            if found is not None and found.shape != spec.shape:
                problems.append(f"shape: {name} is {list(found.shape)}, expected {list(spec.shape)}")
            if name in self.odd_dtypes:
                problems.append(f"dtype: {name} is {self.odd_dtypes[name]}, expected one of {', '.join(_DTYPES)}")
        if problems:
            raise CheckpointError(f"{self.folder} does not hold the tensors of this model:\n{listed(problems)}")

    def read_into(self, tensors: Mapping[str, torch.Tensor], pieces: Sequence[Piece]) -> int:
        """Copy each piece's box from disk into its region of `tensors[piece.local_name]`. Returns bytes read.

        Only the boxes are read; files are shared out over threads. Casts to the destination's dtype.
        """
        by_file: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_file[self.files[piece.hf_name]].append(piece)
        with ThreadPoolExecutor(min(NUM_THREADS, max(1, len(by_file))), "mbridge-load") as pool:
            reads = [pool.submit(self._read_file, file, batch, tensors) for file, batch in by_file.items()]
            return sum(read.result() for read in reads)

    def _read_file(self, file: str, pieces: Sequence[Piece], tensors: Mapping[str, torch.Tensor]) -> int:
        num_bytes = 0
        held: tuple[str, Box] | None = None  # what `values` are
        values = torch.empty(0)
        with _open(self.folder / file) as handle, torch.no_grad():
            for piece in pieces:
                name, box = piece.hf_name, piece.box
                if len(box.start) > len(self.specs[name].shape):
                    box = box.folded()  # holds gate and up: both are taken from one read
                if held != (name, box):
                    values = handle.get_slice(name)[box.slices] if box.start else handle.get_tensor(name)
                    if name in self.scaled:
                        values = dequantise(values, self._read_scales(name, box), box)
                    num_bytes += values.nbytes
                    held = (name, box)
                piece.region.of(tensors[piece.local_name]).copy_(piece.box.of(values, box.start))
        return num_bytes

    def _read_scales(self, weight: str, box: Box) -> torch.Tensor:
        """The block scales of a box of a weight; they may lie in another file than the weight."""
        name = weight + SCALE_SUFFIX
        with _open(self.folder / self.files[name]) as handle:
            scales: torch.Tensor = handle.get_slice(name)[scale_box(box).slices]
        return scales


def holds_weights(folder: Path) -> bool:
    """Whether a safetensors checkpoint lies there, rather than a config alone."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def names_in(folder: Path) -> frozenset[str]:
    """HF names of the checkpoint in `folder`: from its index, or from the header of its one file."""
    claimed = _claimed_files(folder)
    if claimed:
        return frozenset(claimed)
    with _open(folder / SINGLE) as handle:
        return frozenset(handle.keys())


def fill_padding(tensors: Mapping[str, torch.Tensor], padding: Iterable[tuple[str, Region]]) -> None:
    """Zero the regions that no HF tensor fills, so that loading twice gives the same bits."""
    with torch.no_grad():
        for name, region in padding:
            region.of(tensors[name]).zero_()


def _claimed_files(folder: Path) -> dict[str, str]:
    """The index's HF name -> file name; empty for a single-file checkpoint, which wins as it does in transformers."""
    if (folder / SINGLE).is_file():
        return {}
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: expected a safetensors checkpoint")
    try:
        claimed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no safetensors index: {error!r}") from error
    if not isinstance(claimed, dict) or not claimed or not all(isinstance(file, str) for file in claimed.values()):
        raise CheckpointError(f"{path} is no safetensors index: weight_map should give a file name for each tensor")
    foreign = sorted(file for file in set(claimed.values()) if Path(file).name != file)
    if foreign:
        raise CheckpointError(f"{path} names files outside its folder: {', '.join(foreign)}")
    absent = sorted(file for file in set(claimed.values()) if not (folder / file).is_file())
    if absent:
        raise CheckpointError(f"{path} names files that are not there: {', '.join(absent)}. Is a download incomplete?")
    return claimed


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Is it truncated, or still being written?") from error


@dataclass(slots=True)
class Shard:
    """One file to be written and the tensors that belong in it, in order."""

    file: str
    specs: list[TensorSpec] = field(default_factory=list)


def plan_shards(
    groups: Sequence[Sequence[TensorSpec]], files: Mapping[str, str] | None = None, max_bytes: int = MAX_SHARD_BYTES
) -> list[list[Shard]]:
    """Divide the tensors of each writer (a group) into files. Pure, so that every rank gets the same answer.

    A single writer keeps the division `files` (HF name -> file) of the original checkpoint if that names every tensor.
    """
    if files is not None and len(groups) == 1 and all(spec.name in files for spec in groups[0]):
        shards: dict[str, Shard] = {}
        for spec in groups[0]:
            shards.setdefault(files[spec.name], Shard(files[spec.name])).specs.append(spec)
        return [list(shards.values())]
    divided = [list(split_by_bytes(group, max_bytes)) for group in groups]
    total = sum(map(len, divided))
    numbered = (f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1))
    names = iter([SINGLE]) if total == 1 else numbered
    return [[Shard(next(names), specs) for specs in parts] for parts in divided]


def split_by_bytes(specs: Sequence[TensorSpec], max_bytes: int) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors in parts of at most `max_bytes`; a larger tensor is a part of its own."""
    part: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if part and size + spec.num_bytes > max_bytes:
            yield part
            part, size = [], 0
        part.append(spec)
        size += spec.num_bytes
    if part:
        yield part


class ShardWriter:
    """Writes shards under temporary names. Nothing that a reader sees changes before `commit`.

    Tensors may come in any order; a shard is written, and its tensors let go, when it is complete.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], save_id: str) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o770, parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be made: {error}") from error
        self._shard_of = {spec.name: shard for shard in shards for spec in shard.specs}
        self._spec = {spec.name: spec for shard in shards for spec in shard.specs}
        self._held: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        self._left = {shard.file: len(shard.specs) for shard in shards}
        self._save_id = save_id

    def add_all(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.add(name, tensor)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor (copied to the CPU, cast to its planned dtype); write its shard if this was the last."""
        spec, shard = self._spec[name], self._shard_of[name]
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name!r} has shape {list(tensor.shape)}, expected {list(spec.shape)}")
        held = self._held[shard.file]
        held[name] = tensor.detach().to(device="cpu", dtype=spec.dtype, copy=True).contiguous()
        if len(held) < self._left[shard.file]:
            return
        path = partial_path(self.folder, shard.file, self._save_id)
        try:
            save_file({s.name: held[s.name] for s in shard.specs}, path, metadata={"format": "pt"})
            _settle(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be written: {error}. What {self.folder} held before is unchanged; is the disk full?"
            ) from error
        del self._held[shard.file], self._left[shard.file]

    def finish(self) -> None:
        """Raise CheckpointError if a planned tensor never came."""
        absent = [name for name, shard in self._shard_of.items() if shard.file in self._left]
        absent = [name for name in absent if name not in self._held.get(self._shard_of[name].file, {})]
        if absent:
            raise CheckpointError(f"tensors were planned and never came:\n{listed(absent)}")


def new_save_id() -> str:
    return secrets.token_hex(4)


def partial_path(folder: Path, file: str, save_id: str) -> Path:
    """Where a file lies until the commit; begins with a dot and has its own suffix, so that no reader takes it."""
    return folder / f".{file}.{save_id}.partial"


def discard(folder: Path, save_id: str) -> None:
    """Remove what an abandoned save left."""
    for path in folder.glob(f".*.{save_id}.partial"):
        path.unlink(missing_ok=True)


def commit(
    folder: Path, shards: Sequence[Shard], save_id: str, *, config: Mapping[str, Any], source: Path | None
) -> None:
    """Put the written shards in the place of what `folder` held. Called once, after every writer has finished.

    Some readers take model.safetensors before the index (transformers), others every file that the index, if there is
    one, names (vLLM). So new shards get names that the old checkpoint does not use, and while files of both lie there,
    an index says which count. For each kind of reader one rename or removal is the moment of change: a crash before it
    leaves the old checkpoint, one after it leaves the new one and some unused files.
    """
    try:
        _stage_passengers(folder, config, source, save_id)
        old = _weight_files(folder)
        if len(shards) == 1 and shards[0].file == SINGLE:
            final = {SINGLE: SINGLE}
            _move_passengers(folder, save_id)
            os.replace(partial_path(folder, SINGLE, save_id), folder / SINGLE)
            if (folder / INDEX).exists():
                _put_index(folder, save_id, shards, final)
        else:
            final = {s.file: s.file if s.file not in old else _tagged(s.file, save_id) for s in shards}
            if SINGLE in old and not (folder / INDEX).exists():
                _put_index(folder, save_id, [_shard_on_disk(folder, SINGLE)], {SINGLE: SINGLE})
            for shard in shards:
                os.replace(partial_path(folder, shard.file, save_id), folder / final[shard.file])
            _move_passengers(folder, save_id)
            _put_index(folder, save_id, shards, final)
        _sync_folder(folder)
        for name in sorted(old - set(final.values()), key=lambda name: name != SINGLE):
            (folder / name).unlink(missing_ok=True)
        if SINGLE in final:
            (folder / INDEX).unlink(missing_ok=True)
        _sync_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: the new checkpoint cannot be put in place: {error}") from error


def _weight_files(folder: Path) -> set[str]:
    """The files of the checkpoint that lies there, and those that an interrupted commit left; nobody else's."""
    found = {path.name for path in folder.glob("*.safetensors") if _OURS.fullmatch(path.name)}
    try:
        return found | set(_claimed_files(folder).values())
    except CheckpointError:  # none, or a damaged one
        return found


def _tagged(file: str, save_id: str) -> str:
    stem = file.removesuffix(".safetensors")
    return f"{_TAG.sub('', stem)}.{save_id}.safetensors"


def _shard_on_disk(folder: Path, file: str) -> Shard:
    checkpoint = Checkpoint.open(folder)
    return Shard(file, [spec for name, spec in checkpoint.specs.items() if checkpoint.files[name] == file])


def _put_index(folder: Path, save_id: str, shards: Sequence[Shard], final: Mapping[str, str]) -> None:
    """Make an index that names `shards`, under their `final` names, the folder's."""
    path = partial_path(folder, INDEX, save_id)
    weight_map = {spec.name: final[shard.file] for shard in shards for spec in shard.specs}
    total = sum(spec.num_bytes for shard in shards for spec in shard.specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _settle(path)
    os.replace(path, folder / INDEX)


def _stage_passengers(folder: Path, config: Mapping[str, Any], source: Path | None, save_id: str) -> None:
    """The config as given, and tokenizer and code files of the original, as partial files."""
    partial = partial_path(folder, "config.json", save_id)
    partial.write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    _settle(partial)
    if source is None or source.resolve() == folder.resolve():
        return
    for pattern in _PASSENGERS:
        for path in filter(Path.is_file, source.glob(pattern)):
            partial = partial_path(folder, path.name, save_id)
            shutil.copyfile(path, partial)
            _settle(partial)


def _move_passengers(folder: Path, save_id: str) -> None:
    for path in folder.glob(f".*.{save_id}.partial"):
        name = path.name.removeprefix(".").removesuffix(f".{save_id}.partial")
        if name != INDEX and not name.endswith(".safetensors"):
            os.replace(path, folder / name)


def _settle(path: Path) -> None:
    """Flush to disk, and close to other users: weights may be private."""
    with open(path, "rb") as file:
        os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & 0o770)
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
