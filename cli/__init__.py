"""The `llmtrain` command line: one file a command. Parse, call the library, print; no ML code."""
