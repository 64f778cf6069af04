"""From gradients and inverses to directions, by mode and in batches. Nothing here knows how inverses are refreshed."""
