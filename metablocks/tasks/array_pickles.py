"""Read pickles that hold plain values and numpy arrays, and run nothing else that a pickle asks for.

A pickle may name any function of any module and have it called. These may name what numpy's own
pickles of arrays need, in any protocol, and are an error otherwise. So a file that is trusted by
nobody can be read; `pickle.load`, which torchvision uses, reads only files whose MD5 it knows.
"""

import io
import pickle
from typing import Any

import numpy as np

from metablocks.errors import DataError


class _Latin1:
    """What Python 3 writes for bytes in protocol 2: `_codecs.encode(text, "latin1")`."""

    __slots__ = ()  # no attribute that a pickle could set

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"bytes encoded by {encoding}")
        return text.encode("latin-1")


class _Dtype:
    """What numpy writes for a dtype: its kind, and two flags, which Python 2 wrote as numbers."""

    __slots__ = ()

    def __call__(self, kind: str, align: bool = False, copy: bool = False) -> np.dtype[Any]:
        dtype = np.dtype(kind, align=bool(align), copy=bool(copy))
        if dtype.hasobject:
            raise pickle.UnpicklingError("it holds an array of Python objects")
        return dtype


class _FromBuffer:
    """What numpy writes for an array in protocol 5: its bytes, dtype, shape and order."""

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: Any, shape: Any, order: Any) -> Any:
        return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_SCALAR = np.int64(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _Dtype(),
    ("_codecs", "encode"): _Latin1(),
    **{
        (f"numpy.{core}.{module}", name): value
        for core in ("core", "_core")  # numpy 1, numpy 2
        for module, name, value in (
            ("multiarray", "_reconstruct", _RECONSTRUCT),
            ("multiarray", "scalar", _SCALAR),
            ("numeric", "_frombuffer", _FromBuffer()),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only plain values and numpy arrays are read"
            )
        return _ALLOWED[module, name]


def loads(content: bytes, place: str) -> Any:
    """The value of a pickle; text of Python 2 is read as Latin-1, as torchvision does.

    Raises `DataError` naming `place` for what is no pickle, or asks for anything but numpy arrays.

    >>> loads(pickle.dumps({"data": np.arange(3)}), "here")
    {'data': array([0, 1, 2])}
    >>> loads(pickle.dumps(print), "here")
    Traceback (most recent call last):
    metablocks.errors.DataError: here: cannot be read as a pickle (it asks for builtins.print, and
    only plain values and numpy arrays are read)
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise DataError(f"{place}: cannot be read as a pickle ({error})") from error
