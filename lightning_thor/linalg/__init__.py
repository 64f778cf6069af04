"""Tensors alone: blocks, their decompositions, matrix sign, packing, memory. Nothing here knows a layer."""
