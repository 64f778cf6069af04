"""The choice of the block size: what partitioning saves on this device, and what it loses on this network."""
