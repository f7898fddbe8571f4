"""The backends: each carries out the plan's steps with one library.

A backend is a file NAME_executor.py with a function `create_executor(source, options)`, and NAME in `config.Backend`.
"""
