"""The factors A and G of all layers: where they are, their averages, damping and inverses. Nothing here knows ranks."""
