"""One tensor, no network: kurtosis, grids, quantizers, steps and the theory of distortion."""
