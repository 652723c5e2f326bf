"""The `llmtrain` command line: parse arguments, call the library, print results.

May import every layer. Each command has its own file, named after it; besides those:

- `main.py`: the application, exit codes and error messages
- `common.py`: consoles, progress, shared options, formatting
- `average_output.py`: tables of `average`
"""
