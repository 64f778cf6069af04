"""What several benchmarks share: networks, optimizers, where figures were measured, tables, pictures."""
