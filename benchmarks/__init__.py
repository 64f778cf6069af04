"""Benchmarks, run from the repository's root; each writes JSON into ``benchmarks/results`` and prints a table.

* ``python -m benchmarks.step_cost``: what a step costs, beside momentum SGD and AdamW, its parts, floor and memory;
* ``python -m benchmarks.time_to_target --data DIR``: steps and seconds to a target, beside nine other contenders;
* ``python -m benchmarks.readme``: puts both, and the demo's figures, into README.md.

Two-core sizes by default; ``--scale gpu`` for a GPU.
"""
