"""`Curvature`: observe, average, refresh, precondition, in this order, and its state. Nothing here knows a Trainer."""
