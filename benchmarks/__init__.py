"""Benchmarks, run from the repository's root; each writes JSON into ``benchmarks/results`` and prints a table.

* ``python -m benchmarks.step_cost``: what a step costs, beside momentum SGD and AdamW;
* ``python -m benchmarks.examples --data DIR``: epochs and seconds to a target, on the three examples;
* ``python -m benchmarks.readme``: puts both, and the demo's figures, into README.md.
"""
