"""Damage to files: bytes changed, cut off and added; fields of their JSON replaced by what does not belong there."""

import contextlib
import copy
import json
import math

HOSTILE = [
    *(None, True, -1, 0, 1, 3, 7, 2**31, 2**40, 2**63, 10**30, -(2**63), 0.5, 1e308, math.nan, math.inf),
    *("", "x", "nan", "-1", "..", "../bait.safetensors", "/etc/passwd", "/dev/zero", "a\0b", "é" * 300),
    *("F64", "I64", "BOOL", "F8_E8M0", "C64", "U16"),
    *([], [0], [[]], [2**62, 2**62], [-1, 4], [1, 0], [0, 0], [0, 1], {}, {"a": 1}, {"__metadata__": {}}),
]
NAMES = [
    "",
    "__metadata__",
    "é",
    "blocks.9999999999.x",
    "blocks.99999.ffn.0.weight",
    "videodit_blocks.layers.10000000.x",
]


def spots(value, found, path=()):
    """Every place in a JSON value, as paths."""
    found.append(path)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        spots(inner, found, (*path, key))
    return found


def damaged_json(value, draw):
    """The value with one place replaced, removed, doubled, or swapped with another."""
    value, found = copy.deepcopy(value), []
    if isinstance(value, dict) and (packed := value.get("__metadata__")) and draw.random() < 0.3:
        key = draw.choice(sorted(packed))  # JSON in JSON
        with contextlib.suppress(ValueError):
            packed[key] = json.dumps(damaged_json(json.loads(packed[key]), draw))
            return value
    path = draw.choice(spots(value, found)[1:] or [()])
    if not path:
        return draw.choice(HOSTILE)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    other = draw.choice(found)
    match draw.randrange(6):
        case 0:
            del parent[path[-1]]
        case 1 if isinstance(parent, dict):
            parent[draw.choice(NAMES)] = parent.pop(path[-1])
        case 2 if isinstance(parent, dict):
            again = draw.choice(sorted(parent))
            parent[path[-1]], parent[again] = parent[again], parent[path[-1]]
        case 3 if isinstance(parent[path[-1]], int) and not isinstance(parent[path[-1]], bool):
            parent[path[-1]] += draw.choice([-4, -1, 1, 4, 2**20, 2**33])
        case 4 if len(other) < 3:
            parent[path[-1]] = copy.deepcopy(value if not other else value[other[0]])
        case _:
            parent[path[-1]] = draw.choice(HOSTILE)
    return value


def damaged_bytes(data, draw):
    data, at = bytearray(data), lambda: draw.randrange(max(1, len(data)))
    match draw.randrange(8):
        case 0:
            return data[: at()]
        case 1:
            return data + draw.randbytes(draw.choice([1, 8, 1000]))
        case 2:
            return draw.choice(
                [b"", b"{}", b"PK", b"text, no weights\n", b"version https://git-lfs.github.com/spec/v1\n"]
            )
        case 3:
            i = at()
            del data[i : i + draw.choice([1, 8, 64])]
            return data
        case 4:  # of the beginning, where headers are
            i = draw.randrange(min(len(data), 4096) or 1)
            data[i : i + 1] = bytes([draw.randrange(256)])
            return data
        case 5:
            i = draw.randrange(min(len(data), 64) or 1)
            data[i : i + 8] = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
            return data
        case 6:  # and of the end, where a zip's directory is
            i = max(0, len(data) - 1 - draw.randrange(8192))
            data[i : i + 1] = bytes([draw.randrange(256)])
            return data
        case _:
            for _ in range(draw.choice([1, 10, 100])):
                data[at()] ^= 1 << draw.randrange(8) if data else 0
            return data


def damage(folder, draw):
    """Damage one file of the folder; says how."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    if not files:
        return "nothing left"
    file = draw.choice(files)
    data = file.read_bytes()
    with contextlib.suppress(ValueError, AttributeError, RecursionError):  # what is damaged already is damaged as bytes
        if file.suffix == ".json" and draw.random() < 0.8:
            text = json.dumps(damaged_json(json.loads(data), draw))
            file.write_text(draw.choice(["", "", "", "\ufeff"]) + text if draw.random() < 0.95 else "[" * 100_000)
            return f"a field of {file.name}"
        if file.suffix == ".safetensors" and draw.random() < 0.6:
            length = int.from_bytes(data[:8], "little")
            header = json.dumps(damaged_json(json.loads(data[8 : 8 + length]), draw)).encode()
            file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
            return f"a field in the header of {file.name}"
    if draw.random() < 0.1:
        file.unlink()
        if draw.random() < 0.5:
            file.mkdir()
        return f"{file.name} gone"
    file.write_bytes(damaged_bytes(data, draw))
    return f"bytes of {file.name}"
