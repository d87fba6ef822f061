"""Draw the dataset `tiny-shapes` that the package brings: 48 pictures, three questions about each.

    python examples/tiny/shapes_set.py

It writes `mmtool/data/embedded/tiny_shapes`: `rows.jsonl` and `pictures/`. The same seed draws the same set.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from pictures import shapes_picture
from PIL import Image
from questions import colour_of, count_all, describe, exists, position_of, shape_of

FOLDER = Path(__file__).parents[2] / "mmtool" / "data" / "embedded" / "tiny_shapes"
MAKERS = (describe, count_all, colour_of, shape_of, exists, position_of)
LONGEST_SIDE = 160  # the tiny model sees 128 x 128


def is_neat(question: str) -> bool:
    """Tell whether a question is a plain sentence; training also has sloppy ones, and demands on the answer."""
    return question[-1] in "?.？。" and not question[0].islower() and "word" not in question and "词" not in question


def main() -> None:
    """Draw the pictures and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--pictures", type=int, default=48)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(args.pictures):
        picture, scene = shapes_picture(rng)
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        name = f"pictures/{index:02d}.jpg"
        picture.convert("RGB").save(args.out / name, quality=90, optimize=True)
        language = "zh" if index % 4 == 3 else "en"
        questions: dict[str, str] = {}
        while len(questions) < 3:
            turn = rng.choice(MAKERS)(rng, scene, language)
            if turn is not None and is_neat(turn.question):
                questions.setdefault(turn.question, turn.answer)
        rows += [{"query": query, "response": answer, "images": [name]} for query, answer in questions.items()]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (args.out / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{len(rows)} rows about {args.pictures} pictures, {size / 1e3:.0f} kB, in {args.out}")


if __name__ == "__main__":
    main()
