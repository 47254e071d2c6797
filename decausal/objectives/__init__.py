"""One file per loss, each a pure function on tensors."""
