"""Kernels run in Pallas' GPU interpreter, and with `-m gpu` on a GPU too."""

import pytest

from pallas_kernels import compat


@pytest.fixture(
    params=[
        pytest.param(
            True, id="interpreter", marks=pytest.mark.skipif(not compat.CAN_INTERPRET, reason="needs JAX 0.12")
        ),
        pytest.param(False, id="gpu", marks=pytest.mark.gpu),
    ]
)
def interpret(request):
    return request.param
