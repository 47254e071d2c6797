"""Gaps in texts, of given or unknown length."""
