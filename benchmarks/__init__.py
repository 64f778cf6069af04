"""Benchmarks, run from the repository's root; each writes JSON into ``benchmarks/results`` and prints a table.

* ``python -m benchmarks.step_cost``: what a step costs, beside momentum SGD and AdamW, its parts, floor and memory;
* ``python -m benchmarks.time_to_target --data DIR``: steps and seconds to a target, beside other optimizers;
* ``benchmarks.ablations``, ``width_transfer``, ``trace_rule``: one setting at a time, other widths, the paper's rule;
* ``benchmarks.communication``, ``sharded_updates``, ``scaling``: several processes, and a projection to many;
* ``python -m benchmarks.readme``: puts what they wrote into README.md and the pages of docs.

Two-core sizes by default; ``time_to_target --scale gpu`` and ``step_cost --scale gpu`` for a GPU.
"""
