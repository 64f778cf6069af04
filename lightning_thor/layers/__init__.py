"""Kinds of layers (their rows, their gradients as matrices), the layers of a model, and hooks that pair inputs with
gradients. Nothing here knows a factor."""
