"""Triton kernels of the class means and of the ring: p_c = s_c / |s_c|, s_c = sum of the rows of class c in slot order.

* ``means_kernel``: one program owns one class. It finds its slots in one of two ways, reads their rows once, adds them
  one after another in fp32, and writes the prototype and the count. A small bank is scanned: every program reads all
  labels, which L1 and L2 hold, and one launch does it all. For a large one a stable sort of the labels comes first, and
  a program searches it for its range. With ``entries`` a program owns an entry of the list of labels that an update
  overwrote or wrote, the first of its class does the work, and program 0 advances the ring's pointer.
* ``write_kernel``: one program owns BLOCK_B rows of the batch and BLOCK_D columns. It reads the pointer, which nobody
  changes before the next launch, and writes rows and labels into the ring, and the labels and the pointer for the next
  launch into the list. Where nothing is to be written the list says so: -1 and the old pointer.

Both ways and the update run one binary, chosen between by arguments that Triton does not specialise on: a sum over
threads could follow another tree in another one, and the bits of what an update leaves would not be class_means'.

Assumed: fewer than 2^31 rows and classes. Labels out of range belong to no class.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .._triton import Compile, cdiv, next_power_of_2

EPS = tl.constexpr(1e-12)
# Up to so many rows, and labels read by all programs together, scanning beats the dozen launches of a sort: 2^28 labels
# are 2 GiB from L1, about 0.1 ms. Not measured on a GPU.
SCAN_ROWS = 16384
SCAN_LABELS = 2**28
BLOCK_M = 1024  # labels looked at together; more would cost registers, hence programs at a time
PROBES = tl.constexpr(512)  # of a search at a time: two rounds find one of 2^18 places, three one of 2^27


@triton.jit
def add_rows(total, feature_ptr, slots, M, stride_row, column, mask, ROWS: tl.constexpr):
    """``total`` plus the rows of ``slots``, in their order; M stands for none.

    All loads come before the first addition, so that they are under way together.
    """
    rows = ()
    for r in tl.static_range(ROWS):
        at = feature_ptr + slots[r].to(tl.int64) * stride_row + column
        found = tl.broadcast_to(slots[r], column.shape) < M  # the interpreter of 3.9 takes no & of vector and scalar
        rows = rows + (tl.load(at, mask=mask & found, other=0.0).to(tl.float32),)  # noqa: RUF005
    for r in tl.static_range(ROWS):
        total += rows[r]
    return total


@triton.jit
def lower_bound(label_ptr, order_ptr, stride_label, low, high, c):
    """The first place of ``order`` in [low, high) whose label is at least c, or ``high``."""
    while low < high:
        step = (high - low + PROBES - 1) // PROBES
        place = low + tl.arange(0, PROBES) * step
        valid = (place < high) & (place >= low)  # the last places may pass 2^31
        slot = tl.load(order_ptr + place, mask=valid, other=0)
        below = valid & (tl.load(label_ptr + slot * stride_label, mask=valid, other=0) < c)
        number = tl.sum(below.to(tl.int32), 0)
        # At the last probe that is below c the answer lies behind it, at the next one or before.
        high = tl.where(number == 0, low, tl.where(number * step < high - low, low + number * step, high))
        low = tl.where(number == 0, low, low + (number - 1) * step + 1)
    return low


@triton.jit(
    do_not_specialize=["M", "C", "entries", "is_sorted"],
    do_not_specialize_on_alignment=["order_ptr", "written_ptr", "pointer_ptr", "prototype_ptr", "count_ptr"],
)
def means_kernel(
    feature_ptr, label_ptr, order_ptr, written_ptr, pointer_ptr, prototype_ptr, count_ptr,
    M, C, entries, is_sorted, stride_row, stride_column, stride_label,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = program.to(tl.int64)
    live = c < C
    if entries > 0:
        c = tl.load(written_ptr + program)
        live = (c >= 0) & (c < C)
        start = 0
        while live & (start < program):
            index = start + tl.arange(0, BLOCK_M)
            earlier = tl.load(written_ptr + index, mask=index < program, other=-1)
            live = tl.sum((earlier == c).to(tl.int32), 0) == 0
            start += BLOCK_M
        if program == 0:
            tl.store(pointer_ptr, tl.load(written_ptr + entries))

    if live:
        out_ptr = prototype_ptr + c * D
        count = 0
        squares = 0.0
        total = tl.zeros((BLOCK_D,), tl.float32)
        for first in tl.range(0, D, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            mask = column < D
            offset = column.to(tl.int64) * stride_column
            total = tl.zeros((BLOCK_D,), tl.float32)
            count = 0
            if is_sorted != 0:
                begin = 0
                begin = lower_bound(label_ptr, order_ptr, stride_label, begin, M, c)
                end = lower_bound(label_ptr, order_ptr, stride_label, begin, M, c + 1)
                count = end - begin
                while begin < end:
                    slots = ()
                    for r in tl.static_range(ROWS):
                        slots = slots + (tl.load(order_ptr + begin + r, mask=begin + r < end, other=M),)  # noqa: RUF005
                    total = add_rows(total, feature_ptr, slots, M, stride_row, offset, mask, ROWS)
                    begin += ROWS
            else:
                start = 0
                while start < M:
                    index = start + tl.arange(0, BLOCK_M)
                    label = tl.load(label_ptr + index.to(tl.int64) * stride_label, mask=index < M, other=-1)
                    hit = (label == c).to(tl.int32)
                    number = tl.sum(hit, 0)
                    count += number
                    if number > 0:
                        # 1, 2, ... for the hits of this block, 0 for the others.
                        rank = tl.cumsum(hit, 0) * hit
                        done = 0
                        while done < number:
                            slots = ()
                            for r in tl.static_range(ROWS):
                                slots = slots + (tl.min(tl.where(rank == done + r + 1, index, M), 0),)  # noqa: RUF005
                            total = add_rows(total, feature_ptr, slots, M, stride_row, offset, mask, ROWS)
                            done += ROWS
                    start += BLOCK_M
            squares += tl.sum(total * total, 0)
            if D > BLOCK_D:
                tl.store(out_ptr + column, total, mask=mask)
        norm = tl.sqrt_rn(squares)
        dead = norm <= EPS  # false for a NaN, which stays one
        norm = tl.where(dead, 1.0, norm)
        if D > BLOCK_D:
            tl.debug_barrier()
            for first in tl.range(0, D, BLOCK_D):
                column = first + tl.arange(0, BLOCK_D)
                total = tl.load(out_ptr + column, mask=column < D, other=0.0)
                tl.store(out_ptr + column, tl.where(dead, 0.0, tl.div_rn(total, norm)), mask=column < D)
        else:
            column = tl.arange(0, BLOCK_D)
            tl.store(out_ptr + column, tl.where(dead, 0.0, tl.div_rn(total, norm)), mask=column < D)
        tl.store(count_ptr + c, count)


@triton.jit(do_not_specialize=["M", "B"])
def write_kernel(
    bank_ptr, bank_label_ptr, pointer_ptr, feature_ptr, label_ptr, keep_ptr, written_ptr,
    M, B, stride_bank_row, stride_bank_column, stride_bank_label, stride_row, stride_column, stride_label,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pointer = tl.load(pointer_ptr)
    kept = pointer >= 0
    if keep_ptr is not None:
        kept &= tl.load(keep_ptr).to(tl.int32) != 0
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    slot = pointer + row
    fits = (row < B) & (slot < tl.where(kept, M, 0))
    row = row.to(tl.int64)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = fits[:, None] & (column < D)[None, :]
    values = tl.load(feature_ptr + row[:, None] * stride_row + column[None, :] * stride_column, mask=mask, other=0.0)
    values = values.to(tl.float32).to(bank_ptr.dtype.element_ty)
    tl.store(bank_ptr + slot[:, None] * stride_bank_row + column[None, :] * stride_bank_column, values, mask=mask)
    if tl.program_id(1) == 0:
        at = bank_label_ptr + slot * stride_bank_label
        tl.store(written_ptr + row, tl.load(at, mask=fits, other=-1), mask=row < B)
        new = tl.load(label_ptr + row * stride_label, mask=fits, other=-1)
        tl.store(written_ptr + B + row, new, mask=row < B)
        tl.debug_barrier()  # no thread overwrites what another one has yet to read
        tl.store(at, new, mask=fits)
        if tl.program_id(0) == 0:
            advanced = tl.where(pointer + B < M, pointer + B, 0)
            tl.store(written_ptr + 2 * B, tl.where(kept, advanced, pointer))


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrex::class_means``."""
    prototypes = features.new_empty((num_classes, features.shape[1]), dtype=torch.float32)
    counts = labels.new_empty((num_classes,))
    with torch.cuda.device_of(features):
        _means(features, labels, prototypes, counts, None, None)
    return prototypes, counts


def bank_update_(
    bank_features: Tensor,
    bank_labels: Tensor,
    pointer: Tensor,
    features: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    prototypes: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Launcher of ``fastrex::bank_update_``: two launches; the first writes, the second needs what it left.

    With prototypes and a bank too large to scan, the labels of the whole bank are sorted in between. That sort is most
    of the time, whatever the number of classes touched.
    """
    (size, dim), given = bank_features.shape, features.shape[0]
    _check_rows("bank_update_", size)
    block = min(next_power_of_2(dim), 1024)
    rows = max(1, 2048 // block)
    written = labels.new_empty((2 * given + 1,))
    with torch.cuda.device_of(bank_features):
        write_kernel[(cdiv(given, rows), max(1, cdiv(dim, block)))](
            bank_features, bank_labels, pointer, features, labels, keep, written, size, given,
            *bank_features.stride(), bank_labels.stride(0), *features.stride(), labels.stride(0),
            D=dim, BLOCK_B=rows, BLOCK_D=block,
        )  # fmt: skip
        if prototypes is None or counts is None:
            pointer.copy_(written[-1:])
        else:
            _means(bank_features, bank_labels, prototypes, counts, written, pointer)
    # The kernels write behind autograd's back: a backward that still needs an old value must notice.
    changed = (bank_features, bank_labels, pointer, prototypes, counts)
    increment_version([tensor for tensor in changed if tensor is not None])


def _means(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    counts: Tensor,
    written: Tensor | None,
    pointer: Tensor | None,
) -> None:
    """The prototypes of all classes, or those of the labels in ``written``, whose last number goes to ``pointer``."""
    (rows, dim), classes = features.shape, counts.shape[0]
    _check_rows("class_means", rows)
    entries = 0 if written is None else written.shape[0] - 1
    programs = entries or classes
    is_sorted = rows > SCAN_ROWS or programs * rows > SCAN_LABELS
    # Half the bytes of int64 to sort; labels out of range, which may not fit, keep their side.
    order = labels.clamp(-1, classes).to(torch.int32).sort(stable=True)[1] if is_sorted else labels
    block = min(next_power_of_2(dim), 2048)
    # Where there is nothing to point to, anything of the right type stands: None would make another binary.
    means_kernel[(programs,)](
        features, labels, order, labels if written is None else written, counts if pointer is None else pointer,
        prototypes, counts, rows, classes, entries, int(is_sorted), *features.stride(), labels.stride(0),
        D=dim, ROWS=4 if rows <= 16 * classes else 8, BLOCK_M=BLOCK_M, BLOCK_D=block,
        num_warps=4 if block <= 512 else 8,
    )  # fmt: skip


def _check_rows(op: str, rows: int) -> None:
    if rows >= 2**31:
        raise ValueError(f"{op}: features must have fewer than 2^31 rows, got {rows}")


_INDICES = dict.fromkeys(("label_ptr", "pointer_ptr", "written_ptr"), "*i64")
AOT = (
    *(
        Compile(
            f"prototypes of {dim}-d rows in {kind}",
            means_kernel,
            _INDICES
            | {"feature_ptr": f"*{kind}", "order_ptr": "*i64", "prototype_ptr": "*fp32", "count_ptr": "*i64"}
            | dict.fromkeys(("M", "C", "entries", "is_sorted", "stride_row"), "i32"),
            {"stride_column": 1, "stride_label": 1, "D": dim, "ROWS": rows, "BLOCK_M": BLOCK_M, "BLOCK_D": dim},
            num_warps=warps,
            num_stages=3,
        )
        for kind, dim, rows, warps in (("bf16", 256, 4, 4), ("fp32", 2048, 8, 8))
    ),
    Compile(
        "ring of 256-d rows in bf16",
        write_kernel,
        _INDICES
        | {"bank_ptr": "*bf16", "bank_label_ptr": "*i64", "feature_ptr": "*fp32", "keep_ptr": "*i1"}
        | dict.fromkeys(("M", "B", "stride_bank_row", "stride_row"), "i32"),
        dict.fromkeys(("stride_bank_column", "stride_bank_label", "stride_column", "stride_label"), 1)
        | {"D": 256, "BLOCK_B": 8, "BLOCK_D": 256},
        num_stages=3,
    ),
)
