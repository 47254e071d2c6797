"""How likely texts are as continuations of others: what benchmarks with several choices ask of a model."""
