"""Pickles are read for their arrays; what else they ask for is refused and not run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metablocks.errors import DataError
from metablocks.tasks.array_pickles import loads


class Asks:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, np.load, np.fromfile])
def test_a_pickle_that_asks_for_code_is_refused_and_the_code_not_run(
    tmp_path: Path, protocol: int, function: Callable[..., object]
) -> None:
    content = pickle.dumps({"data": Asks(function, str(tmp_path / "made"))}, protocol=protocol)
    with pytest.raises(DataError, match=r"train: cannot be read as a pickle \(it asks for .*only"):
        loads(content, "train")
    assert not list(tmp_path.iterdir())


def test_arrays_of_objects_and_other_encodings_are_refused() -> None:
    with pytest.raises(DataError, match="Python objects"):
        loads(pickle.dumps(np.array([{}], dtype=object)), "train")
    asks = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    with pytest.raises(DataError, match="bytes encoded by rot13"):
        loads(asks, "train")


@pytest.mark.parametrize(
    "name", ["numpy.core.numeric _frombuffer", "numpy dtype", "_codecs encode"]
)
@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"])
def test_a_pickle_sets_no_attribute_of_what_it_may_call(name: str, state: bytes) -> None:
    function = b"c" + name.replace(" ", "\n").encode() + b"\n"
    loads(b"\x80\x02" + function + b".", "train")
    with pytest.raises(DataError, match="has no attribute"):
        loads(b"\x80\x02" + function + state + b"b.", "train")
