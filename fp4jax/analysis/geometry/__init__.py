"""The sign-magnitude geometry of pre-norm networks (arXiv 2605.18933): closed forms and the experiments beside them.

Closed forms, float64, on numbers or arrays; an argument out of range is a ValueError:

    relu            h, E, gate flips, E_flip and E_smooth; the moments of relu(u) against relu(s v)
    perturbations   sign flips against magnitude change: fact 1, theorems 1 and 3, R_sign, R_mag, c(p)
    rmsnorm         theorem 2: the projector and its second-order remainder
    ternary         theorem 4: row-wise sign weights; weights with zeros
    outliers        theorems 5 and 6, proposition 3, the column groups of appendix F
    activations     open problem O2: SiLU and GELU
    depth           stacks of blocks
    finite_width    what a finite width does to all that

Experiments: `simulation` draws, `estimates` averages, `experiments` makes tables of it, `paper` holds the paper's
numbers; `real_model`, `column_flips` and `real_tables` do the same for a trained model; `figures` and `real_figures`
plot tables. `python -m fp4jax.analyze geometry` runs everything.
"""
