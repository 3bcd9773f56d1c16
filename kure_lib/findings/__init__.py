"""What was found: claims, verdicts, published numbers, intervals, and one look for all figures."""
