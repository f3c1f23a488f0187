"""Which linear layers FP4 hurts most: each type and each block quantized alone, everything else in high precision."""
