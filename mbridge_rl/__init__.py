"""mbridge_rl: refits live inference engines from sharded Megatron-Core trainers.

Imports go only downwards: testing > syncer > conductor, follower > engines > transports > receiver > recorder >
agreement > filler > buckets > control > protocol > messages > report > errors. Of mbridge it sees the Bridge it is
given, `pieces`, `plan` and `errors`.
"""

from .errors import SyncError
from .report import SyncReport
from .syncer import WeightSyncer

__all__ = ["SyncError", "SyncReport", "WeightSyncer"]
