"""The parts of tools.make_dataset: what a source holds, what becomes of one image, how a .beton file is written."""
