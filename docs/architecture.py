"""Draw the rooms of the package and their imports: python docs/architecture.py writes docs/img/architecture.svg.

The order of the rooms and the reading of imports are those of tests/test_architecture.py.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "img" / "architecture.svg"

# In pixels: a room's size, the width of a passage between rooms, the space beside both, a floor's height, the margin.
WIDTH, HEIGHT, PASSAGE, GAP, FLOOR, MARGIN = 118, 34, 2, 16, 88, 20


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


def laid_out(building: Sequence[Sequence[str]], drawn: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The floors with a passage ``room>other`` where an import crosses a floor, in an order with few crossings."""
    level = {room: number for number, floor in enumerate(building) for room in floor}
    grid: list[list[str]] = [list(floor) for floor in building]
    neighbors: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for room, others in drawn.items():
        for other in others:
            path = [(level[room], room)]
            for between in range(level[room] + 1, level[other]):
                grid[between].append(f"{room}>{other}")
                path.append((between, grid[between][-1]))
            path.append((level[other], other))
            for upper, lower in zip(path, path[1:], strict=False):
                neighbors.setdefault(upper, []).append(lower)
                neighbors.setdefault(lower, []).append(upper)

    def center(number: int, name: str, step: int) -> float:
        places = [positions[other] for other in neighbors.get((number, name), []) if other[0] == number + step]
        return sum(places) / len(places) if places else positions[number, name]

    for turn in range(24):  # a floor is sorted by where its neighbors above stand, then by those below, and so on
        step = -1 if turn % 2 == 0 else 1
        for number in range(len(grid))[::-step]:
            positions = {
                (other, name): (place + 0.5) / len(grid[other])
                for other in range(len(grid))
                for place, name in enumerate(grid[other])
            }
            grid[number].sort(key=lambda name: center(number, name, step))  # noqa: B023
    return grid


def draw() -> str:
    """The picture as SVG."""
    rooms, imports = rooms_and_imports()
    drawn = direct(rooms, imports)
    grid = laid_out(floors(rooms, imports), drawn)
    sizes = [[PASSAGE if ">" in name else WIDTH for name in floor] for floor in grid]
    inner = max(sum(floor) + GAP * (len(floor) - 1) for floor in sizes)
    width, height = 2 * MARGIN + inner, 2 * MARGIN + (len(grid) - 1) * FLOOR + HEIGHT
    left: dict[tuple[int, str], float] = {}
    for number, (floor, widths) in enumerate(zip(grid, sizes, strict=True)):
        x = (width - sum(widths) - GAP * (len(floor) - 1)) / 2
        for name, size in zip(floor, widths, strict=True):
            left[number, name] = x
            x += size + GAP
    level = {name: number for number, floor in enumerate(grid) for name in floor if ">" not in name}
    # Lines leave and reach a room side by side, in the order of where they come from or go to.
    paths = {}
    for room in rooms:
        for other in drawn[room]:
            between = [(number, f"{room}>{other}") for number in range(level[room] + 1, level[other])]
            paths[room, other] = [(level[room], room), *between, (level[other], other)]
    starts = {room: sorted(drawn[room], key=lambda other: left[paths[room, other][1]]) for room in rooms}  # noqa: B023
    ends = {
        other: sorted((room for room in rooms if other in drawn[room]), key=lambda room: left[paths[room, other][-2]])  # noqa: B023
        for other in rooms
    }
    lines, boxes = [], []
    for (room, other), path in paths.items():
        x = left[path[0]] + WIDTH * (starts[room].index(other) + 1) / (len(starts[room]) + 1)
        y = MARGIN + level[room] * FLOOR + HEIGHT
        line = f"M{x:.0f},{y}"
        for number, name in path[1:]:
            is_end = name == other
            to_y = MARGIN + number * FLOOR - (3 if is_end else 0)
            share = (ends[other].index(room) + 1) / (len(ends[other]) + 1) if is_end else 0.5
            to_x = left[number, name] + (WIDTH if is_end else PASSAGE) * share
            bend = (y + to_y) / 2
            line += f" C{x:.0f},{bend:.0f} {to_x:.0f},{bend:.0f} {to_x:.0f},{to_y}"
            if not is_end:
                line += f" V{to_y + HEIGHT}"
            x, y = to_x, to_y + HEIGHT
        lines.append(f'<path d="{line}"/>')
    for room in rooms:
        x, y = left[level[room], room], MARGIN + level[room] * FLOOR
        kind = "package" if (ROOT / "recbole_llm" / room).is_dir() else "module"
        boxes.append(
            f'<rect class="{kind}" x="{x:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
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
