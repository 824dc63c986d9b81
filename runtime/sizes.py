"""Reading sizes as people write them: "12GiB". Knows nothing of what they are sizes of."""

import re

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(value: int | str) -> int:
    """Read a size: a number of bytes, or text such as "12GiB", "800 MB" or "1.5e9".

    Raises:
        ValueError: It is not such a text, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(value), re.IGNORECASE)
    unit = _UNITS.get(match[2].upper() or "B") if match else None
    try:
        size_bytes = round(float(match[1]) * unit) if match and unit else 0
    except ValueError:
        size_bytes = 0
    if size_bytes < 1:
        raise ValueError(
            f"{value!r} is no size: give a positive number of bytes, or one with a unit "
            "(B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)"
        )
    return size_bytes
