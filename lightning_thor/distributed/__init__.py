"""All that knows ranks: the one folder that imports `torch.distributed`, and who computes what."""
