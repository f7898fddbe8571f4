"""Programs that measure and compare, and their results: `python -m benchmarks.NAME --help`."""

from training.command_line import name_the_user

name_the_user()  # before a program imports torchvision
