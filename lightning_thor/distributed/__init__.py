"""All that knows ranks: communicators, process groups, sharded tensors, and who computes what.

The one folder that imports `torch.distributed`.
"""
