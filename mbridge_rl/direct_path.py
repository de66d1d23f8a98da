"""The direct path in an engine worker: copy from the trainers' own memory into the engine's, by a table made once.

The first refit goes through the engine's own loader whole, fed from the trainers' memory: what then lies in the engine
as it was loaded, in modules that post-processing leaves alone, is written directly from the next refit on. The other
modules go through the engine's own loading at each refit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbridge.pieces import Copy, join

from .borrower import Borrower
from .buckets import Layout
from .copy_plan import CopyTable, Executor, executor_for
from .errors import EngineLoadError, PlanMismatchError, SyncError
from .learning import learn, not_loaded
from .loading import check_loaded, load
from .messages import Lends, Load
from .placement import expected_of_copies
from .protocol import NUM_DIRECT_STEPS
from .recorder import DryRun
from .target import Examined, Target
from .transports.base import Transport


class DirectPath:
    """One refit after the other, in two steps ("buckets").

    Step 0 copies from where the trainers' memory was when it was last looked at; step 1 again, if it has moved since.
    """

    num_buckets = NUM_DIRECT_STEPS

    def __init__(
        self, layout: Layout, target: Target, examined: Examined, lends: Sequence[Lends], transport: type[Transport]
    ) -> None:
        """Raises TransportError if the trainers' memory cannot be mapped; PlanMismatchError if it lacks something."""
        self.reloaded: list[str] = []  # HF names that the engine's loader took in the last refit
        self.changed: dict[str, str] | None = None
        """Engine name -> why it does not hold what was loaded as it was loaded; None until the first refit."""
        self._layout, self._target = layout, target
        self._found, self._placement = examined.found, examined.placement
        self._shapes = {spec.name: spec.shape for spec in layout.tensors}
        self._borrower = Borrower(layout, lends, transport, target.device)
        self._executor: Executor | None = None
        self._modules: frozenset[str] | None = None  # that the engine's loader fills; None: all
        self._next_reloaded: list[str] = []
        self._rehearsed = DryRun()  # of what is reloaded
        self._before: dict[str, int] = {}
        self._destinations: list[str] = []
        # What the table is bound to: the borrower's generation, and the addresses of the engine's tensors.
        self._generation, self._bound = 0, list[int]()
        try:
            self._join()  # it raises now rather than in the first refit
        except SyncError:
            self._borrower.close()
            raise

    @property
    def extra_bytes(self) -> int:
        return self._target.kept_bytes + (self._executor.table_bytes if self._executor is not None else 0)

    @property
    def reasons(self) -> dict[str, str]:
        """Engine module -> why it is not written directly."""
        return self._placement.opaque

    def begin(self) -> None:
        """The engine's update begins when the trainers' memory is complete, in `apply`."""

    def apply(self, message: Load) -> None:
        self._borrower.update(message.loans)
        is_first_step = message.bucket == 0
        if self._executor is None:
            if not is_first_step:
                self._load_everything()
            return
        if is_first_step:
            self._target.begin(self._modules)
        if is_first_step or self._generation != self._borrower.generation:
            self._copy(self._executor)
        if not is_first_step:
            self._reload_opaque()

    def forget(self) -> None:
        """A refit failed: trust nothing of what was learnt. The next one goes through the engine's loader whole."""
        if self._executor is not None:
            self._executor.release()
            self._executor = None

    def finish(self) -> None:
        self._target.finish()
        if self._executor is None:
            self._learn()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.release()
            self._executor = None
        self._borrower.close()

    def _load_everything(self) -> None:
        self._before = not_loaded(self._target, self._placement)
        self._target.begin()
        check_loaded(load(self._target, self._borrower.whole()), self._found.loaded)
        self.reloaded = list(self._shapes)

    def _copy(self, executor: Executor) -> None:
        live = self._target.live()
        addresses = [live[name].data_ptr() for name in self._destinations]
        if (self._generation, self._bound) != (self._borrower.generation, addresses):
            executor.bind(self._borrower.tensors, {name: live[name] for name in self._destinations})
            self._generation, self._bound = self._borrower.generation, addresses
        executor.run()

    def _reload_opaque(self) -> None:
        self.reloaded = self._next_reloaded
        if self.reloaded:
            check_loaded(load(self._target, self._borrower.whole(self.reloaded)), self._rehearsed.loaded)

    def _learn(self) -> None:
        """After the first refit: make the table of what can be written directly from now on."""
        placement, sources = self._placement, self._borrower.tensors
        copies = self._join()
        expected = expected_of_copies(copies, sources, placement.formats, self._shapes)
        self.changed = learn(self._target, placement, expected, self._shapes, self._before)
        reloaded = placement.reloaded_names()
        specs = tuple(spec for spec in self._layout.tensors if spec.name in reloaded)
        self._next_reloaded = [spec.name for spec in specs]
        self._rehearsed = self._target.rehearse(specs)
        unread = reloaded & self._found.consumed - self._rehearsed.consumed
        if unread:
            raise EngineLoadError(
                f"the engine's loader, given {len(specs)} tensors of its own, leaves {len(unread)} unread",
                tensor=min(unread),
            )
        self._modules = frozenset(placement.opaque)
        direct = [c for c in copies if placement.module_of[c.destination_name] not in placement.opaque]
        self._destinations = sorted({c.destination_name for c in direct})
        table = CopyTable.of(
            direct,
            {name: tensor.dtype for name, tensor in sources.items()},
            {name: placement.formats[name].dtype for name in self._destinations},
        )
        self._executor, self._generation = executor_for(table, self._target.device), 0
        if self._target.device.type == "cuda":
            torch.cuda.empty_cache()  # what the engine's loader needed in this refit is not needed again

    def _join(self) -> list[Copy]:
        """Every copy into the engine. Raises PlanMismatchError if the trainers do not hold all that it asks for."""
        copies = list(join(self._borrower.pieces, self._placement.pieces))
        missing: dict[tuple[str, str], int] = {}
        for piece in self._placement.pieces:
            key = (piece.hf_name, piece.local_name)
            missing[key] = missing.get(key, 0) + piece.box.numel
        for copy in copies:
            missing[copy.hf_name, copy.destination_name] -= copy.box.numel
        for (name, engine_name), numel in missing.items():
            if numel:
                raise PlanMismatchError(
                    f"the engine reads {numel} elements of {name} into {engine_name} that no trainer rank lends",
                    tensor=name,
                )
        return copies
