"""What several verbs measure and show runs with: a clock, crossings of curves, figures, a quiet environment."""
