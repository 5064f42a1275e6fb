"""Published systems built from the rooms of this package, each an experiment that repeats its paper's claim in small."""
