"""Draw the rooms of the package and their imports: python docs/architecture.py writes docs/img/architecture.svg.

The order of the rooms and the reading of imports are those of tests/test_architecture.py.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "img" / "architecture.svg"

WIDTH, HEIGHT, GAP, FLOOR, MARGIN = 132, 34, 34, 78, 24  # pixels: a room's size, the space between rooms, a floor's height


def rooms_and_imports() -> tuple[list[str], dict[str, set[str]]]:
    """The rooms that have modules, from the top down, and for each the rooms that it imports."""
    test = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))
    imports: dict[str, set[str]] = {}
    for file in test["files"]():
        room = test["room_of"](test["module_of"](file))
        imported = {test["room_of"](module) for module in test["imports_of"](file) if "." in module}
        imports.setdefault(room, set()).update(imported - {room})
    return [room for room in test["ORDER"] if room in imports and room != "_version"], imports


def direct(rooms: Sequence[str], imports: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """The imports that no chain of other imports implies (the transitive reduction), by room.

    Raises:
        ValueError: a room imports one that is not below it: the rooms are not in order, or there is a circle.
    """
    place = {room: number for number, room in enumerate(rooms)}
    reached: dict[str, set[str]] = {}
    drawn: dict[str, list[str]] = {}
    for room in reversed(rooms):
        below = sorted((other for other in imports[room] if other in place), key=place.__getitem__)
        if below and place[below[0]] <= place[room]:
            raise ValueError(f"{room} imports {below[0]}, which is not below it")
        reached[room], drawn[room] = set(), []
        for other in below:  # from the top: what reaches others comes before them
            if other not in reached[room]:
                drawn[room].append(other)
            reached[room] |= {other} | reached[other]
    return drawn


def floors(rooms: Sequence[str], imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms that follow each other in the order and do not import each other share a floor."""
    building: list[list[str]] = []
    for room in rooms:
        if not building or any(room in imports[other] for other in building[-1]) or len(building[-1]) == 5:
            building.append([])
        building[-1].append(room)
    return building


def draw() -> str:
    """The picture as SVG."""
    rooms, imports = rooms_and_imports()
    drawn, building = direct(rooms, imports), floors(rooms, imports)
    width = 2 * MARGIN + max(len(floor) for floor in building) * (WIDTH + GAP) + 3 * GAP
    height = 2 * MARGIN + (len(building) - 1) * FLOOR + HEIGHT
    corner: dict[str, tuple[float, float]] = {}
    for level, floor in enumerate(building):
        taken = len(floor) * WIDTH + (len(floor) - 1) * GAP
        # Every other floor stands a little to the side, so that lines pass between the rooms.
        left = (width - taken) / 2 + (GAP if level % 2 else -GAP) * (1.5 if len(floor) == 1 else 1)
        for place, room in enumerate(floor):
            corner[room] = left + place * (WIDTH + GAP), MARGIN + level * FLOOR
    lines, boxes = [], []
    for room in rooms:
        x, y = corner[room]
        for number, other in enumerate(drawn[room]):
            to_x, to_y = corner[other]
            start = x + WIDTH * (number + 1) / (len(drawn[room]) + 1)
            above = [upper for upper in rooms if other in drawn[upper]]
            end = to_x + WIDTH * (above.index(room) + 1) / (len(above) + 1)
            bend = (to_y - y - HEIGHT) / 2
            lines.append(
                f'<path d="M{start:.0f},{y + HEIGHT:.0f} C{start:.0f},{y + HEIGHT + bend:.0f} '
                f'{end:.0f},{to_y - bend:.0f} {end:.0f},{to_y - 3:.0f}"/>'
            )
        kind = "package" if (ROOT / "recbole_llm" / room).is_dir() else "module"
        boxes.append(
            f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
            f'<text x="{x + WIDTH / 2:.0f}" y="{y + HEIGHT / 2 + 5:.0f}">{room}{"/" if kind == "package" else ".py"}</text>'
        )
    style = (
        "text{font:14px sans-serif;text-anchor:middle;fill:#1a1a1a}"
        "path{fill:none;stroke:#7a869a;stroke-width:1.2;marker-end:url(#arrow)}"
        "rect{stroke:#3f51b5;stroke-width:1.2}.package{fill:#e8eaf6}.module{fill:#fff}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
            f'aria-label="The rooms of recbole_llm; arrows are imports, and all point down">',
            f"<style>{style}</style>",
            '<defs><marker id="arrow" viewBox="0 0 6 6" refX="4" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M0,0 L6,3 L0,6 z" style="fill:#7a869a;stroke:none;marker-end:none"/></marker></defs>',
            f'<rect width="{width:.0f}" height="{height:.0f}" style="fill:#fff;stroke:none"/>',
            *lines,
            *boxes,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE)
