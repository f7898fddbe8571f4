"""Where the time of a training step goes, and what bounds a run."""
