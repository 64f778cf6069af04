"""THOR, momentum SGD, AdamW and Muon side by side: ``make demo``, or ``python -m examples.demo``.

On handwritten digits all train the same network from the same initial weights on the same batches, each through a
Lightning Trainer, for the same number of epochs, under the same one-cycle schedule; on Burgers' equation they train a
physics-informed network for equally many seconds (`examples.pinn`). It prints tables, whoever wins, and writes
``curves.png``, ``pinn.png`` and ``figures.json``.
"""
