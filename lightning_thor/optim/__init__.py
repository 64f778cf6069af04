"""The optimizer `Thor`: momentum or Adam on directions, scale, weight decay. It asks for directions by a protocol."""
