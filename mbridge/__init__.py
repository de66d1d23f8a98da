# Layers, each importing only those below it (tests/test_layering.py):
#   __main__, cli > bridge > export > checkpoint, gather, megatron/ > spelling > plan > families/ > ops >
#   topology, hf_config, fp8, pieces > errors
# Only megatron/ imports megatron, and only when called; only gather.py, megatron/ and the ranks that `verify` starts
# (cli/rank.py) call torch.distributed.
"""mbridge: moves weights between Hugging Face checkpoints and sharded Megatron-Core models.

from mbridge import AutoBridge

bridge = AutoBridge.from_pretrained("path/to/checkpoint")
model = bridge.get_model()
bridge.load_weights(model, bridge.path)
"""

from .bridge import AutoBridge, Bridge
from .errors import (
    CheckpointError,
    ConfigError,
    MBridgeError,
    ModelError,
    PeerError,
    PlanError,
    TopologyError,
    UnsupportedConfigError,
    UnsupportedModelError,
)
from .families import ValueHead
from .megatron import destroy_parallel, init_parallel
from .topology import Topology

__all__ = [
    "AutoBridge",
    "Bridge",
    "CheckpointError",
    "ConfigError",
    "MBridgeError",
    "ModelError",
    "PeerError",
    "PlanError",
    "Topology",
    "TopologyError",
    "UnsupportedConfigError",
    "UnsupportedModelError",
    "ValueHead",
    "destroy_parallel",
    "init_parallel",
]
