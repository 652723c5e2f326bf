"""`python -m llmtrain`: the same command line as the `llmtrain` script.

python -m llmtrain pretrain --config configs/demo.yaml
"""

from llmtrain.cli.main import main

if __name__ == "__main__":
    main()
