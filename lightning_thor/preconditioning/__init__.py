"""From gradients and stored inverses to directions, by mode, in groups of layers; nothing here refreshes inverses."""
