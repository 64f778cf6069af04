"""Benchmarks, run from the repository's root; each writes JSON into ``benchmarks/results`` and prints a table.

* ``python -m benchmarks.step_cost``: the cost of a step, beside momentum SGD and AdamW, its parts, floor and memory;
  ``step_cost.call_counts``: the Python calls of a step;
* ``python -m benchmarks.launches``: the operations that a step sends to a GPU, on any machine;
* ``python -m benchmarks.history``: calls, launches and times of a step, version by version;
* ``python -m benchmarks.time_to_target --data DIR``: steps and seconds to a target, beside other optimizers;
* ``python -m benchmarks.communication``: several processes; ``communication.scaling``: a projection to many;
  ``communication.sharded_updates``: bytes of sharded models;
* ``benchmarks.studies``: finished studies, ``ablations``, ``width_transfer`` and ``trace_rule``;
* ``python -m benchmarks.readme``: writes all figures into README.md and the pages of docs.

Two-core sizes by default; ``time_to_target --scale gpu`` and ``step_cost --scale gpu`` for a GPU.
"""
