"""The public API: `AutoBridge` finds a family, `Bridge` moves weights between HF checkpoints and Megatron-Core models.

Thin: what is stored where is planned in plan.py, files are read and written in checkpoint.py, ranks talk in gather.py.
Names and defaults are those that RL frameworks already call (mbridge 0.15), so a framework can switch by installing us.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import Checkpoint, fill_padding, holds_weights, names_in
from .errors import CheckpointError, ModelError, listed
from .export import RankLayout, StageExport, collective, save
from .families import LM_HEAD, Family, MegatronConfig, ValueHead, all_families, find_family, with_value_head
from .gather import BUCKET_BYTES, Bucket, exchange, on_all, world_group
from .hf_config import as_classifier, as_dict, normalise, read_hf_config
from .live import LiveTensors
from .megatron import LocalTensor, build_chunks, ensure_parallel_state, read_groups, read_topology, walk
from .megatron.build import Spec
from .pieces import TensorSpec
from .plan import Table, TrainerPlan, stored_by
from .spelling import Spelling

logger = logging.getLogger("mbridge")

Models = nn.Module | Sequence[nn.Module]

_LAYER_OF_NAME = re.compile(r"(?<=\blayers\.)\d+")


class AutoBridge:
    """Builds the `Bridge` of a model's family."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        trust_remote_code: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        *,
        make_vocab_size_divisible_by: int | None = None,
        ignore_config_fields: Sequence[str] = (),
        num_mtp_layers: int | None = None,
        value_head: int | ValueHead | None = None,
    ) -> Bridge:
        """The bridge of a checkpoint.

        Args:
            path: a folder with config.json and safetensors files, or a hub id that is already in the local cache.
            trust_remote_code: passed to transformers if `hf_config` is asked for; mbridge runs no code of a checkpoint.
            dtype: of the Megatron-Core parameters.
            make_vocab_size_divisible_by: embedding rows are padded to a multiple of this times tp (default 1).
            ignore_config_fields: config fields that you vouch for; any other unknown field is refused.
            num_mtp_layers: multi-token-prediction layers to build; by default those that the checkpoint holds weights
                of, and without a checkpoint those that the config claims (transformers 5 writes 1 for all DeepSeek-V3).
            value_head: the models have a linear layer of so many rows (and no bias) instead of the output layer. Only
                for models from elsewhere: what a callback of `get_model` puts there is found by itself.

        Raises ConfigError for a config that Megatron-Core or the family cannot express, naming its fields.
        """
        folder = _find_folder(path)
        return Bridge(
            read_hf_config(folder),
            dtype,
            path=folder,
            trust_remote_code=trust_remote_code,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            ignore_config_fields=ignore_config_fields,
            num_mtp_layers=num_mtp_layers,
            value_head=value_head,
        )

    @classmethod
    def from_config(
        cls,
        hf_config: object,
        dtype: torch.dtype = torch.bfloat16,
        *,
        make_vocab_size_divisible_by: int | None = None,
        ignore_config_fields: Sequence[str] = (),
        num_mtp_layers: int | None = None,
        value_head: int | ValueHead | None = None,
    ) -> Bridge:
        """The bridge of a transformers config object, or of the dict of a config.json. See `from_pretrained`."""
        return Bridge(
            as_dict(hf_config),
            dtype,
            hf_config=hf_config,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            ignore_config_fields=ignore_config_fields,
            num_mtp_layers=num_mtp_layers,
            value_head=value_head,
        )

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """The `model_type`s that have a family."""
        return sorted(all_families())


class Bridge:
    """A model's HF side and its Megatron-Core side. Make one with `AutoBridge`.

    `models` arguments take one chunk or a list of them, bare or wrapped (DDP, Float16Module), from `get_model` or from
    elsewhere: any megatron-core GPTModel of the family. Methods that say *collective* are to be called on every rank.
    """

    def __init__(
        self,
        raw_config: Mapping[str, Any],
        dtype: torch.dtype,
        *,
        path: Path | None = None,
        hf_config: object = None,
        trust_remote_code: bool = False,
        make_vocab_size_divisible_by: int | None = None,
        ignore_config_fields: Sequence[str] = (),
        num_mtp_layers: int | None = None,
        value_head: int | ValueHead | None = None,
    ) -> None:
        self.path = path
        self.dtype = dtype
        self.raw_config = dict(raw_config)
        self.models: list[nn.Module] = []
        """What `get_model` built last."""
        self._given_head = ValueHead(value_head) if isinstance(value_head, int) else value_head
        self.head = self._given_head
        """The layer that the models have instead of the output layer, if any."""
        self._hf_config = hf_config
        self._trust_remote_code = trust_remote_code
        self._vocab_divisor = make_vocab_size_divisible_by or 1
        self._extra_args: dict[str, Any] = {}
        self._normal = normalise(self.raw_config)
        if num_mtp_layers is None:
            num_mtp_layers = self._mtp_layers_on_disk()
        if num_mtp_layers is not None:
            self._normal["num_nextn_predict_layers"] = num_mtp_layers
        self._family: Family = find_family(self._normal.get("model_type"))
        self._family.check(self._normal, ignore_config_fields)

    def _mtp_layers_on_disk(self) -> int | None:
        """How many of the claimed MTP layers have weights; None if the config claims none or there are no files."""
        claimed = self._normal.get("num_nextn_predict_layers")
        if not claimed or self.path is None or not holds_weights(self.path):
            return None
        first, names = self._normal["num_hidden_layers"], names_in(self.path)
        found = sum(f"model.layers.{first + n}.eh_proj.weight" in names for n in range(claimed))
        if found < claimed:
            logger.info("%s: the config claims %d MTP layers, its files hold %d", self.path, claimed, found)
        return found

    @property
    def hf_config(self) -> Any:
        """The transformers config: the one given, else read from `path` by transformers (imported then)."""
        if self._hf_config is None:
            from transformers import AutoConfig

            self._hf_config = AutoConfig.from_pretrained(self.path, trust_remote_code=self._trust_remote_code)
        return self._hf_config

    @property
    def config(self) -> Any:
        """Megatron-Core's TransformerConfig of this model under the present parallel state."""
        from .megatron.build import transformer_config

        return transformer_config(self.megatron_config(), dtype=self.dtype, extra_transformer=self._extra_args)

    def set_extra_args(self, **transformer_config: Any) -> None:
        """Fields of TransformerConfig that win over those of the family, for models built from now on."""
        self._extra_args.update(transformer_config)

    def megatron_config(self, tp: int = 1) -> MegatronConfig:
        """The family's TransformerConfig and GPTModel arguments, the vocabulary padded for `tp` ranks."""
        config = self._family.megatron(self._normal)
        multiple = self._vocab_divisor * tp
        padded = -(-config.gpt["vocab_size"] // multiple) * multiple
        return MegatronConfig(config.transformer, {**config.gpt, "vocab_size": padded})

    def get_model(
        self,
        weight_path: str | Path | None = None,
        wrap_with_ddp: bool = False,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_cpu_initialization: bool = False,
        ddp_config: Mapping[str, Any] | object | None = None,
        post_model_creation_callbacks: Sequence[Callable[..., object]] = (),
        extra_provider_args: Mapping[str, Any] | None = None,
        data_parallel_random_init: bool = True,
        *,
        spec: Spec = "auto",
    ) -> list[nn.Module]:
        """Megatron-Core chunks of this rank, one per virtual pipeline stage. Collective.

        Uses the parallel state that exists; in a plain Python process it starts a world of one rank and logs that.

        Args:
            weight_path: load these weights too; without it the weights are random.
            fp16, bf16: wrap in Float16Module; follow the bridge's `dtype` when not given.
            spec: "te" (TransformerEngine layers), "local" (Megatron-Core's own), or "auto".
            post_model_creation_callbacks: called on each chunk before it is moved and wrapped (megatron/build.py). If
                one puts a linear layer of few rows in the place of the output layer, that is a value head: it is
                loaded from and exported as `score`, see `head`.
            extra_provider_args: arguments of GPTModel that win over those of the family.
        """
        ensure_parallel_state()
        topology, _ = read_topology()
        self.models = build_chunks(
            self.megatron_config(topology.tp),
            dtype=self.dtype,
            spec=spec,
            wrap_with_ddp=wrap_with_ddp,
            fp16=self.dtype is torch.float16 if fp16 is None else fp16,
            bf16=self.dtype is torch.bfloat16 if bf16 is None else bf16,
            use_cpu_initialization=use_cpu_initialization,
            initialize=weight_path is None,
            ddp_config=ddp_config,
            data_parallel_random_init=data_parallel_random_init,
            post_model_creation_callbacks=post_model_creation_callbacks,
            extra_transformer=self._extra_args,
            extra_gpt=extra_provider_args or {},
            # Only callbacks see it, and they expect what transformers makes of the config.
            hf_config=self.hf_config if post_model_creation_callbacks else self.raw_config,
        )
        self.head = self._find_head(self.models)
        if weight_path is not None:
            self.load_weights(self.models, weight_path)
        return self.models

    def _find_head(self, models: Models) -> ValueHead | None:
        """The value head that a callback put on the last stage, on every rank. Collective."""
        found: ValueHead | None = None
        outside = {local.name: local.tensor for local in walk(models) if local.global_layer is None}
        weight, tp = outside.get("output_layer.weight"), read_topology()[0].tp
        if weight is not None and weight.dim() == 2 and weight.shape[0] * tp < self._normal["vocab_size"]:
            dtype = None if weight.dtype is self.dtype else weight.dtype
            found = ValueHead(weight.shape[0], "output_layer.bias" in outside, dtype)
        heads = {head for head in exchange(found, collective(read_groups().pp)) if head is not None}
        if len(heads) > 1 or (self._given_head is not None and heads != {self._given_head}):
            raise ModelError(f"expected {self._given_head or 'one value head'}; the callbacks made {heads or 'none'}")
        for head in heads:
            logger.info("the output layer is %s: it is exported as score, and %s is not read", head, LM_HEAD)
        return next(iter(heads), None)

    def load_weights(self, models: Models, weights_path: str | Path, memory_efficient: bool = False) -> int:
        """Load a checkpoint into the chunks. Returns the bytes this rank read. No collectives.

        Each rank reads only what it stores, slice by slice, so memory is one slice a thread whether `memory_efficient`
        is set or not. Every header is checked before the first element is written: on CheckpointError (which lists each
        missing, extra, mis-shaped or non-float tensor) or ModelError the model is as it was. A value head that the
        files do not have keeps its values, which is logged.
        """
        layout, tensors = self._layout(models)
        layout.check_complete()
        checkpoint = Checkpoint.open(_find_folder(weights_path))
        spelling = self._spelling(layout.table, checkpoint)
        expected = [spec for group in spelling.groups(layout.table.groups()) for spec in group]
        pieces = spelling.pieces(layout.stored.pieces, with_copies=False)
        redundant = list(self._family.redundant(self._normal))
        if self.head is not None:
            redundant += self._output_layer_names()
            names = {name for row in layout.table.rows if row.mcore[0].startswith("output_layer.") for name in row.hf}
            if names.isdisjoint(checkpoint.specs):
                logger.warning("%s has no %s: the value head keeps its values", checkpoint.folder, sorted(names))
                expected = [spec for spec in expected if spec.name not in names]
                pieces = [piece for piece in pieces if piece.hf_name not in names]
        checkpoint.check(expected, redundant)
        num_bytes = checkpoint.read_into(tensors, pieces)
        fill_padding(tensors, layout.stored.padding)
        return num_bytes

    def export_weights(self, models: Models) -> Iterator[tuple[str, torch.Tensor]]:
        """Every HF tensor on every rank, stage by stage, as (HF name, tensor). Collective.

        The tensors are copies that stay valid. `export_buckets` is faster: it does not cross stages.
        """
        for bucket in self._export(models).to_every_rank():
            yield from bucket.tensors

    def export_buckets(
        self, models: Models, *, bucket_bytes: int = BUCKET_BYTES, reuse: bool = True
    ) -> Iterator[Bucket]:
        """This stage's HF tensors in layer order, in buckets, on the stage's sender (its first tp rank). Collective.

        The other ranks of the stage get no bucket, but have to run the iterator to its end. With `reuse`, a bucket is
        valid until the second next one is asked for: two buckets are all the memory that it takes.
        """
        return self._export(models, bucket_bytes=bucket_bytes).to_sender(reuse=reuse)

    def save_weights(
        self,
        models: Models,
        weights_path: str | Path,
        memory_efficient: bool = False,
        distributed_filesystem: bool = False,
        strict: bool = True,
    ) -> None:
        """Write a HF checkpoint: safetensors shards, index, config and tokenizer files. Collective.

        Names, shapes, dtypes and, with one writer, the division into files are those of the checkpoint that the bridge
        was made from. Until all is written nothing of what `weights_path` held is touched (checkpoint.commit).

        Args:
            memory_efficient: accepted for compatibility: a writer never holds more than its incomplete shards.
            distributed_filesystem: every pipeline stage writes its own shards; all ranks must see `weights_path`.
            strict: False leaves tensors out that no rank has, instead of raising PlanError.

        Raises CheckpointError on the rank that cannot write, for example because its disk is full, and PeerError on all
        others.
        """
        export = self._export(models, strict=strict)
        original = on_all(self._original, world_group())
        config = self.raw_config
        if original is not None and original.scaled:
            logger.warning("%d tensors of %s are fp8; they are saved in bfloat16", len(original.scaled), self.path)
        config = {name: value for name, value in config.items() if name != "quantization_config"}
        if self.head is not None:
            config = as_classifier(config, self.head.size, bias=self.head.bias)
        folder = Path(weights_path)
        save(export, folder, by_stage=distributed_filesystem, original=original, config=config, source=self.path)

    def hf_tensors(self) -> list[TensorSpec]:
        """Names, shapes and dtypes of the HF tensors that the config describes, in layer order. Needs no model."""
        table = self._table()
        return [spec for group in self._spelling(table, None).groups(table.groups()) for spec in group]

    def plan(self, models: Models) -> TrainerPlan:
        """What this rank stores and sends, for mbridge_rl. No collectives."""
        layout, _ = self._layout(models)
        spelling, stored = self._spelling(layout.table, None), layout.stored
        pieces, owned = (tuple(spelling.pieces(p, with_copies=False)) for p in (stored.pieces, stored.owned))
        groups = spelling.groups(layout.table.groups())
        return TrainerPlan.of(
            layout.table, layout.topology, layout.at, stored._replace(pieces=pieces, owned=owned), groups
        )

    def local_tensors(self, models: Models) -> dict[str, torch.Tensor]:
        """This rank's live parameters and buffers by the local names that pieces use, looked up afresh at each call."""
        return {name: local.tensor.data for name, local in _by_global_name(models).items()}

    def live_tensors(self, models: Models) -> LiveTensors:
        """The same as a view: each access reads the parameter as it is then, without walking the model."""
        return LiveTensors({name: (local.holder, local.key) for name, local in _by_global_name(models).items()})

    def _layout(self, models: Models) -> tuple[RankLayout, dict[str, torch.Tensor]]:
        """What this rank stores, as pieces and as tensors. Raises ModelError for a model of another shape."""
        tensors = self.local_tensors(models)
        scattered = [name for name, tensor in tensors.items() if not tensor.is_contiguous()]
        if scattered:
            raise ModelError(f"parameters must be contiguous in memory; these are not:\n{listed(scattered)}")
        specs = tuple(TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())
        topology, at = read_topology()
        table = self._table()
        return RankLayout(topology, at, table, specs, stored_by(table, topology, at, specs)), tensors

    def _spelling(self, table: Table, checkpoint: Checkpoint | None) -> Spelling:
        """How `checkpoint` names and lays out the table's tensors; without one, as engines do."""
        found = {} if checkpoint is None else checkpoint.specs
        family, config = self._family, self._normal
        duplicates = dict(family.duplicates(config))
        if self.head is not None:
            for name in self._output_layer_names():
                duplicates.pop(name, None)
        return Spelling.of(table, family.fused_experts(config), duplicates, found)

    def _output_layer_names(self) -> list[str]:
        """HF names that files may have of the output layer that a value head replaces."""
        duplicates = self._family.duplicates(self._normal)
        return [LM_HEAD, *(name for name, original in duplicates.items() if original == LM_HEAD)]

    def _original(self) -> Checkpoint | None:
        """The checkpoint that the bridge was made from, if it holds weights."""
        return Checkpoint.open(self.path) if self.path is not None and holds_weights(self.path) else None

    def _table(self) -> Table:
        rows = self._family.rows(self._normal)
        if self.head is not None:
            rows = with_value_head(rows, self.head, self._normal["hidden_size"])
        return Table(rows, self._normal["num_hidden_layers"], self.dtype)

    def _export(self, models: Models, *, bucket_bytes: int = BUCKET_BYTES, strict: bool = True) -> StageExport:
        layout, tensors = on_all(lambda: self._layout(models), world_group())
        return StageExport(
            layout,
            tensors,
            read_groups(),
            self._spelling(layout.table, on_all(self._original, world_group())),
            bucket_bytes=bucket_bytes,
            strict=strict,
        )


def _by_global_name(models: Models) -> dict[str, LocalTensor]:
    found: dict[str, LocalTensor] = {}
    for local in walk(models):
        name = _global_name(local)
        if name in found:
            raise ModelError(f"two parameters here are {name!r} of the whole model; is a layer number wrong?")
        found[name] = local
    return found


def _global_name(local: LocalTensor) -> str:
    """The local name with the layer's number in the whole model: unique over chunks, and what the tables speak of."""
    if local.global_layer is None:
        return local.name
    return _LAYER_OF_NAME.sub(str(local.global_layer), local.name, count=1)


def _find_folder(path: str | Path) -> Path:
    """A folder as it is; a hub id as its snapshot in the local cache. Nothing is downloaded."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{path} is not a folder, and without huggingface_hub it cannot be looked up as a hub id; give a folder"
        ) from error

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{path} is neither a folder nor a hub id in the local cache. mbridge downloads nothing; "
            f"run `hf download {path}` first, or give a folder"
        ) from error
