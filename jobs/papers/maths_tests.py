"""Write the test sets of LLM-Adapters' arithmetic tasks with the answer as `output`, for k0_reft_maths.yaml.

python jobs/papers/maths_tests.py ../LLM-Adapters/dataset ../maths_tests
"""

import json
import sys
from pathlib import Path

TASKS = ("AQuA", "gsm8k", "mawps", "SVAMP")


def convert(source: Path, target: Path) -> None:
    """Write target/TASK.json for every source/TASK/test.json."""
    target.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rows = json.loads((source / task / "test.json").read_text("utf-8"))
        made = [{"instruction": row["instruction"], "output": only(row["answer"])} for row in rows]
        (target / f"{task}.json").write_text(json.dumps(made, indent=1, ensure_ascii=False), "utf-8")
        print(f"{task}: {len(made)} rows")


def only(answer: object) -> str:
    """Return an answer as text; some versions of the files have it in a list of one."""
    if isinstance(answer, list):
        (answer,) = answer
    return str(answer).strip()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
