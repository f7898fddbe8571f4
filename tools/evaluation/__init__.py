"""What `tools.evaluate` knows: kinds of evaluation data, records of each image, figures, and the report."""
