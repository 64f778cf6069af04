"""Which mode and settings are the default: trials on development tasks, then one confirmation on others."""
