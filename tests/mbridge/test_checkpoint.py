"""Files: what `Checkpoint` refuses, and what is on disk at each moment of a save."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mbridge.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Shard,
    ShardWriter,
    commit,
    discard,
    new_save_id,
    partial_path,
    plan_shards,
)
from mbridge.errors import CheckpointError
from mbridge.pieces import Box, Piece, Region, TensorSpec, whole_pieces

SPECS = [TensorSpec(name, (4, 6), torch.float32) for name in ("a", "b", "c")]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def values(offset: int = 0) -> dict[str, torch.Tensor]:
    return {s.name: torch.arange(24.0).view(4, 6) + 100 * i + offset for i, s in enumerate(SPECS)}


def write_sharded(folder: Path, offset: int = 0) -> None:
    tensors = values(offset)
    save_file({name: tensors[name] for name in "ab"}, folder / FIRST)
    save_file({"c": tensors["c"]}, folder / SECOND)
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND})


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_single(folder: Path, offset: int = 0) -> None:
    save_file(values(offset), folder / SINGLE)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What a reader of whole tensors finds there."""
    checkpoint = Checkpoint.open(folder)
    tensors = {name: torch.zeros(spec.shape) for name, spec in checkpoint.specs.items()}
    checkpoint.read_into(tensors, whole_pieces(checkpoint.specs.values()))
    return tensors


def assert_holds(folder: Path, offset: int) -> None:
    found = loaded(folder)
    assert found.keys() == values().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in values(offset).items())


def as_vllm_reads(folder: Path) -> dict[str, torch.Tensor]:
    """Every *.safetensors file, less those that the index, if any, does not name. A name found twice is an error."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        named = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        assert named <= {file.name for file in files}
        files = [file for file in files if file.name in named]
    found: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


@pytest.mark.parametrize("write", [write_single, write_sharded], ids=["single", "sharded"])
def test_slices_land_in_their_regions_and_only_they_are_read(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    target = {"x": torch.full((3, 5), -1.0, dtype=torch.float64)}
    pieces = [
        Piece("a", Box((1, 2), (3, 5)), "x", Region.contiguous((3, 5)).part((0, 1), (2, 3))),
        Piece("c", Box((0, 0), (1, 5)), "x", Region.contiguous((3, 5)).part((2, 0), (1, 5))),
    ]
    num_bytes = Checkpoint.open(tmp_path).read_into(target, pieces)
    expected = torch.full((3, 5), -1.0, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            expected[i, 1 + j] = values()["a"][1 + i, 2 + j]
    for j in range(5):
        expected[2, j] = values()["c"][0, j]
    assert torch.equal(target["x"], expected)
    assert num_bytes == (6 + 5) * 4


def test_missing_extra_misshaped_and_odd_tensors_are_all_listed(tmp_path: Path) -> None:
    tensors = values()
    save_file(
        {"a": tensors["a"].T.contiguous(), "b": tensors["b"].to(torch.int8), "d": tensors["c"]}, tmp_path / SINGLE
    )
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path).check(SPECS)
    text = str(caught.value)
    assert "missing: c [4, 6]" in text
    assert "extra: d [4, 6]" in text
    assert "shape: a is [6, 4], expected [4, 6]" in text
    assert "dtype: b is I8" in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.bool], ids=str)
def test_a_tensor_that_is_no_plain_float_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({**values(), "b": torch.zeros(4, 6).to(dtype)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="dtype: b is"):
        Checkpoint.open(tmp_path).check(SPECS)


def test_redundant_names_are_passed_over(tmp_path: Path) -> None:
    save_file({**values(), "layers.3.freq": torch.zeros(2), "layersX3.freq": torch.zeros(2)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"extra: layersX3") as caught:
        Checkpoint.open(tmp_path).check(SPECS, ["layers.{layer}.freq"])
    assert "layers.3" not in str(caught.value)


def cut_short(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-8])


def cut_in_the_header(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:20])


def emptied(folder: Path) -> None:
    (folder / SECOND).write_bytes(b"")


def huge_header(folder: Path) -> None:
    (folder / SECOND).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def file_gone(folder: Path) -> None:
    (folder / SECOND).unlink()


def tensor_elsewhere(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": FIRST, "c": FIRST})


def unnamed_tensor(folder: Path) -> None:
    save_file({"c": values()["c"], "d": values()["c"]}, folder / SECOND)


def no_json(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def no_text(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\xff\xfe{")


def no_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}}')


def map_of_another_kind(folder: Path) -> None:
    write_index(folder, ["a", "b"])


def map_to_another_kind(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": [FIRST], "c": 3})


def outside_the_folder(folder: Path) -> None:
    shutil.copy(folder / SECOND, folder.parent / "elsewhere.safetensors")
    write_index(folder, {"a": FIRST, "b": FIRST, "c": "../elsewhere.safetensors"})


def nothing_there(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGE = {
    cut_short: "cannot be read",
    cut_in_the_header: "cannot be read",
    emptied: "cannot be read",
    huge_header: "cannot be read",
    file_gone: f"names files that are not there: {SECOND}",
    tensor_elsewhere: f"c in {FIRST}",
    unnamed_tensor: "extra: d",
    no_json: "no safetensors index",
    no_text: "no safetensors index",
    no_map: "no safetensors index",
    map_of_another_kind: "no safetensors index",
    map_to_another_kind: "no safetensors index",
    outside_the_folder: "elsewhere",
    nothing_there: "expected a safetensors checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_files_are_found_before_anything_is_read(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_sharded(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=DAMAGE[damage]) as caught:
        Checkpoint.open(folder).check(SPECS)
    assert str(folder) in str(caught.value)


def shards_for(*, sharded: bool) -> list[Shard]:
    groups = [SPECS[:2], SPECS[2:]] if sharded else [SPECS]
    return [shard for shards in plan_shards(groups) for shard in shards]


def written(folder: Path, shards: list[Shard], offset: int) -> str:
    save_id = new_save_id()
    ShardWriter(folder, shards, save_id).add_all(reversed(values(offset).items()))
    return save_id


@pytest.mark.parametrize("old", ["nothing", "single", "sharded"])
@pytest.mark.parametrize("new", ["single", "sharded"])
def test_a_save_takes_the_place_of_what_was_there(tmp_path: Path, old: str, new: str) -> None:
    {"nothing": lambda folder: None, "single": write_single, "sharded": write_sharded}[old](tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"somebody else's")
    for offset in (1000, 2000, 3000):
        shards = shards_for(sharded=new == "sharded")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        save_id = written(tmp_path, shards, offset)
        for name, content in before.items():  # not touched before the commit
            assert (tmp_path / name).read_bytes() == content
        commit(tmp_path, shards, save_id, config={"model_type": "x"}, source=None)
        assert_holds(tmp_path, offset)
        assert list(tmp_path.glob("*.partial")) == list(tmp_path.glob(".*")) == []
        assert len(list(tmp_path.glob("model*.safetensors"))) == len(shards)
        assert (tmp_path / SINGLE).exists() == (new == "single")
        assert (tmp_path / INDEX).exists() == (new == "sharded")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("old", ["single", "sharded"])
@pytest.mark.parametrize("new", ["single", "sharded"])
def test_at_every_step_of_a_commit_both_kinds_of_reader_find_one_whole_checkpoint(
    tmp_path: Path, old: str, new: str
) -> None:
    """The folder is copied before each call that changes it (as a crash there would leave it), then read twice."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    {"single": write_single, "sharded": write_sharded}[old](folder)
    shards = shards_for(sharded=new == "sharded")
    save_id = written(folder, shards, 1000)
    snapshots = record_changes(lambda: commit(folder, shards, save_id, config={}, source=None), folder, tmp_path)
    assert len(snapshots) > 3
    seen = []
    for snapshot in [*snapshots, folder]:
        for found in (loaded(snapshot), as_vllm_reads(snapshot)):
            offset = int(found["a"][0, 0])
            seen.append(offset)
            assert all(torch.equal(found[name], tensor) for name, tensor in values(offset).items())
            assert found.keys() == values().keys()
    for reader in (seen[::2], seen[1::2]):  # first the old one, from some step on the new one
        assert reader == sorted(reader)
        assert (reader[0], reader[-1]) == (0, 1000)


def record_changes(action: Callable[[], None], folder: Path, scratch: Path) -> list[Path]:
    """Copies of `folder` before each rename, removal and opening for writing inside `action` (by audit hooks)."""
    import sys

    snapshots: list[Path] = []
    state = {"on": True, "busy": False}

    def hook(event: str, args: tuple[object, ...]) -> None:
        writes = event in ("os.rename", "os.remove") or (event == "open" and "w" in str(args[1]))
        if not (state["on"] and writes) or state["busy"]:
            return
        state["busy"] = True
        try:
            snapshots.append(scratch / f"snapshot{len(snapshots)}")
            shutil.copytree(folder, snapshots[-1])
        finally:
            state["busy"] = False

    sys.addaudithook(hook)  # cannot be removed, so it is switched off
    try:
        action()
    finally:
        state["on"] = False
    return snapshots


def test_abandoned_saves_leave_nothing(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    one, other = written(tmp_path, shards_for(sharded=True), 1000), written(tmp_path, shards_for(sharded=False), 2000)
    discard(tmp_path, one)
    assert partial_path(tmp_path, SINGLE, other).exists()  # another save under way keeps its files
    discard(tmp_path, other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_incomplete_or_misshaped_save_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shards_for(sharded=True), new_save_id())
    writer.add("a", values()["a"])
    with pytest.raises(CheckpointError, match=r"(?s)never came.*- b\n.*- c$"):
        writer.finish()
    with pytest.raises(CheckpointError, match=r"'b' has shape \[6, 4\], expected \[4, 6\]"):
        writer.add("b", values()["b"].T)


def test_config_tokenizer_and_code_come_along_and_nothing_else(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_sharded(source)
    kept = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
            "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja", "modeling_x.py"]  # fmt: skip
    for name in [*kept, "README.md", "optimizer.pt", "pytorch_model.bin"]:
        (source / name).write_text(name)
    (source / "tokenizer.extra").mkdir()  # matches a pattern and is no file
    shards = shards_for(sharded=False)
    commit(folder, shards, written(folder, shards, 0), config={"other": 1}, source=source)
    assert {path.name for path in folder.iterdir()} == {*kept, SINGLE}
    assert all((folder / name).read_text() == name for name in kept if name != "config.json")
    assert json.loads((folder / "config.json").read_text()) == {"other": 1}  # as given, not as it lies in the source
    assert {path.stat().st_mode & 0o007 for path in folder.iterdir()} == {0}
    assert folder.stat().st_mode & 0o007 == 0


def test_shards_divide_by_size_or_as_the_original() -> None:
    size = SPECS[0].num_bytes
    by_size = plan_shards([SPECS], max_bytes=2 * size)
    assert [[[s.name for s in shard.specs] for shard in shards] for shards in by_size] == [[["a", "b"], ["c"]]]
    assert [shard.file for shard in plan_shards([SPECS], max_bytes=1)[0]] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    original = {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors", "more": "z.safetensors"}
    divided = {shard.file: [s.name for s in shard.specs] for shard in plan_shards([SPECS], original)[0]}
    assert divided == {"x.safetensors": ["a", "c"], "y.safetensors": ["b"]}
    two = plan_shards([SPECS[:1], SPECS[1:]], original)  # two writers cannot keep it
    assert [[shard.file for shard in shards] for shards in two] == [[FIRST], [SECOND]]
