"""Run an experiment from its YAML file, on this machine or as a Ray job.

python jobs/train.py jobs/quickstart.yaml rounds=3
ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml
"""

import sys

from fedray.cli.app import app

if __name__ == "__main__":
    app(["run", *sys.argv[1:]])
