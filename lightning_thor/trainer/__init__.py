"""All that imports Lightning: the callback, the strategies, reports and the command line."""
