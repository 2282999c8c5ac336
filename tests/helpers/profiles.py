"""Colour profiles, made from their primaries."""

from __future__ import annotations

import struct


def fixed(*values):
    """Numbers as ICC profiles hold them."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def icc_profile(space, tags):
    """An ICC profile of a colour space with these tags (ICC.1:2010)."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249), **tags}
    table, content = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(content), len(data))
        content += data
    pcs = b"Lab " if space == b"CMYK" else b"XYZ "
    header = struct.pack(
        ">I4sI4s4s4s12s4s", 128 + len(table + content), b"", 4 << 24, b"mntr", space, pcs, b"", b"acsp"
    )
    header = (header + b"\0" * 28 + fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0")
    return header + table + content


def rgb_profile(*colorants):
    """Of three primaries (X, Y, Z) under D50 and sRGB's curve."""
    curve = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {
        letter + b"XYZ": b"XYZ \0\0\0\0" + fixed(*xyz)
        for letter, xyz in zip((b"r", b"g", b"b"), colorants, strict=True)
    }
    return icc_profile(b"RGB ", {**tags, **{letter + b"TRC": curve for letter in (b"r", b"g", b"b")}})


DISPLAY_P3 = rgb_profile((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
LIKE_SRGB = rgb_profile((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
LINEAR_GREY = icc_profile(b"GRAY", {b"kTRC": b"curv\0\0\0\0\0\0\0\0"})


def cmyk_profile():
    """Of inks that are all grey: Lab of the 16 corners, no colour in any."""
    inks = [[corner >> 3, corner >> 2 & 1, corner >> 1 & 1, corner & 1] for corner in range(16)]
    corners = bytes(value for c, m, y, k in inks for value in (0 if k else 255 - 40 * (c + m + y), 128, 128))
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * straight + corners + 3 * straight
    return icc_profile(b"CMYK", {b"A2B0": table})
