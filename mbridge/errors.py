"""Every error that mbridge raises on purpose.

    MBridgeError
    ├── ConfigError                 the HF config
    │   ├── UnsupportedModelError       no family for this model_type
    │   └── UnsupportedConfigError      a field changes the forward pass and has no mapping
    ├── TopologyError               parallel sizes that do not fit the model, the world or each other
    ├── CheckpointError             files: absent, truncated, or with other tensors than the model needs
    ├── ModelError                  a Megatron-Core model that is not the one the family's table describes
    ├── PlanError                   pieces that leave a hole, overlap, or differ between ranks
    └── PeerError                   another rank failed in something that all ranks do together

A message says what was expected, what was found, where (tensor, rank), and what to do. `mbridge_rl.errors` continues
the tree below `MBridgeError`, so that one `except` catches both packages.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_LISTED = 20


class MBridgeError(Exception):
    """Root of the errors of mbridge and mbridge_rl."""


class ConfigError(MBridgeError):
    """The HF config cannot be used."""


class UnsupportedModelError(ConfigError):
    """No family knows this `model_type`."""


class UnsupportedConfigError(ConfigError):
    """A config field changes the forward pass and Megatron-Core, or this family's table, cannot express it."""


class TopologyError(MBridgeError):
    """Parallel sizes that do not fit the model, the world or each other."""


class CheckpointError(MBridgeError):
    """A checkpoint's files are absent, damaged, or hold other tensors than the model needs."""


class ModelError(MBridgeError):
    """A Megatron-Core model has other parameters than its family's table describes."""


class PlanError(MBridgeError):
    """Pieces leave a hole, overlap, or differ between ranks."""


class PeerError(MBridgeError):
    """Another rank failed in something that all ranks do together; the message carries its error."""


def listed(problems: Iterable[str]) -> str:
    """Problems as indented lines, the first `MAX_LISTED` of them and a count of the rest."""
    lines = list(problems)
    shown = [f"  - {line}" for line in lines[:MAX_LISTED]]
    if len(lines) > MAX_LISTED:
        shown.append(f"  ... and {len(lines) - MAX_LISTED} more")
    return "\n".join(shown)
