"""How likely texts are as continuations of others, which benchmarks with several choices need."""
