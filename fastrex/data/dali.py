"""Decode, cut and resize with NVIDIA DALI, on the CPU or a GPU; but for :mod:`.codec` the only module that imports it.

DALI draws nothing here: images, boxes and sizes come with each request, so a batch is what the plan says. Nor does it
hold any state that matters: a pipeline that a bad file has broken is built again and fed the same requests.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..errors import FastrexError

Bytes = NDArray[np.uint8]
# Adds the outputs to a DALI graph: (fn, types, decoded images, arguments) -> outputs.
Graph = Callable[[Any, Any, Any, Sequence[Any]], list[Any]]

DEPTH = 2  # requests inside DALI: one is waited for while the next one decodes


@dataclass(frozen=True)
class Request:
    """The encoded images of one batch and what to make of them.

    ``names`` and ``files`` are those of B images, ``shapes`` int [B, 2] the heights and widths that they had when they
    were indexed. ``arguments`` come from :func:`crop_arguments` or :func:`centre_arguments`. ``token`` is the caller's.
    """

    names: Sequence[str]
    files: Sequence[Bytes]
    shapes: NDArray[Any]
    arguments: Sequence[NDArray[Any]] = ()
    token: Any = None


# What to do about the images of a request that cannot be used, by position with the reason: another request with as
# many images or fewer, or an exception. Its token must be the one that the results are to come with.
Amend = Callable[[Request, dict[int, str]], Request]


@dataclass(frozen=True)
class Decoder:
    """How and where to decode.

    batch_size: most images in a request. threads: of the decoder, at least 1. hw_load: share of the JPEGs for the
    hardware decoder of a GPU that has one. largest: height and width that a GPU's buffers are made for at the start,
    so that they need not grow in mid-training.
    """

    batch_size: int
    threads: int
    device: torch.device
    amend: Amend
    hw_load: float = 0.65
    largest: tuple[int, int] = (0, 0)


def crop_arguments(boxes: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """For :func:`crops`: corner and shape [B, 2] of each crop in turn, from boxes [K, B, 4] (top, left, height,
    width)."""
    return [part for group in boxes for crop in group for part in (crop[:, :2], crop[:, 2:])]


def centre_arguments(heights: NDArray[Any], widths: NDArray[Any], resize: int, size: int) -> list[NDArray[Any]]:
    """For :func:`centre_crops`, [B, 2] each, from the images' shapes [B]: corners of the part of the image that is
    needed, its size in the result, and its place there.

    As torchvision's Resize and CenterCrop: the short side becomes ``resize``, the long one
    ``int(resize * long / short)``; the corner is ``round(spare / 2)``. Where the image is smaller than the crop, zeros
    pad it on both sides, ``missing // 2`` of them first.
    """
    shape = np.stack((heights, widths), axis=1).astype(np.int64)
    resized = resize * shape // shape.min(axis=1, keepdims=True)
    spare = resized - size
    corner = np.where(spare < 0, -(-spare // 2), np.rint(spare / 2))
    # Only that part is resized: of an image of 65,500 x 1 the whole would be 256 x 16,768,000.
    scale = shape / resized
    first, extent = np.maximum(corner, 0), np.minimum(resized, size)
    place = np.minimum(corner, 0)
    start, end = first * scale, (first + extent) * scale
    return [*(a.astype(np.float32) for a in (start, end, extent)), place.astype(np.int32)]


def decoded(requests: Iterator[Request], decoder: Decoder) -> Iterator[tuple[Request, list[Tensor]]]:
    """Each image as RGB: uint8 [H, W, 3], EXIF orientation applied, DALI's memory for as long as it is referenced.

    ``requests`` are pulled in this thread, ``DEPTH`` ahead of the results.

    Raises:
        FastrexError: DALI is missing, or what ``decoder.amend`` raises for images that cannot be used.
    """
    for request, outputs in _run(requests, lambda fn, types, images, arguments: [images], [], decoder):
        yield request, [from_dlpack(images[i]) for images in outputs for i in range(len(images))]


def crops(
    requests: Iterator[Request], sides: Sequence[int], decoder: Decoder
) -> Iterator[tuple[Request, list[Tensor]]]:
    """Decode each image once, cut crop i at its box and resize it to ``sides[i]`` with an antialiased cubic.

    Yields:
        The request, and for each crop uint8 [B, S, S, 3], DALI's memory for as long as it is referenced. On a GPU the
        current stream waits for it.
    """

    def graph(fn: Any, types: Any, images: Any, boxes: Sequence[Any]) -> list[Any]:
        how = {"interp_type": types.INTERP_CUBIC, "antialias": True}
        # Cut first: the filter sees the box only, as in torchvision's RandomResizedCrop.
        cuts = [
            fn.slice(images, start=corner, shape=shape, axes=[0, 1])
            for corner, shape in zip(boxes[::2], boxes[1::2], strict=True)
        ]
        return [fn.resize(cut, size=[side, side], **how) for cut, side in zip(cuts, sides, strict=True)]

    for request, outputs in _run(requests, graph, [np.int32] * 2 * len(sides), decoder):
        yield request, [from_dlpack(output.as_tensor()) for output in outputs]


def centre_crops(
    requests: Iterator[Request], size: int, decoder: Decoder, interpolation: str = "bilinear"
) -> Iterator[tuple[Request, Tensor]]:
    """Decode, resize with an antialiased filter ("bilinear" or "bicubic"), cut the centre: uint8 [B, size, size, 3]; as
    :func:`crops`."""

    def graph(fn: Any, types: Any, images: Any, arguments: Sequence[Any]) -> list[Any]:
        start, end, extent, place = arguments
        kinds = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
        how = {"interp_type": kinds[interpolation], "antialias": True}
        part = fn.resize(images, roi_start=start, roi_end=end, size=extent, **how)
        return [fn.slice(part, start=place, shape=[size, size], axes=[0, 1], out_of_bounds_policy="pad")]

    for request, outputs in _run(requests, graph, [np.float32] * 3 + [np.int32], decoder):
        if outputs:
            yield request, from_dlpack(outputs[0].as_tensor())


def decodable(batches: Iterable[Request], *, batch_size: int, threads: int) -> Iterator[dict[int, str]]:
    """For each request the images that the decoder of a training run does not take, by position with the reason.

    They are decoded on the CPU and compared with the shapes that they should have.
    """
    found: dict[int, dict[int, str]] = {}

    def without(request: Request, bad: dict[int, str]) -> Request:
        number, places = request.token
        found.setdefault(number, {}).update({places[i]: reason for i, reason in bad.items()})
        kept = [i for i in range(len(request.files)) if i not in bad]
        files, names = [request.files[i] for i in kept], [request.names[i] for i in kept]
        return Request(names, files, request.shapes[kept], (), (number, [places[i] for i in kept]))

    def numbered() -> Iterator[Request]:
        for number, request in enumerate(batches):
            places = list(range(len(request.files)))
            yield Request(request.names, request.files, request.shapes, (), (number, places))

    decoder = Decoder(batch_size, threads, torch.device("cpu"), without)
    for request, _ in decoded(numbered(), decoder):
        yield found.pop(request.token[0], {})


def _run(
    requests: Iterator[Request], graph: Graph, dtypes: Sequence[type[np.generic]], decoder: Decoder
) -> Iterator[tuple[Request, list[Any]]]:
    """Feed ``requests`` to a pipeline; yield each with its outputs, DALI's tensor lists.

    A batch that fails is looked at image by image, amended, and fed to a new pipeline with those behind it: what comes
    out, and in which order, is the same as if the amended requests had come at once.
    """

    def shaped(fn: Any, types: Any, images: Any, arguments: Sequence[Any]) -> list[Any]:
        return [*graph(fn, types, images, arguments), images.shape(dtype=types.INT32)]

    inside: deque[Request] = deque()
    waiting = requests
    pipeline = None
    while True:
        if pipeline is None:
            pipeline = _pipeline(_feed(waiting, inside), shaped, dtypes, decoder)
        try:
            *outputs, shapes = pipeline.run()
        except StopIteration:
            yield from ((request, []) for request in inside)
            return
        except RuntimeError as error:
            if isinstance(error, FastrexError):
                raise
            bad = [_unusable(request, torch.device("cpu")) for request in inside]
            if not any(bad) and decoder.device.type == "cuda":
                bad = [_unusable(request, decoder.device) for request in inside]
            if not any(bad):
                names = ", ".join(repr(name) for request in inside for name in request.names[:3])
                fact = f"DALI failed, though each image of the batches with {names}, ... decodes by itself"
                raise RuntimeError(f"{fact}: {error}") from error
        else:
            while not inside[0].files:
                yield inside.popleft(), []
            bad = [_other_shape(inside[0], np.asarray(shapes.as_tensor())[:, :2])]
            if not any(bad):
                yield inside.popleft(), outputs
                continue
        pipeline = None
        bad += [{}] * (len(inside) - len(bad))
        again = [
            decoder.amend(request, reasons) if reasons else request
            for request, reasons in zip(inside, bad, strict=True)
        ]
        waiting = itertools.chain(again, waiting)
        inside.clear()


def _feed(requests: Iterator[Request], inside: deque[Request]) -> Iterator[tuple[Any, ...]]:
    for request in requests:
        inside.append(request)
        if request.files:  # one that has lost its last image only keeps its place: DALI takes no empty batch
            yield (list(request.files), *(np.ascontiguousarray(argument) for argument in request.arguments))


def _other_shape(request: Request, shapes: NDArray[Any]) -> dict[int, str]:
    """The images that are not as large as they were: their boxes mean nothing."""
    different = np.flatnonzero((np.asarray(request.shapes) != shapes).any(axis=1))
    return {
        int(i): f"has {shapes[i][1]}x{shapes[i][0]} pixels, but had {request.shapes[i][1]}x{request.shapes[i][0]} when "
        "it was indexed"
        for i in different
    }


def _unusable(request: Request, device: torch.device) -> dict[int, str]:
    """Which images of a batch that failed are to blame: DALI does not say, so each one is decoded by itself."""
    bad = {}
    rest = deque(enumerate(request.files))
    while rest:
        pending = iter([([file],) for _, file in rest])
        alone = Decoder(1, 1, device, lambda request, bad: request)
        pipeline = _pipeline(pending, lambda fn, types, images, _: [images.shape(dtype=types.INT32)], (), alone, 1)
        while rest:
            place, _ = rest.popleft()
            try:
                (shape,) = pipeline.run()
            except RuntimeError:
                bad[place] = "cannot be decoded"
                break  # what a pipeline does after an error is nowhere promised
            one = Request(request.names[place : place + 1], [], request.shapes[place : place + 1])
            if reason := _other_shape(one, np.asarray(shape.as_tensor())[:, :2]):
                bad[place] = reason[0]
    return bad


def _pipeline(
    feed: Iterator[tuple[Any, ...]],
    graph: Graph,
    dtypes: Sequence[type[np.generic]],
    decoder: Decoder,
    depth: int = DEPTH,
) -> Any:
    """One pipeline function for the CPU and for a GPU, where DALI decodes with its hybrid decoder."""
    dali, fn, types = _dali()
    gpu = decoder.device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=decoder.batch_size,
        num_threads=decoder.threads,
        device_id=(decoder.device.index or 0) if gpu else None,
        prefetch_queue_depth=depth,
    )
    with pipeline:
        encoded, *arguments = fn.external_source(
            source=feed,
            num_outputs=1 + len(dtypes),
            batch=True,
            dtype=[types.UINT8, *(types.to_dali_type(np.dtype(dtype).name) for dtype in dtypes)],
            ndim=[1] * (1 + len(dtypes)),
        )
        # Only RGB: other output types corrupt memory on grey JPEGs. The CPU decoder always upsamples chroma as Pillow
        # does, the GPU's only when told to.
        options: dict[str, Any] = {"device": "cpu"}
        if gpu:
            height, width = decoder.largest
            options = {
                "device": "mixed",
                "jpeg_fancy_upsampling": True,
                "hw_decoder_load": decoder.hw_load,
                "preallocate_height_hint": height,
                "preallocate_width_hint": width,
                "device_memory_padding": max(16 << 20, 3 * height * width),
                "host_memory_padding": max(8 << 20, height * width),
            }
        images = fn.decoders.image(encoded, output_type=types.RGB, **options)
        pipeline.set_outputs(*graph(fn, types, images, arguments))
    pipeline.build()
    return pipeline


def _dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia import dali
        from nvidia.dali import fn, types
    except ImportError as error:
        fact = f"NVIDIA DALI, which decodes the images, cannot be imported ({error})"
        raise FastrexError(f"{fact}; pip install 'fastrex[train]'") from error
    return dali, fn, types
