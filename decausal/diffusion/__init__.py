"""The mathematics on tensors: noise, layout, shift, nelbo."""
