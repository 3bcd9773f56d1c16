"""Quantization after training: a quantized network is a view of the full-precision one."""
