"""Read what a run has logged."""

import json
from pathlib import Path
from typing import Any


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Each line of `metrics.jsonl`, which must be JSON that any parser reads."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]
