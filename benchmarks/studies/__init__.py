"""Finished studies, kept to repeat their figures: ablations, the paper's trace rule, other widths."""
