"""Pure functions behind the dynamic layers; `reference` is the equation, every faster version is held to it."""
