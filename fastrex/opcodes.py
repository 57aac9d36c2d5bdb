"""What a pickle would do, seen in its opcodes without running any: whether reading it could hurt."""

from __future__ import annotations

import pickletools

from .errors import FastrexError

MAX_STEPS = 300_000  # operations; a tensor takes about thirty
MAX_WORK = 20_000_000  # values that they take up, each with all that is inside of it
MAX_DEPTH = 64
MAX_LARGE_NUMBERS = 1000  # whole numbers of more than 32 bits can be chosen to collide in a dictionary
MAX_BITS = 1024  # Python refuses to print very long ones

# Opcodes that reach objects past find_class, or that no torch file has.
REFUSED = frozenset(["EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "BYTEARRAY8", "PERSID"])
PUT = frozenset(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"])
GET = frozenset(["GET", "BINGET", "LONG_BINGET"])
FILL = frozenset(["APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"])
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


class _Value:
    """A value on the stack: how deep its containers go, and how many values are inside of it, where those that stand in
    it several times count each time (as they do for whoever hashes or prints it)."""

    __slots__ = ("depth", "weight")

    def __init__(self, depth: int, weight: int) -> None:
        self.depth, self.weight = depth, weight


def check(data: bytes) -> None:
    """Refuse a pickle with odd opcodes, a huge memo, deep nesting, or a few bytes that stand for billions of values.

    Nesting is followed through the stack, because hashing a deeply nested tuple would overflow C's.

    Raises:
        FastrexError: see above; other errors where the pickle is cut off or makes no sense.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[int, _Value] = {}
    work = large = 0
    for number, (op, arg, _) in enumerate(pickletools.genops(data)):
        name = op.name
        if name in REFUSED:
            raise FastrexError(f"its pickle uses {name}, which no torch file needs")
        if number == MAX_STEPS:
            raise FastrexError(f"its pickle has more than {MAX_STEPS} operations")
        if isinstance(arg, int) and arg.bit_length() > 32:
            large += 1
            if large > MAX_LARGE_NUMBERS or arg.bit_length() > MAX_BITS:
                raise FastrexError(f"its pickle has more than {MAX_LARGE_NUMBERS} large numbers, or a very long one")
        if name == "MARK":
            marks.append(len(stack))
        elif name in PUT:
            place = len(memo) if arg is None else int(arg)
            if place > MAX_STEPS:
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
            # A long text that stands in many places is looked at in each.
            weight = len(arg) // 64 if isinstance(arg, str | bytes) else 0
            depth = 0
            for value in taken:
                weight += value.weight
                depth = max(depth, value.depth)
            work += weight
            if work > MAX_WORK:
                raise FastrexError(f"its pickle unfolds to more than {MAX_WORK} values")
            if depth >= MAX_DEPTH:
                raise FastrexError(f"its containers are nested more than {MAX_DEPTH} deep")
            if filled is not None:  # the container itself, wherever else it stands
                filled.depth = max(filled.depth, depth + 1)
                filled.weight += weight
                stack.append(filled)
            else:
                stack.extend(_Value(depth + 1, 1 + weight) for _ in range(left))
