"""The one door to transformers: source models made convertible, run under any layout, saved, loaded and examined."""
