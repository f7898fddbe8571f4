"""Command-line programs: `python -m tools.NAME --help`."""

from training.command_line import name_the_user

name_the_user()  # before a tool imports torchvision
