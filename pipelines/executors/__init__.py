"""The backends: each carries out the plan's steps with one library."""
