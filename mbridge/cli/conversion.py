"""`convert`: a checkpoint in other shards or another dtype. Files only: no Megatron-Core, no process group."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..bridge import AutoBridge
from ..checkpoint import Checkpoint, Shard, ShardWriter, commit, discard, new_save_id, plan_shards, split_by_bytes
from ..errors import CheckpointError, listed
from ..pieces import whole_pieces
from .display import Progress, readable_bytes

BATCH_BYTES = 256 * 1024**2  # read at once; a tensor that is larger comes alone


def convert(
    path: str,
    out: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int | None,
    ignore_config_fields: Sequence[str] = (),
) -> None:
    """Write the checkpoint `path` to `out`, with its config and tokenizer files; `out` may be `path` itself.

    Args:
        dtype: of all tensors but those that the family keeps in one of their own (DeepSeek's fp32 expert bias).
        max_shard_bytes: size of the files; None keeps the division into files.

    Raises CheckpointError for files that cannot be read or written (what `out` held is then unchanged), ConfigError for
    a model that no family knows, since its family says what must not be cast.
    """
    bridge = AutoBridge.from_pretrained(path, dtype=dtype or torch.bfloat16, ignore_config_fields=ignore_config_fields)
    assert bridge.path is not None
    checkpoint = Checkpoint.open(bridge.path)
    if checkpoint.odd_dtypes:
        odd = (f"{name} is {found}" for name, found in checkpoint.odd_dtypes.items())
        raise CheckpointError(f"{bridge.path} has tensors that cannot be converted:\n{listed(odd)}")
    specs = list(checkpoint.specs.values())
    if dtype is not None:
        kept = {spec.name: spec.dtype for spec in bridge.hf_tensors() if spec.dtype is not dtype}
        specs = [spec._replace(dtype=kept.get(spec.name, dtype)) for spec in specs]
    files = checkpoint.files if max_shard_bytes is None else None
    (shards,) = plan_shards([specs], files, *([] if max_shard_bytes is None else [max_shard_bytes]))
    config = _config(bridge.raw_config, dtype, fp8=bool(checkpoint.scaled))
    _write(checkpoint, out, shards, config)
    size = readable_bytes(sum(spec.num_bytes for spec in specs))
    print(f"{out}: {len(specs)} tensors, {size} in {len(shards)} files")
    if checkpoint.scaled:
        print(f"{len(checkpoint.scaled)} tensors were fp8 with block scales; they are now in another dtype")


def _write(checkpoint: Checkpoint, out: Path, shards: Sequence[Shard], config: Mapping[str, Any]) -> None:
    save_id = new_save_id()
    writer = ShardWriter(out, shards, save_id)
    total = sum(len(shard.specs) for shard in shards)
    try:
        with Progress() as progress, tempfile.TemporaryDirectory(prefix="mbridge-convert-") as folder:
            done = 0
            for batch in itertools.chain.from_iterable(split_by_bytes(shard.specs, BATCH_BYTES) for shard in shards):
                progress.update("convert", done, total)
                tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in batch}
                checkpoint.read_into(tensors, whole_pieces(batch))
                writer.add_all(tensors.items())
                done += len(batch)
            progress.update("convert", done, total)
            writer.finish()
            commit(out, shards, save_id, config=config, source=_passengers(checkpoint.folder, Path(folder), config))
    finally:
        discard(out, save_id)


def _passengers(source: Path, folder: Path, config: Mapping[str, Any]) -> Path:
    """`folder`, made to look like `source` but for its config: a commit copies the config of its source."""
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _config(raw: Mapping[str, Any], dtype: torch.dtype | None, *, fp8: bool) -> dict[str, Any]:
    config = {name: value for name, value in raw.items() if not (fp8 and name == "quantization_config")}
    if dtype is not None:
        spelling = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
        config |= dict.fromkeys(spelling, str(dtype).removeprefix("torch."))
    return config
