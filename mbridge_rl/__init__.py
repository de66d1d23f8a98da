"""mbridge_rl: refits live inference engines from sharded Megatron-Core trainers.

Imports go only downwards: syncer > conductor > engines > transports > receiver > recorder, filler > agreement > buckets
> control > protocol > report > errors. Of mbridge it sees the Bridge it is given, `pieces`, `plan` and `errors`.
"""

from .errors import SyncError
from .report import SyncReport
from .syncer import WeightSyncer

__all__ = ["SyncError", "SyncReport", "WeightSyncer"]
