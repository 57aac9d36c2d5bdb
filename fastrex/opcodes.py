"""What a pickle would do, seen in its opcodes without running any: whether reading it could hurt."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass

from .errors import FastrexError

MAX_DEPTH = 64
MAX_COMPARED = 2**26  # pairs of keys that could have been chosen to collide in a dictionary or a set: a second or two
MAX_BITS = 1024  # Python refuses to print very long ones

# Opcodes that reach objects past find_class, or that no such file has.
REFUSED = frozenset(["EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID"])
PUT = frozenset(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"])
GET = frozenset(["GET", "BINGET", "LONG_BINGET"])
FILL = frozenset(["APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"])
# Those that may put what they take into a dictionary or set at once: among others by calling one.
GATHER = frozenset(["DICT", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"])
# By opcode: how many values it takes from the stack (below its mark), whether it takes a mark, how many it leaves.
EFFECTS = {
    op.name: (
        names.index("mark") if "mark" in names else len(names),
        "mark" in names,
        len(op.stack_after),
    )
    for op in pickletools.opcodes
    for names in [[item.name for item in op.stack_before]]
}
# What puts one number or word on the stack, and takes nothing.
PLAIN = frozenset(name for name, effect in EFFECTS.items() if effect == (0, False, 1)) - {
    *("MARK", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET", "GLOBAL"),
    *(REFUSED | GET),
}
CHEAP = PLAIN | PUT | GET


@dataclass(frozen=True)
class Limits:
    """What a kind of file may ask for, and ``refused``: opcodes that it has no need for."""

    steps: int  # operations that make or call something
    plain: int  # others: numbers, words, and what is named a second time
    places: int  # of the memo
    work: int  # values that they take up, each with all that is inside of it
    refused: frozenset[str] = REFUSED


# A tensor takes about fifteen steps.
TENSORS = Limits(300_000, 3_000_000, 2_000_000, 20_000_000, REFUSED | {"BYTEARRAY8"})
# Ten thousand arrays with the names of 5.6 million images: about sixteen steps for each array, or a word for each name.
WORDS = Limits(1_000_000, 16_000_000, 8_000_000, 200_000_000, REFUSED | {"BINPERSID"})


class _Value:
    """A value on the stack: how deep its containers go, how many values are inside of it, where those that stand in it
    several times count each time (as they do for whoever hashes or prints it), and how many of them, itself included,
    somebody could choose to have the same hash: long numbers, and all that is no number or word. ``keys``: how many of
    those a dictionary or set was given as keys."""

    __slots__ = ("chosen", "depth", "keys", "weight")

    def __init__(self, depth: int, weight: int, chosen: int) -> None:
        self.depth, self.weight, self.chosen, self.keys = depth, weight, chosen, 0


def check(data: bytes, limits: Limits = TENSORS) -> None:
    """Refuse a pickle with odd opcodes, a huge memo, deep nesting, a few bytes that stand for billions of values, or
    thousands of keys that could have been chosen to be compared with one another.

    Nesting is followed through the stack, because hashing a deeply nested tuple would overflow C's.

    Raises:
        FastrexError: see above; other errors where the pickle is cut off or makes no sense.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[int, _Value] = {}
    work = compared = steps = plain = 0
    small, long = _Value(0, 1, 0), _Value(0, 1, 1)  # one for all: nothing can be put into them
    for op, arg, _ in pickletools.genops(data):
        name = op.name
        if name in limits.refused:
            raise FastrexError(f"its pickle uses {name}, which no such file needs")
        if name in CHEAP:
            plain += 1
            if plain > limits.plain:
                raise FastrexError(f"its pickle has more than {limits.plain} numbers and words")
        else:
            steps += 1
            if steps > limits.steps:
                raise FastrexError(f"its pickle has more than {limits.steps} operations")
        if name in PLAIN:
            bits = arg.bit_length() if isinstance(arg, int) else 0
            if bits > MAX_BITS:
                raise FastrexError(f"its pickle has a number of more than {MAX_BITS} bits")
            # A long text that stands in many places is looked at in each.
            weight = 1 + (len(arg) // 64 if isinstance(arg, str | bytes | bytearray) else 0)
            stack.append(long if bits > 32 else small if weight == 1 else _Value(0, weight, 0))
        elif name == "MARK":
            marks.append(len(stack))
        elif name in PUT:
            place = len(memo) if arg is None else int(arg)
            if place > limits.places:
                raise FastrexError(f"its pickle asks for a memo of {place} places")
            memo[place] = stack[-1]
        elif name in GET:
            stack.append(memo[int(arg or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            below, marked, left = EFFECTS[name]
            start = (marks.pop() if marked else len(stack)) - below
            if start < 0:
                raise FastrexError("its pickle takes more from the stack than is there")
            taken = stack[start:]
            del stack[start:]
            filled = taken.pop(0) if name in FILL else None
            weight = chosen = depth = 0
            for value in taken:
                weight += value.weight
                chosen += value.chosen
                depth = max(depth, value.depth)
            work += weight
            if work > limits.work:
                raise FastrexError(f"its pickle unfolds to more than {limits.work} values")
            if depth >= MAX_DEPTH:
                raise FastrexError(f"its containers are nested more than {MAX_DEPTH} deep")
            if name in GATHER:
                compared += chosen * chosen // 2
            elif filled is not None and (keys := sum(value.chosen > 0 for value in _keys(name, taken))):
                filled.keys += keys
                compared += keys * filled.keys
            if compared > MAX_COMPARED:
                raise FastrexError("its pickle has thousands of keys that could collide: long numbers or tuples")
            if filled is not None:  # the container itself, wherever else it stands
                if filled is small or filled is long:
                    raise FastrexError("its pickle puts something into a number or a word")
                filled.depth = max(filled.depth, depth + 1)
                filled.weight += weight
                filled.chosen += chosen
                stack.append(filled)
            else:
                stack.extend(_Value(depth + 1, 1 + weight, 1 + chosen) for _ in range(left))


def _keys(name: str, taken: list[_Value]) -> list[_Value]:
    """What becomes a key where these are put into a container."""
    return taken[::2] if name in ("SETITEM", "SETITEMS") else taken if name == "ADDITEMS" else []
