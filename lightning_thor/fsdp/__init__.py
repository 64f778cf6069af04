"""`ShardedCurvature`: directions of weights that `fully_shard` (FSDP2) shards by rows."""
