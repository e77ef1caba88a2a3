"""PNG files whose pixels end early: PIL leaves the rest black without a word."""

import io
import struct
import zlib

SIGNATURE = 8  # bytes
CRC = 4  # bytes behind a chunk
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by the kind of colours
# Of an interlaced file: the first column and row of a pass, and its steps.
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
PASSES += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
BLOCK = 2**20  # bytes that are unpacked at a time


def is_cut(file: io.BufferedIOBase) -> bool:
    """Whether a PNG file that PIL has read has fewer rows than its header says."""
    file.seek(SIGNATURE)
    stream, found, needed = zlib.decompressobj(), 0, 0
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        data = file.read(int.from_bytes(head[:4]))
        file.seek(CRC, io.SEEK_CUR)
        if head[4:] == b"IHDR":
            needed = _unpacked_size(data)
        if head[4:] == b"IDAT":
            while found < needed and (block := stream.decompress(data, BLOCK)):
                found, data = found + len(block), stream.unconsumed_tail
    return found < needed


def _unpacked_size(header: bytes) -> int:
    """Bytes of all rows, each of which begins with that of its filter."""
    width, height, bits, colours, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    size = 0
    for left, top, across, down in PASSES if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0 and rows > 0:
            size += rows * (1 + (columns * bits * SAMPLES[colours] + 7) // 8)
    return size
