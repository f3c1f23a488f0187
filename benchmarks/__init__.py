"""Measurements of speed and memory. Each checks its outputs before it reports a time, pairs what it compares in one
run, and prints ratios; `benchmarks/gpu.sh` runs all of them on a GPU.

device    that there is a GPU
kernels   every kernel against the XLA path and against the device's copy bandwidth
step      the whole training step by recipe
gemm      a layer's matrix products in bfloat16, and in FP4 by every way that the device has
peers     a linear layer and a small transformer beside other JAX packages, and without quantization
"""
