"""All access to transformers: source models are made convertible, run under any layout, saved, loaded and examined."""
