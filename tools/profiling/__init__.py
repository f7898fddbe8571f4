"""The parts of tools.profile_layers: the shapes of layers, the variants of a layer, what is measured, the report."""
