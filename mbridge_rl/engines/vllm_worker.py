"""The backend `mbridge` inside a vLLM worker process: vLLM's four weight-transfer calls, forwarded to a Receiver.

What does not go directly into the model's memory goes through vLLM's own `load_weights` inside its layerwise reload,
with exactly one initialize and one finalize around a refit: modules that vLLM post-processes are post-processed again,
and kernel tensors keep their addresses. From vLLM 0.26 on the base class leaves both to the backend.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers import attention
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from mbridge.live import LiveTensors
from mbridge.pieces import TensorSpec

from ..errors import EngineMismatchError
from ..messages import Invitation
from ..placement import place
from ..receiver import Receiver
from ..recorder import DryRun, Loader, dry_run
from ..target import Examined, Target, device_event

# Of torch.nn.Module itself: what a reload replaces and puts back.
MODULE_FIELDS = frozenset(vars(torch.nn.Module()))
PLAIN = (bool, int, float, str, bytes, tuple, list, dict, set, frozenset, torch.dtype, torch.device, torch.Size)


@dataclass
class MBridgeInitInfo(WeightTransferInitInfo):
    """Fields of `messages.Invitation`, as JSON."""

    invitation: dict[str, Any]


@dataclass
class MBridgeUpdateInfo(WeightTransferUpdateInfo):
    """Which refit of the trainer's this is."""

    attempt: int
    version: int
    moves: bool


class MBridgeWeightTransferEngine(WeightTransferEngine[MBridgeInitInfo, MBridgeUpdateInfo]):
    """Built by vLLM in every worker with `(config, vllm_config, device, model)`."""

    init_info_cls = MBridgeInitInfo
    update_info_cls = MBridgeUpdateInfo
    supports_draft_weight_update = False

    _receiver: Receiver | None = None

    @property
    def receiver(self) -> Receiver:
        """Made when first used: by then vLLM has finished the model."""
        if self._receiver is None:
            parallel = self.vllm_config.parallel_config
            index = parallel.data_parallel_index * parallel.world_size + parallel.rank
            target = VLLMTarget(self.model, self.vllm_config, self.device)
            self._receiver = Receiver(target, index)
        return self._receiver

    def init_transfer_engine(self, init_info: MBridgeInitInfo) -> None:
        self.receiver.attach(msgspec.convert(init_info.invitation, Invitation))

    def start_weight_update(self) -> None:
        self.receiver.open_session()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class then waits for the device. Our receiver does, later: copies go on while vLLM answers calls.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: MBridgeUpdateInfo) -> None:
        with set_current_vllm_config(self.vllm_config):  # vLLM itself does so from 0.31 on
            self.receiver.run(update_info.attempt, update_info.version, update_info.moves)

    def finish_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            self.receiver.close_session()

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.detach()

    @staticmethod
    def trainer_send_weights(*args: Any, **kwargs: Any) -> None:
        """Abstract in vLLM 0.26; the trainer's side is `mbridge_rl.WeightSyncer`."""
        raise NotImplementedError("use mbridge_rl.WeightSyncer in the trainer")


class VLLMTarget(Target):
    """One worker's vLLM model, loaded through vLLM's layerwise reload, of all modules or of some."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any, device: torch.device) -> None:
        self.device = device
        self._model, self._vllm_config = model, vllm_config
        self._load_weights = cast(Loader, model.load_weights)
        self._model_config = vllm_config.model_config
        self._modules = dict(model.named_modules())
        self._live = LiveTensors.of(model)
        self._selection = Selection(self._modules.values())
        self._is_partial = False
        self._tied: list[torch.nn.Module] = []
        self._aside: list[tuple[Any, Any, Any]] = []  # fused-MoE methods with their kernel and its quantisation config
        self._before: dict[str, list[tuple[str, object]]] = {}
        # Attention may compute with what it made of other modules' weights (MLA's kv_b_proj, sinks), so vLLM's own
        # reload processes all of it again, whatever was loaded.
        self._attention = [module for module in self._modules.values() if _is_deferred(module)]

    def examine(self, tensors: tuple[TensorSpec, ...]) -> Examined:
        aliases = _aliases(self._model)
        with self._in_load_format():
            wanted = {name for name, _ in self._model.named_parameters()}
            found = dry_run(self._load_weights, tensors)
            there = LiveTensors.of(self._model)
            placement = place(found, there, {name: name.rpartition(".")[0] for name in (*self._live, *there)})
        # As vLLM's own loader does, of unquantised models: others have parameters that nothing is loaded to.
        if self._model_config.quantization is None:
            shared = {alias for name in placement.written for alias in aliases.get(name, ())}
            missing = sorted(wanted - placement.written - shared)
            if missing:
                raise EngineMismatchError(
                    f"the trainer has no tensor for {len(missing)} parameters of the engine: {', '.join(missing[:5])}. "
                    "Is it the same model?",
                    tensor=missing[0],
                )
        self._tied = [
            module
            for path, module in self._modules.items()
            if any(
                len(aliases.get(name, ())) > 1 and name not in placement.written for name in _own_names(path, module)
            )
        ]
        if self._vllm_config.parallel_config.enable_eplb:
            placement.opaque |= dict.fromkeys(
                placement.module_of.values(), "EPLB moves experts while the engine serves"
            )
        return Examined(found, placement)

    def rehearse(self, tensors: tuple[TensorSpec, ...]) -> DryRun:
        with self._in_load_format():
            return dry_run(self._load_weights, tensors)

    @contextmanager
    def _in_load_format(self) -> Iterator[None]:
        """Inside, the model has the parameters that its loaders want, without data; the live ones come back after."""
        with set_current_vllm_config(self._vllm_config), torch.no_grad():
            initialize_layerwise_reload(self._model)
            try:
                # The loaders themselves, without reload's wrappers, which would process a layer when its tensors are
                # there.
                for module in self._model.modules():
                    for tensor in (*module._parameters.values(), *module._buffers.values()):
                        _unwrap_loader(tensor)
                yield
            finally:
                self.abandon()

    def begin(self, modules: frozenset[str] | None = None) -> None:
        self.kept_bytes = 0
        self._is_partial = modules is not None
        self._selection = Selection(self._modules[path] for path in (self._modules if modules is None else modules))
        if modules is None:
            self._before = {path: _attributes(self._modules[path]) for path in self.processed_modules()}
        if self._selection:
            initialize_layerwise_reload(self._selection)
            self._set_packing_kernels_aside()

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        storages: set[int] = set()

        def noted() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                storages.add(tensor.untyped_storage().data_ptr())
                yield name, tensor

        loaded = self._load_weights(noted()) or set()
        self._keep_pending(storages)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return loaded

    def finish(self) -> None:
        if self._selection:
            for module in self._selection.modules():
                info = get_layerwise_info(module)
                if info.can_load() and info.load_numel == 0:
                    info.load_numel_total = 0  # the receiver has checked that nothing is missing: no warning, please
            finalize_layerwise_reload(self._selection, self._model_config)
            self._put_kernels_back()
        # A tied lm_head shares the embedding's memory but not what was made of it after loading (packed weights on
        # CPU).
        for module in self._tied:
            quant_method = getattr(module, "quant_method", None)
            if isinstance(quant_method, QuantizeMethodBase):
                quant_method.process_weights_after_loading(module)
        if self._is_partial:
            for layer in self._attention:
                layer.process_weights_after_loading(self._model_config.dtype)

    def abandon(self) -> None:
        # Forget what reload has kept of incomplete layers; finalize then puts their live tensors back as they are.
        for module in self._model.modules():
            info = get_layerwise_info(module)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = info.load_numel_total = 0
        finalize_layerwise_reload(self._model, self._model_config)
        self._put_kernels_back()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def pending(self) -> Callable[[], None] | None:
        return device_event(self.device)

    def live(self) -> Mapping[str, torch.Tensor]:
        return self._live

    def processed_modules(self) -> set[str]:
        return {
            path
            for path, module in self._modules.items()
            if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase) or _is_deferred(module)
        }

    def remade(self) -> dict[str, str]:
        found = {}
        for path, before in self._before.items():
            now = dict(_attributes(self._modules[path]))
            other = [name for name, value in before if not _is_same(value, now.pop(name, None))]
            if other or now:
                found[path] = f"after loading vLLM makes {', '.join([*other, *now][:3])} anew"
        self._before.clear()
        return found

    def _set_packing_kernels_aside(self) -> None:
        """Let unquantised MoE layers whose kernel packs its weights (on CPU) be packed again.

        vLLM 0.32's UnquantizedFusedMoEMethod packs only while it has no kernel yet, so a reload, its own too, leaves
        raw weights where packed ones are read: wrong tokens, no error. Can go when vLLM packs in both branches of
        `_setup_kernel`. The kernels are put back afterwards: they refer to the layer's lasting tensors.
        """
        for module in self._selection.modules():
            method = getattr(module, "quant_method", None)
            if not isinstance(method, UnquantizedFusedMoEMethod):
                continue
            kernel = getattr(method, "moe_kernel", None)
            pack = getattr(getattr(kernel, "fused_experts", None), "process_weights_after_loading", None)
            if pack is not None and pack.__func__ is not getattr(FusedMoEExperts, pack.__name__, None):
                self._aside.append((method, kernel, method.moe_quant_config))
                method.moe_kernel = None

    def _put_kernels_back(self) -> None:
        for method, kernel, quant_config in self._aside:
            method.moe_kernel, method.moe_quant_config = kernel, quant_config
        self._aside.clear()

    def _keep_pending(self, storages: set[int]) -> None:
        """Reload keeps a layer's tensors until the layer is complete: copy those that the next bucket overwrites."""
        for module in self._selection.modules():
            for _, call in get_layerwise_info(module).loaded_weights:
                for key, value in call.arguments.items():
                    if (
                        isinstance(value, torch.Tensor)
                        and not value.is_meta
                        and value.untyped_storage().data_ptr() in storages
                    ):
                        call.arguments[key] = value.clone()
                        self.kept_bytes += value.nbytes


def _is_deferred(module: torch.nn.Module) -> bool:
    """Whether vLLM processes it after all other modules. vLLM says so itself from 0.27 on."""
    known = getattr(attention, "is_deferred_attention_layer", None)
    return bool(known(module)) if known is not None else isinstance(module, Attention | MLAAttention)


class Selection(list[torch.nn.Module]):
    """Some modules, as vLLM's reload asks a model for its own: exactly these, without their children."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        super().__init__(modules)

    def modules(self) -> list[torch.nn.Module]:
        return self


def _attributes(module: torch.nn.Module) -> list[tuple[str, object]]:
    """What a module and its quantisation method hold beside parameters, buffers and children, weakly if possible."""
    quant_method = getattr(module, "quant_method", None)
    own = [(name, value) for name, value in vars(module).items() if name not in MODULE_FIELDS]
    own += [(f"quant_method.{name}", value) for name, value in vars(quant_method).items()] if quant_method else []
    return [(name, _weak(value)) for name, value in own]


def _weak(value: object) -> object:
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _is_same(before: object, now: object) -> bool:
    """Whether two of `_attributes` are the same object, or equal plain values."""
    if isinstance(before, weakref.ref) and isinstance(now, weakref.ref):
        return before() is not None and before() is now()
    return before is now or (type(before) is type(now) and isinstance(before, PLAIN) and before == now)


def _unwrap_loader(tensor: torch.Tensor | None) -> None:
    loader = getattr(tensor, "weight_loader", None)
    while loader is not None and loader.__name__ == "online_process_loader":
        loader = loader.__wrapped__
        tensor.weight_loader = loader  # type: ignore[union-attr]


def _own_names(path: str, module: torch.nn.Module) -> list[str]:
    """Engine names of a module's own parameters."""
    return [f"{path}.{name}" if path else name for name in module._parameters]


def _aliases(model: torch.nn.Module) -> dict[str, list[str]]:
    """Engine name -> all names of the same live memory (tied embeddings)."""
    by_address: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            by_address.setdefault(parameter.data_ptr(), []).append(name)
    return {name: names for names in by_address.values() for name in names}
