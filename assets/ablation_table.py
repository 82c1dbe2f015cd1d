"""Prints one table in Markdown from the CSV files of `eval.py prior`, a line for each. `make ablation` ends with it.

    python assets/ablation_table.py runs/ablation_hospital_*.csv
"""

import csv
import sys
from pathlib import Path

# heading -> the score and the prior that it is seen under
COLUMNS = {
    "temporal, true": ("Temporal_entity_score", "true"),
    "dummy": ("Temporal_entity_score", "dummy"),
    "direction of change": ("direction of change", "true"),
    "severity changes turned round": ("severity changes turned round", "reversed"),
    "findings F1": ("findings F1", "true"),
}

print("| connector |", " | ".join(COLUMNS), "|")
print("|---" * (1 + len(COLUMNS)) + "|")
for file in map(Path, sys.argv[1:]):
    with file.open(newline="") as lines:
        scores = {(row["score"], row["prior"]): row for row in csv.DictReader(lines)}
    cells = [file.stem.removeprefix("ablation_").replace("_", " ")]
    for key in COLUMNS.values():
        numbers = [float(scores[key][name]) for name in ("value", "low", "high")]
        cells.append("{:.1f} [{:.1f}, {:.1f}]".format(*numbers))
    print("|", " | ".join(cells), "|")
