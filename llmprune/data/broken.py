"""Where a file of rows is broken, for the message that refuses it."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import zlib
from pathlib import Path
from typing import Any

DAMAGED: tuple[type[Exception], ...] = (EOFError, OSError, lzma.LZMAError, zlib.error)  # what compressed files raise
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}


def fault_in(path: Path, builder: str) -> str:
    """The first broken line of a file and its fault, such as "line 3: not JSON (Expecting value)"; empty where none is found."""
    number = 0
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            start = file.read(len(codecs.BOM_UTF8))
            file.seek(len(start) if start == codecs.BOM_UTF8 else 0)
            if builder == "json" and start.lstrip().startswith(b"["):
                json.loads(file.read())
                return ""
            for line in file:
                number += 1
                text = line.decode("utf-8")
                if builder == "json" and text.strip():
                    json.loads(text)
    except UnicodeDecodeError:
        return f"line {number}: not UTF-8" if number else "not UTF-8"
    except json.JSONDecodeError as error:
        return f"line {number or error.lineno}: not JSON ({error.msg})"
    except DAMAGED:
        return f"damaged after line {number}"
    return ""
