"""Examples: each is short, each is run by a test, and each runs from the repository's root.

* ``plain_loop.py``: THOR in an ordinary PyTorch loop, without a Trainer;
* ``demo``: THOR, momentum SGD, AdamW and Muon side by side on scikit-learn's digits (``make demo``);
* ``*.yaml``: whole trainings for ``lightning-thor fit --config examples/<name>.yaml``;
* the other files: the models and the data that those name by ``class_path``.
"""
