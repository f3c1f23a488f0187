"""The paper's numbers (arXiv 2605.18933), as printed there, for the tables that stand beside ours."""

RATES = (0.01, 0.02, 0.05, 0.10)

# Theorem 3's table: the transverse ratio c(p) in the paper's form, and as the paper measured it (experiment V1).
RATIO_THEORY = (2.610, 2.538, 2.378, 2.178)
RATIO_MEASURED = (2.639, 2.583, 2.465, 2.299)

# Table D.4, width 2048: the radial fractions at the block's output.
RADIAL_SIGN = (0.0110, 0.0202, 0.0465, 0.0876)
RADIAL_MAGNITUDE = (0.6428, 0.6449, 0.6484, 0.6518)

# Ratios after layers 1 to 6 at p = .01.
DEPTH_RATE = 0.01
DEPTH_PLAIN = (3.587, 3.494, 3.386, 3.278, 3.182, 3.066)
DEPTH_RESIDUAL = (1.355, 1.349, 1.343, 1.335, 1.331, 1.318)

# Theorem 4 and the error of row-wise sign weights after a ReLU.
TERNARY = {
    "cos2": 0.6366,
    "sin2": 0.3634,
    "degrees": 37.07,
    "norm_difference": 0.4042,
    "gate_flips": 0.206,
    "energy": 0.15971,
    "radial_fraction": 0.36489,
    "equal_norm_rate": 0.0908,
    "equal_norm_ratio": 1.437,
}

# Theorem 6 at n = 2048: amplitude → leverage.
LEVERAGE_WIDTH = 2048
LEVERAGE = {0.0221: 1.00, 0.024: 1.18, 0.1: 19.98, 0.26: 133.0, 0.5: 538.0}

# Appendix F, 5 % of the columns: energy share → ratio per column.
COLUMN_FRACTION = 0.05
COLUMN_RATIO = {0.1: 3.38, 0.3: 10.1, 0.5: 19.0, 0.9: 106.9, 0.99: 991.0}

# TinyLlama-1.1B: leverage of outlier columns at equal flip counts, by flip rate (1: all of their weights), in loss and
# in perplexity; median and largest amplitude in its layer 12; Spearman of experiments F and G.
NLL_LEVERAGE = {0.0005: 9.5, 0.001: 8.7, 0.005: 10.4, 1.0: 5.0}
PERPLEXITY_LEVERAGE = {1.0: 67.0}
AMPLITUDES = (0.024, 0.26)
ENERGY_SPEARMAN = (0.955, 0.927)
