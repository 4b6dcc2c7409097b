"""Train and compare recommenders: python run_recbole_llm.py --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k

`python run_recbole_llm.py --help` lists models, datasets, backbones and every key.
"""

import sys

from recbole_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
