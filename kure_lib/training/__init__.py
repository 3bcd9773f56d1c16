"""One training loop; KURE, its rivals and quantization-aware training are training methods of one protocol."""
