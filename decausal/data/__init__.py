"""Documents to packed rows to noised batches; the embedded corpus."""
