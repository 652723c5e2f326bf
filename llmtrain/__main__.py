"""Entry point of `python -m llmtrain`, equivalent to the `llmtrain` command."""

from llmtrain.cli.main import main

if __name__ == "__main__":
    main()
